"""Layers of a transformer block: linear, norms, MLP, mixture of experts, positions and dropout."""
