"""Metrics computed from logits, losses and parameters."""
