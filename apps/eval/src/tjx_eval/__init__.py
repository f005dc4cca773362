"""Questions to a trained model: its loss on held-out text, and the text it writes."""

__version__ = "0.2.0"
