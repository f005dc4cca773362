"""Traces of training steps with `jax.profiler`, and their analysis."""
