"""Train state, train step, training loop, evaluation and checkpointing of a run."""
