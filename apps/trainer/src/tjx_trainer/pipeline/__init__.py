"""Pipelines: training runs that start from each other, from a list of stages."""
