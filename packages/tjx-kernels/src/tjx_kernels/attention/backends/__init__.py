"""Attention backends; each is one module or folder that defines an `AttentionBackend`."""
