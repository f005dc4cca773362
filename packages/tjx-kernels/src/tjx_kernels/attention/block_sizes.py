"""Block sizes of the kernels: a frozen table, found offline.

Nothing is tuned while a program runs, so that a program is the same every time. The script
`tools/kernels/tune.py` of the repository prints rows for the GPU it runs on.
"""

from typing import Literal, NamedTuple

type Pass = Literal["forward", "dq", "dkv", "dbias"]


class BlockSizes(NamedTuple):
    """How a kernel cuts its work.

    Attributes
    ----------
    q, k
        Rows of queries and of keys in a block.
    stages
        Blocks in flight between device and shared memory.
    warps
        Warps of a program (Triton); compute warpgroups (Mosaic GPU); unused on TPU.
    """

    q: int
    k: int
    stages: int
    warps: int


class Row(NamedTuple):
    """The key of the table; a call takes the row of the next larger head_dim."""

    kernel: str
    architecture: str
    head_dim: int
    causal: bool
    which: Pass


# (kernel, architecture, pass): {head_dim: (q, k, stages, warps)}. Not yet tuned on hardware;
# "interpret" are the small blocks of the interpreters, so that short sequences cross several.
_SIZES: dict[tuple[str, str, Pass], dict[int, tuple[int, int, int, int]]] = {
    # Rows (forward, dq) or keys (dkv) are those of one compute warpgroup. Forward: as in
    # Shah et al., "FlashAttention-3", 2024, and its public code. Backward: registers set the limit;
    # beside tiles of scores dq keeps a sum of 64 x head_dim, dkv two (above head_dim 128 one).
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
    # Large blocks, as FlashAttention-2 has, that compile without spilled registers. "sm_80":
    # within the 99 KB of shared memory of sm_86 too.
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
    # Without tensor cores: all that is multiplied passes through registers.
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
    # Rows that suffice to read keys no faster than they are used, and blocks that make a step of
    # the grid worth its overhead, within the vector memory that XLA gives a kernel by default.
    ("tpu", "interpret", "forward"): {256: (32, 64, 2, 0)},
    ("tpu", "interpret", "dq"): {256: (32, 64, 2, 0)},
    ("tpu", "interpret", "dkv"): {256: (32, 64, 2, 0)},
    ("tpu", "TPU v5 lite", "forward"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v5 lite", "dq"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v5 lite", "dkv"): {128: (512, 1024, 2, 0), 256: (512, 512, 2, 0)},
    ("tpu", "TPU v6 lite", "forward"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    ("tpu", "TPU v6 lite", "dq"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    ("tpu", "TPU v6 lite", "dkv"): {128: (1024, 1024, 2, 0), 256: (512, 1024, 2, 0)},
    # A product takes six passes: smaller blocks.
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
    """Give the sizes for the smallest head_dim of the table that is not below the row's."""
    fitting = (x for x in TABLE if x._replace(head_dim=row.head_dim) == row)
    return TABLE[min((x for x in fitting if x.head_dim >= row.head_dim), key=lambda x: x.head_dim)]
