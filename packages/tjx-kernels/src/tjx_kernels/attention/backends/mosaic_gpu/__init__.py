"""Attention for NVIDIA Hopper GPUs in Pallas Mosaic GPU; the first call imports the kernels."""

from tjx_kernels.attention.backends.mosaic_gpu.backend import BACKEND as BACKEND
