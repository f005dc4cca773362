"""Published figures of accelerators: memory, FLOP/s, bandwidths. No JAX."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tjx_core import did_you_mean

_GB, _GIB = 10**9, 2**30


class Chip(NamedTuple):
    """Peak rates and memory of an accelerator.

    Attributes
    ----------
    name
        Name in commands and flags.
    platform
        Platform of its compiler: cuda or tpu.
    memory
        Bytes: a GPU's GB as 10**9; for a TPU what libtpu 0.0.51 can allocate.
    usable
        Share of the memory that JAX allocates: 0.75 on GPUs unless XLA_CLIENT_MEM_FRACTION is set
        (docs.jax.dev, "GPU memory allocation").
    flops
        bf16 FLOP/s of matrix products, without sparsity.
    memory_bandwidth
        Bytes/s.
    fast_bandwidth
        Bytes/s sent along one axis of a mesh in the fast domain: NVLink in one direction; of a
        TPU's torus (ICI) the links of one dimension, as an axis may lie along one only.
    fast_size
        Chips in a fast domain: a DGX or a TPU pod.
    slow_bandwidth
        Bytes/s sent per chip beyond it: InfiniBand, or its share of a pod's network (DCN).
    source
        Source of the figures.
    float32_flops
        FLOP/s of products of float32 numbers that are not rounded: on a GPU without tensor cores
        (its datasheet), on a TPU in six passes of bf16.
    float8_flops
        FLOP/s of matrix products of 8-bit floats; that of bf16 where the chip has no faster one.
    integer_ops
        Elementwise operations/s on 32-bit integers, as of random bits: of a GPU those of its cores
        (CUDA C++ Programming Guide, throughput of arithmetic instructions: 64 a clock and
        multiprocessor, on Blackwell 128); infinite without a published figure.
    efficiency
        Share of `flops` that a published training run reached; formulas use it without a compiled
        program.
    efficiency_source
        Source of `efficiency`.
    """

    name: str
    platform: str
    memory: int
    usable: float
    flops: float
    memory_bandwidth: float
    fast_bandwidth: float
    fast_size: int
    slow_bandwidth: float
    source: str
    float32_flops: float
    float8_flops: float
    integer_ops: float
    efficiency: float
    efficiency_source: str

    @property
    def capacity(self) -> int:
        """Bytes available to a program."""
        return int(self.memory * self.usable)

    def product_flops(self, dtype: str, *, exact: bool = False) -> float:
        """Return the peak FLOP/s of matrix products of a dtype, without sparsity.

        Parameters
        ----------
        dtype
            HLO's name of the operands' type. By default JAX rounds float32 to TF32 on GPUs, at half
            the rate of bf16, and to bf16 on TPUs.
        exact
            Whether float32 is not rounded (``jax.default_matmul_precision("highest")``).

        Returns
        -------
        float
            FLOP/s.
        """
        if dtype.startswith(("f8", "s8", "u8")):
            return self.float8_flops
        if dtype in ("f32", "f64"):
            rounded = self.flops / 2 if self.platform == "cuda" else self.flops
            return self.float32_flops if exact or dtype == "f64" else rounded  # f64: at most
        return self.flops


# (6 N + 12 layers * tokens * width) FLOPs a token, as of PaLM, by the peak of the chip.
_A100_STEP = (0.50, "nanoGPT with torch.compile, GPT-2 124M, A100: 182k tokens/s")
_H100_STEP = (0.41, "llm.c, GPT-2 124M, 8 H100: 475k tokens/s each")
_B200_STEP = (0.41, "that of an H100 (llm.c, GPT-2 124M); no figure of a B200 is at hand")
_V5E_STEP = (0.61, "MaxText, 16B parameters, 256 v5e: 120 TFLOP/s each")
_OTHER_TPU_STEP = (0.61, "that of a v5e (MaxText, 16B parameters)")

CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in (
    Chip("a100", "cuda", 80 * _GB, 0.75, 312e12, 2.039e12, 600e9 / 2, 8, 200e9 / 8,
         "NVIDIA A100 (SXM, 80 GB) datasheet; DGX A100: a ConnectX-6 of 200 Gb/s for each GPU",
         19.5e12, 312e12, 19.5e12 / 2, *_A100_STEP),
    Chip("h100", "cuda", 80 * _GB, 0.75, 989e12, 3.35e12, 900e9 / 2, 8, 400e9 / 8,
         "NVIDIA H100 (SXM) datasheet; DGX H100: a ConnectX-7 of 400 Gb/s for each GPU",
         67e12, 1979e12, 67e12 / 4, *_H100_STEP),
    Chip("h200", "cuda", 141 * _GB, 0.75, 989e12, 4.8e12, 900e9 / 2, 8, 400e9 / 8,
         "NVIDIA H200 (SXM) datasheet; DGX H200: a ConnectX-7 of 400 Gb/s for each GPU",
         67e12, 1979e12, 67e12 / 4, *_H100_STEP),
    Chip("b200", "cuda", 180 * _GB, 0.75, 2250e12, 8e12, 1800e9 / 2, 8, 400e9 / 8,
         "NVIDIA HGX B200 datasheet; DGX B200: a ConnectX-7 of 400 Gb/s for each GPU",
         75e12, 4500e12, 75e12 / 2, *_B200_STEP),
    Chip("v5e", "tpu", int(15.75 * _GIB), 1.0, 197e12, 819e9, 400e9 / 2 / 2, 256, 25e9 / 8,
         "Google Cloud's page of TPU v5e: ICI 400 GB/s both ways, 2D torus, DCN 6.4 Tb/s a pod",
         197e12 / 6, 197e12, math.inf, *_V5E_STEP),
    Chip("v5p", "tpu", int(95.73 * _GIB), 1.0, 459e12, 2.765e12, 1200e9 / 2 / 3, 8960, 50e9 / 8,
         "Google Cloud's page of TPU v5p: ICI 1200 GB/s both ways, 3D torus, DCN 50 Gb/s a chip",
         459e12 / 6, 459e12, math.inf, *_OTHER_TPU_STEP),
    Chip("v6e", "tpu", int(31.24 * _GIB), 1.0, 918e12, 1.6e12, 800e9 / 2 / 2, 256, 100e9 / 8,
         "Google Cloud's page of TPU v6e: ICI 800 GB/s both ways, 2D torus, DCN 25.6 Tb/s a pod",
         918e12 / 6, 918e12, math.inf, *_OTHER_TPU_STEP),
)})  # fmt: skip
"""The chips by name."""


def find_chip(name: str) -> Chip:
    """Return the chip with a name; raise ValueError with the nearest name if there is none.

    Parameters
    ----------
    name
        Name in `CHIPS`, such as "h100".

    Returns
    -------
    Chip
        Peaks, memory and bandwidths of the chip.

    Raises
    ------
    ValueError
        If there is none, with the nearest name.
    """
    if (chip := CHIPS.get(name.lower())) is not None:
        return chip
    hint = did_you_mean(name.lower(), CHIPS, cutoff=0.4)
    raise ValueError(f"chip: got {name!r}; expected one of {', '.join(CHIPS)}{hint}")
