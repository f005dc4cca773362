"""Process-level services: run directory, signals, watchdog, supervisor and XLA flags."""
