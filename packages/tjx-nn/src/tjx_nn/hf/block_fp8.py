"""Weights of FP8 checkpoints: e4m3 values with a float32 scale for each block of a matrix.

This is the format of DeepSeek-V3 and of the FP8 releases of Qwen3 ("quant_method": "fp8"): beside a
matrix `weight` there is `weight_scale_inv`, one factor for each block of its rows and columns.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPE, SCALE_SUFFIX = "F8_E4M3", "_scale_inv"

Block = tuple[int, int]


def read_values(path: Path, name: str) -> np.ndarray:
    """Read the values of an FP8 tensor as float32; safetensors does not read them to NumPy."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry: dict[str, Any] = json.loads(file.read(length))[name]
        first, end = entry["data_offsets"]
        file.seek(8 + length + first)
        data = np.frombuffer(file.read(end - first), jnp.float8_e4m3fn)
    return data.reshape(entry["shape"]).astype(np.float32)


def dequantize(values: np.ndarray, scales: np.ndarray, block: Block) -> np.ndarray:
    """Multiply each block of a matrix with its scale; the last blocks can be smaller."""
    rows, columns = values.shape
    factors = scales.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    product: np.ndarray = values * factors
    return product


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix."""
    return tuple(-(-size // part) for size, part in zip(shape, block, strict=False))
