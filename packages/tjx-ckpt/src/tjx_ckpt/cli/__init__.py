"""The command ``tjx-ckpt``: inspection, comparison, verification and conversion of checkpoints."""
