"""The command ``tjx-ckpt``: what a person asks of a directory of checkpoints."""
