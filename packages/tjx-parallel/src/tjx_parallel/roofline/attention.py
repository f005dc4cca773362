"""FLOPs and rates of attention kernels, which are opaque custom calls in HLO.

A forward pass takes 4 FLOPs per unmasked query-key pair and feature of a head, a backward pass 2.5
times as many. Rates are public measurements (tokamax and FlashAttention-3 on an
H100 SXM, bf16, causal, 16k tokens, heads * features 2048), as shares of that chip's peak.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from tjx_parallel.planning.hlo import Array, Computation, Instruction
from tjx_parallel.roofline.regions import SCOPES, region_of

_BACKWARD = 2.5
_PEAK = 989  # TFLOP/s of an H100 SXM

# (features of a head, tokens) -> TFLOP/s.
_Rates = Mapping[tuple[int, int], float]


class _Anchors(NamedTuple):
    forward: _Rates
    backward: _Rates
    note: str


def _rates(*values: int) -> _Rates:
    keys = [(features, length) for features in (64, 128) for length in (1024, 4096, 16384)]
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


_CUDNN = _rates(311, 468, 538, 448, 595, 645)
_ANCHORS = {
    "cudnn": _Anchors(
        _CUDNN,
        # FlashAttention-3 at 16k tokens: 474 and 561 where cuDNN's forward pass has 538 and 645.
        {key: 0.87 * rate for key, rate in _CUDNN.items()},
        "backward taken as 0.87 of forward, the ratio of FlashAttention-3's to cuDNN's at 16k",
    ),
    "mosaic": _Anchors(
        _rates(272, 413, 502, 388, 568, 636), _rates(209, 286, 334, 288, 408, 452),
        "measured with tokamax's kernels, not with these",
    ),
    "triton": _Anchors(
        _rates(218, 280, 278, 258, 344, 361), _rates(190, 234, 257, 228, 314, 338),
        "measured with tokamax's kernels, not with these",
    ),
}  # fmt: skip
_TARGETS = {
    "__cudnn$fmha": "cudnn", "mosaic_gpu": "mosaic", "__gpu$xla.gpu.triton": "triton",
    "tpu_custom_call": "tpu",
}  # fmt: skip


class AttentionWork(NamedTuple):
    """FLOPs and assumed rate of an attention kernel.

    Attributes
    ----------
    implementation
        "cudnn", "mosaic", "triton" or "tpu".
    flops
        FLOPs per run, by formula.
    share
        Assumed share of the chip's peak; None without a published figure.
    note
        Source of the share.
    """

    implementation: str
    flops: float
    share: float | None
    note: str


def attention_call(
    each: Instruction, inside: Computation, *, visible: float
) -> AttentionWork | None:
    """Return the work of an attention kernel; None for any other instruction.

    Operands are [batch, tokens, heads, features]: queries, keys and others, after scalars. A kernel
    in the scope "attention" whose results are none of their gradients, such as a row sum, does not
    count as attention.

    Parameters
    ----------
    each
        The instruction.
    inside
        The computation that it is in.
    visible
        Share of unmasked query-key pairs.
    """
    target = each.attribute(r'custom_call_target="([^"]*)"')
    names = [name for start, name in _TARGETS.items() if target.startswith(start)]
    region = region_of(each.op_name)
    if each.kind != "custom-call" or not names or region.name != SCOPES["attention"]:
        return None
    operands = [x for name in each.operands if name in inside for x in inside[name].results()]
    given = [x for x in operands if len(x.shape) == 4]
    if len(given) < 3:
        return None
    query, key = given[:2]
    flops = 4.0 * query.size * key.shape[1] * visible
    backward = "Backward" in target or (
        region.phase == "backward" and "rematted_computation" not in each.op_name
    )
    if backward:
        # The gradients of queries, keys and values may come from one kernel or from several.
        flops *= _BACKWARD * min(_count_gradients(each.results(), query, key), 3) / 3
    if not flops:
        return None
    share, note = _share(names[0], query.shape[3], key.shape[1], backward=backward)
    return AttentionWork(names[0], flops, share, note)


def _count_gradients(results: list[Array], query: Array, key: Array) -> int:
    return sum(len(x.shape) == 4 and x.size in (query.size, key.size) for x in results)


def _share(
    implementation: str, features: int, length: int, *, backward: bool
) -> tuple[float | None, str]:
    """Interpolate the anchor rates in log(length); constant beyond the last ones."""
    anchors = _ANCHORS.get(implementation)
    if anchors is None:
        return None, "no public figure: the rate of other products is taken"
    rates = anchors.backward if backward else anchors.forward
    width = 64 if features < 96 else 128
    known = sorted((tokens, rate) for (size, tokens), rate in rates.items() if size == width)
    place = min(max(math.log(max(length, 1) / 1024, 4), 0), len(known) - 1)
    low = min(int(place), len(known) - 2)
    rate = known[low][1] + (place - low) * (known[low + 1][1] - known[low][1])
    return rate / _PEAK, anchors.note
