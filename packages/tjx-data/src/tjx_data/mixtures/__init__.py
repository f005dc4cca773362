"""Mixtures of corpora: their settings as text, and their weights."""
