"""Assumed shares of a chip's peak rates, with their sources."""

import math
from typing import NamedTuple

from tjx_parallel.planning.chips import Chip


class Assumptions(NamedTuple):
    """Assumptions of a roofline estimate besides the chip's peak rates.

    Attributes
    ----------
    product_share
        Share of the peak FLOP/s that matrix products sustain.
    bandwidth_share
        Share of the peak memory bandwidth that kernels sustain.
    launch_seconds
        Seconds between the end of a kernel and the start of the next.
    attention_visible
        Share of unmasked query-key pairs in attention kernels.
    source
        Source of the shares.
    integer_share
        Share of the chip's rate of integer operations that elementwise kernels sustain.
    """

    product_share: float
    bandwidth_share: float
    launch_seconds: float
    attention_visible: float
    source: str
    integer_share: float = 0.8

    def lines(self, chip: Chip) -> list[str]:
        """Describe the assumptions, a line each."""
        products = ", ".join(
            f"{name} {chip.product_flops(dtype, exact=exact) * self.product_share / 1e12:,.0f}"
            for name, dtype, exact in _SHOWN
        )
        return [
            f"matrix products sustain {self.product_share:.0%} of the peak: {products} TFLOP/s",
            f"kernels sustain {self.bandwidth_share:.0%} of the memory bandwidth: "
            f"{chip.memory_bandwidth * self.bandwidth_share / 1e12:.2f} TB/s",
            *self._integers(chip),
            f"each kernel takes max(operations / rate, bytes / bandwidth) + "
            f"{self.launch_seconds * 1e6:.1f} us; no operand stays in a cache",
            f"attention masks show {self.attention_visible:.1%} of the pairs of query and key",
            f"source: {self.source}",
        ]

    def _integers(self, chip: Chip) -> list[str]:
        if math.isinf(chip.integer_ops):
            return ["operations on integers, as of random bits, hide behind the memory traffic"]
        rate = chip.integer_ops * self.integer_share / 1e12
        return [f"operations on integers, as of random bits, sustain {rate:.1f} T/s"]


_SHOWN = (("bf16", "bf16", False), ("fp8", "f8e4m3fn", False), ("rounded float32", "f32", False),
          ("exact float32", "f32", True))  # fmt: skip

_BY_PLATFORM = {
    "cuda": Assumptions(
        0.61, 0.83, 1.5e-6, 0.5,
        "assumed, not measured on these shapes; large square bf16 products were measured at 80% of "
        "an H200's peak, large copies at 90% of its bandwidth",
    ),
    "tpu": Assumptions(
        0.75, 0.83, 0.0, 0.5,
        "assumed, not measured; whole steps of MaxText reach 67% of a v5e's peak",
    ),
}  # fmt: skip


def assumptions_for(chip: Chip, *, attention_visible: float = 0.5) -> Assumptions:
    """Return the assumed shares of peak rates for a chip.

    Parameters
    ----------
    chip
        The accelerator.
    attention_visible
        Share of unmasked query-key pairs: 0.5 is causal, 1 no mask.

    Raises
    ------
    ValueError
        If the share is not in (0, 1].
    """
    if not 0 < attention_visible <= 1:
        raise ValueError(
            f"attention_visible: got {attention_visible}; expected a share in (0, 1]; give 0.5 for "
            "causal attention"
        )
    return _BY_PLATFORM[chip.platform]._replace(attention_visible=attention_visible)
