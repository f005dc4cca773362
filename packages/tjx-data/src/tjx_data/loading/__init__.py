"""Batch loaders that are pure functions of (seed, step), and prefetching."""
