"""Example of extensions of tjx: importing it registers all of them; docs/extending.md explains."""

from example_extension import (
    attention,
    corpus,
    environment,
    hf_family,
    metric,
    model,
    optimizer,
    schedule,
    task,
    tracker,
)

__all__ = [
    "attention",
    "corpus",
    "environment",
    "hf_family",
    "metric",
    "model",
    "optimizer",
    "schedule",
    "task",
    "tracker",
]
