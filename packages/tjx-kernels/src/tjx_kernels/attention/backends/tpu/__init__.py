"""Attention for TPUs in Pallas."""

from tjx_kernels.attention.backends.tpu.backend import BACKEND as BACKEND
