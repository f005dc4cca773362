"""Memory, communication and step-time estimates of a compiled training step."""
