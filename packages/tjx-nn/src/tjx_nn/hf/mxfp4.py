"""Weights of MXFP4 checkpoints: e2m1 values, 32 of which share a power of two.

This is the format of the releases of gpt-oss ("quant_method": "mxfp4"; Open Compute Project 2023,
"OCP Microscaling Formats (MX) Specification", sections 5.3.3 and 5.4.1). In place of the matrices
[experts, inputs, outputs] of a layer there are uint8 tensors: `*_blocks` [experts, outputs, blocks,
16], two values in a byte, the lower half first, and `*_scales` [experts, outputs, blocks], the
exponents (e8m0).
"""

import numpy as np

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
_BYTES = 16  # of a block
_EXPONENT_BIAS = 127
_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_POSITIVE, -_POSITIVE])
# Both values of each byte.
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)


def is_part(name: str, dtype: str) -> bool:
    """Return whether a tensor of a safetensors file is named and typed as blocks or scales."""
    return dtype == "U8" and name.endswith((BLOCKS_SUFFIX, SCALES_SUFFIX))


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the matrices of all experts, float32 [experts, inputs, outputs]."""
    matrices = np.empty(matrices_shape(blocks.shape), np.float32)
    for matrix, expert_blocks, expert_scales in zip(matrices, blocks, scales, strict=True):
        values = _PAIRS[expert_blocks].reshape(*expert_scales.shape, 2 * _BYTES)
        exponents = expert_scales.astype(np.int32) - _EXPONENT_BIAS
        matrix[...] = np.ldexp(values, exponents[..., None]).reshape(matrix.shape[::-1]).T
    return matrices


def matrices_shape(blocks_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the matrices that blocks of a shape contain."""
    experts, outputs, count, _ = blocks_shape
    return experts, 2 * _BYTES * count, outputs


def fits(blocks_shape: tuple[int, ...], scales_shape: tuple[int, ...] | None) -> bool:
    """Return whether blocks and scales of these shapes are those of the matrices of experts."""
    return len(blocks_shape) == 4 and (*(scales_shape or ()), _BYTES) == blocks_shape
