"""Block sizes of the attention kernels: a static table, tuned offline.

There is no autotuning at run time, so a program compiles to the same kernels every time. The script
`tools/kernels/tune.py` of the repository prints rows for the local GPU.
"""

from typing import Literal, NamedTuple

type Pass = Literal["forward", "dq", "dkv", "dbias"]


class BlockSizes(NamedTuple):
    """Tile sizes, pipeline depth and warps of a kernel.

    Attributes
    ----------
    q, k
        Rows of queries and of keys in a block.
    stages
        Pipeline stages: blocks in flight between device and shared memory.
    warps
        Warps per program (Triton) or compute warpgroups (Mosaic GPU); unused on TPU.
    """

    q: int
    k: int
    stages: int
    warps: int


class Row(NamedTuple):
    """Key of the table; a call uses the entry of the next larger head_dim."""

    kernel: str
    architecture: str
    head_dim: int
    causal: bool
    which: Pass


# (kernel, architecture, pass): {head_dim: (q, k, stages, warps)}. Not yet tuned on hardware;
# "interpret" has small blocks for the interpreters, so that short sequences span several.
_SIZES: dict[tuple[str, str, Pass], dict[int, tuple[int, int, int, int]]] = {
    # Rows (forward, dq) or keys (dkv) of one compute warpgroup. Forward: as in Shah et al.,
    # "FlashAttention-3", 2024, and its public code. Backward: limited by registers; besides score
    # tiles dq accumulates 64 x head_dim, dkv twice that (above head_dim 128 once).
    ("mosaic_gpu", "sm_90", "forward"): {
        64: (64, 128, 3, 3),
        128: (64, 128, 2, 2),
        256: (64, 64, 2, 2),
    },
    ("mosaic_gpu", "interpret", "forward"): {64: (64, 64, 2, 3), 256: (64, 64, 2, 2)},
    ("mosaic_gpu", "sm_90", "dq"): {128: (64, 64, 4, 2), 256: (64, 32, 2, 2)},
    ("mosaic_gpu", "sm_90", "dkv"): {128: (64, 64, 4, 2), 256: (32, 64, 2, 2)},
    ("mosaic_gpu", "interpret", "dq"): {256: (64, 64, 2, 2)},
    ("mosaic_gpu", "interpret", "dkv"): {256: (64, 64, 2, 2)},
    # Large blocks as in FlashAttention-2 that compile without register spills. "sm_80" also fits
    # the 99 KB of shared memory of sm_86.
    ("triton", "sm_80", "forward"): {
        64: (128, 32, 3, 4),
        128: (128, 64, 2, 8),
        256: (64, 32, 2, 8),
    },
    ("triton", "sm_80", "dq"): {64: (128, 64, 2, 8), 128: (64, 64, 2, 8), 256: (64, 32, 1, 8)},
    ("triton", "sm_80", "dkv"): {64: (32, 128, 2, 8), 128: (64, 64, 2, 8), 256: (32, 32, 2, 8)},
    ("triton", "sm_80", "dbias"): {64: (32, 128, 2, 8), 128: (32, 64, 2, 8), 256: (32, 32, 2, 8)},
    ("triton", "sm_90", "forward"): {
        64: (128, 64, 3, 4),
        128: (128, 64, 3, 8),
        256: (64, 64, 2, 8),
    },
    ("triton", "sm_90", "dq"): {64: (128, 64, 2, 8), 128: (128, 64, 2, 8), 256: (64, 32, 2, 8)},
    ("triton", "sm_90", "dkv"): {64: (64, 128, 2, 8), 128: (32, 128, 2, 8), 256: (64, 32, 2, 8)},
    ("triton", "sm_90", "dbias"): {64: (128, 64, 2, 8), 128: (32, 128, 2, 8), 256: (64, 32, 2, 8)},
    ("triton", "interpret", "forward"): {256: (32, 16, 1, 4)},
    ("triton", "interpret", "dq"): {256: (32, 16, 1, 4)},
    ("triton", "interpret", "dkv"): {256: (16, 32, 1, 4)},
    ("triton", "interpret", "dbias"): {256: (32, 16, 1, 4)},
    # No tensor cores: all operands pass through registers.
    ("triton-float32", "sm_80", "forward"): {
        64: (64, 32, 1, 8),
        128: (32, 16, 1, 8),
        256: (16, 32, 1, 8),
    },
    ("triton-float32", "sm_80", "dq"): {
        64: (64, 32, 1, 8),
        128: (16, 32, 1, 8),
        256: (16, 16, 1, 8),
    },
    ("triton-float32", "sm_80", "dkv"): {
        64: (32, 64, 1, 8),
        128: (32, 32, 1, 8),
        256: (16, 16, 1, 8),
    },
    ("triton-float32", "sm_80", "dbias"): {
        64: (32, 64, 1, 8),
        128: (32, 32, 1, 8),
        256: (16, 16, 1, 8),
    },
    ("triton-float32", "sm_90", "forward"): {
        64: (64, 32, 1, 8),
        128: (32, 16, 1, 8),
        256: (16, 32, 1, 8),
    },
    ("triton-float32", "sm_90", "dq"): {
        64: (64, 32, 1, 8),
        128: (16, 32, 1, 8),
        256: (16, 16, 1, 8),
    },
    ("triton-float32", "sm_90", "dkv"): {
        64: (32, 64, 1, 8),
        128: (32, 32, 1, 8),
        256: (16, 16, 1, 4),
    },
    ("triton-float32", "sm_90", "dbias"): {
        64: (32, 64, 1, 8),
        128: (32, 32, 1, 8),
        256: (16, 16, 1, 8),
    },
    ("triton-float32", "interpret", "forward"): {256: (32, 16, 1, 4)},
    ("triton-float32", "interpret", "dq"): {256: (32, 16, 1, 4)},
    ("triton-float32", "interpret", "dkv"): {256: (16, 32, 1, 4)},
    ("triton-float32", "interpret", "dbias"): {256: (32, 16, 1, 4)},
    # Enough rows to be compute-bound and blocks that amortize the overhead of a grid step, within
    # XLA's default vector memory of a kernel.
    ("tpu", "interpret", "forward"): {256: (32, 64, 2, 0)},
    ("tpu", "interpret", "dq"): {256: (32, 64, 2, 0)},
    ("tpu", "interpret", "dkv"): {256: (32, 64, 2, 0)},
    ("tpu", "TPU v5 lite", "forward"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v5 lite", "dq"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v5 lite", "dkv"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v6 lite", "forward"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    ("tpu", "TPU v6 lite", "dq"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    ("tpu", "TPU v6 lite", "dkv"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    # A float32 product takes six passes: smaller blocks.
    ("tpu-float32", "interpret", "forward"): {256: (32, 64, 2, 0)},
    ("tpu-float32", "interpret", "dq"): {256: (32, 64, 2, 0)},
    ("tpu-float32", "interpret", "dkv"): {256: (32, 64, 2, 0)},
    ("tpu-float32", "TPU v5 lite", "forward"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
    ("tpu-float32", "TPU v5 lite", "dq"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
    ("tpu-float32", "TPU v5 lite", "dkv"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
    ("tpu-float32", "TPU v6 lite", "forward"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
    ("tpu-float32", "TPU v6 lite", "dq"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
    ("tpu-float32", "TPU v6 lite", "dkv"): {128: (512, 512, 2, 0), 256: (256, 512, 2, 0)},
}

TABLE: dict[Row, BlockSizes] = {
    Row(kernel, architecture, head_dim, causal, which): BlockSizes(*sizes)
    for (kernel, architecture, which), of_dims in _SIZES.items()
    for head_dim, sizes in of_dims.items()
    for causal in (False, True)
}


def block_sizes(row: Row) -> BlockSizes:
    """Return the block sizes of the smallest head_dim in the table that is >= the row's."""
    fitting = (x for x in TABLE if x._replace(head_dim=row.head_dim) == row)
    return TABLE[min((x for x in fitting if x.head_dim >= row.head_dim), key=lambda x: x.head_dim)]
