"""What the planner and the metrics say of a chip is the same, and about a device that JAX names."""

import pytest
from jax._src import tpu_info

from tjx_metrics.performance.peak_rates import PEAK_RATES
from tjx_parallel.planning.chips import CHIPS

# A chip of the planner -> the kind of its device, as JAX gives it.
KINDS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}


def test_every_chip_of_the_planner_has_the_rate_of_the_metrics() -> None:
    assert set(KINDS) == set(CHIPS)
    for name, kind in KINDS.items():
        # The planner's are whole teraflops.
        assert PEAK_RATES[kind].bfloat16 == pytest.approx(CHIPS[name].flops, rel=1e-3), name


def test_jax_knows_the_tpus_by_these_kinds() -> None:
    for kind in PEAK_RATES:
        if kind.startswith("TPU"):
            assert tpu_info.chip_version_from_device_kind(kind) is not None, kind
