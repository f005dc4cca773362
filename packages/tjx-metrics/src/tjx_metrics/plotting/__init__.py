"""Pictures of runs, good enough for a paper. They touch no global state of matplotlib."""
