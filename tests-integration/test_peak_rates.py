"""Peak FLOP rates: planner and metrics agree, with JAX's device names."""

import pytest
from jax._src import tpu_info

from tjx_metrics.performance.peak_rates import PEAK_RATES
from tjx_parallel.planning.chips import CHIPS

# Chip of the planner -> JAX device kind.
KINDS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}


def test_planner_and_metrics_have_the_same_peak_rates() -> None:
    assert set(KINDS) == set(CHIPS)
    for name, kind in KINDS.items():
        # The planner rounds to whole TFLOP/s.
        assert PEAK_RATES[kind].bfloat16 == pytest.approx(CHIPS[name].flops, rel=1e-3), name


def test_jax_has_these_tpu_device_kinds() -> None:
    for kind in PEAK_RATES:
        if kind.startswith("TPU"):
            assert tpu_info.chip_version_from_device_kind(kind) is not None, kind
