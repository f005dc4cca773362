"""Scaling: the dial, laws of the loss, and predictions of larger runs."""
