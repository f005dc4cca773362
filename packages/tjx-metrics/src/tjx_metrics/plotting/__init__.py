"""Publication-quality plots of runs and attention, without matplotlib's global state."""
