"""Plans without training: `trainer plan`, `trainer parameters` and `--dry_run`."""
