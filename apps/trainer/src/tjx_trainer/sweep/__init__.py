"""Hyperparameter sweeps: grid, launchers, results and plots of `trainer sweep`."""
