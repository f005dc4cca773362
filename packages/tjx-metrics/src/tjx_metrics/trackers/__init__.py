"""Experiment trackers: JSON lines, console, TensorBoard, Weights & Biases and Trackio."""
