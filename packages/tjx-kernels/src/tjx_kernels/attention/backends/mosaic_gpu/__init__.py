"""Attention for NVIDIA Hopper GPUs in Pallas Mosaic GPU; imported by the first call."""
