"""Start of multi-process runs, barriers and consensus between processes."""
