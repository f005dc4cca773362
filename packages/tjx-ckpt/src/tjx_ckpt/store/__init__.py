"""Checkpoints as files: where they lie, what is in them, and whether it is what was saved."""
