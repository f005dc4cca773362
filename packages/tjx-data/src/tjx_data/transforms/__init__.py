"""Loaders that transform the rows of another loader."""
