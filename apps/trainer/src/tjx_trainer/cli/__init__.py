"""Command line of the trainer: flags, help pages and subcommands, without importing JAX."""
