"""Attention layers (MHA, GQA, MLA, sparse) and their KV cache."""
