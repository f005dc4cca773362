"""Tasks: the batches that each model family trains on, and the report of its final evaluation."""
