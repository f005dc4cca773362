"""Losses of a trained model on validation data and texts, comparisons and benchmarks."""
