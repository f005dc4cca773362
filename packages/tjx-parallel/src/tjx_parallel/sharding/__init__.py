"""Logical-axis rules and the shardings of parameters, optimizer state, activations and batches."""
