"""Example of extensions of tjx: importing it registers all of them; docs/extending.md explains."""

from example_extension import attention, hf_family, model, optimizer, task, tracker

__all__ = ["attention", "hf_family", "model", "optimizer", "task", "tracker"]
