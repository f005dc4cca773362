"""Evaluation, text generation, export and serving of trained models."""

__version__ = "0.2.0"
