"""Throughput, MFU, time per phase, memory and compilations of a training run."""
