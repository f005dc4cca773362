"""Plans against hand calculations: memory, seconds, bounds, scaling."""

from dataclasses import replace

import pytest

from tjx_parallel.planning.chips import CHIPS, find_chip
from tjx_parallel.planning.collectives import Collective
from tjx_parallel.planning.step_time import ComputeTime, Plan, StepProfile, plan, scale_step

ONE = {"stage": 1, "data": 1, "fsdp": 1, "context": 1, "expert": 1, "tensor": 1}
GIB = 2**30
MEDIUM = 354_823_168  # parameters of GPT-2 medium
H100 = CHIPS["h100"]


def step_of(parameters: int, *, temporaries: int = 0, **sizes: int) -> StepProfile:
    """Return a step in which Adam keeps two numbers for each parameter, in 256 rows of 1,024."""
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    return StepProfile(
        mesh_shape={**ONE, **sizes},
        parameters=4 * parameters // parts,
        optimizer=8 * parameters // parts,
        batch=0,
        temporaries=temporaries,
        gradients=4 * parameters // parts,
        flops=6.0 * parameters * 256 * 1024,
        tokens=256 * 1024,
        sequences=256,
    )


def exchange(kind: str, payload: int, *axes: str, size: int, runs: int = 1) -> Collective:
    return Collective(kind=kind, axes=axes, group_size=size, payload=payload, runs=runs)


def seconds_of(each: Collective, chip: str = "h100", **sizes: int) -> float:
    step = replace(step_of(MEDIUM, **sizes), exchanges=(each,))
    (sent,) = plan(step, CHIPS[chip]).communication.values()
    return sent.seconds


def test_chip_figures_are_plausible() -> None:
    assert set(CHIPS) == {"a100", "h100", "h200", "b200", "v5e", "v5p", "v6e"}
    for chip in CHIPS.values():
        assert 10e9 < chip.capacity <= chip.memory < 200e9
        assert 100 < chip.flops / chip.memory_bandwidth < 600  # FLOPs for each byte from memory
        assert chip.slow_bandwidth < chip.fast_bandwidth < chip.memory_bandwidth
        assert chip.fast_size in (8, 256, 8960)
        assert "NVIDIA" in chip.source or "Google" in chip.source
        # Unrounded float32 is slowest, 8-bit floats are fastest.
        rates = [chip.product_flops(name, exact=True) for name in ("f32", "bf16", "f8e4m3fn")]
        assert rates == sorted(rates)
        assert rates[0] < chip.product_flops("f32") <= chip.flops
        assert 0.3 < chip.efficiency < 0.7
        assert chip.efficiency_source
    assert find_chip("H100") is H100
    with pytest.raises(ValueError, match=r"got 'h1000'; .* a100, .*; did you mean h100\?"):
        find_chip("h1000")


def test_data_parallel_matches_hand_calculation() -> None:
    # Each of 8 GPUs sends 2 x 7/8 of 4 bytes a parameter over NVLink, at 450 GB/s.
    gradients = exchange("all-reduce", 4 * MEDIUM, "data", size=8)
    found = plan(replace(step_of(MEDIUM, data=8), exchanges=(gradients,)), H100)
    sent = 2 * 7 / 8 * 4 * MEDIUM
    assert found.communication["all-reduce", ("data",)] == pytest.approx((sent, sent / 450e9))
    # 6 FLOPs for each parameter and token; the state, 12 bytes each, is read and written.
    # An H100 is taken to reach the share of its peak that llm.c was measured at.
    computing = 6 * MEDIUM * 32 * 1024 / (0.41 * 989e12) + 2 * 12 * MEDIUM / 3.35e12
    assert found.compute == pytest.approx(computing)
    slow, fast = computing + sent / 450e9, computing
    assert found.seconds == pytest.approx((slow, fast))
    assert found.efficiency == pytest.approx((computing / slow, 1.0))
    assert found.tokens_per_second == pytest.approx((256 * 1024 / slow, 256 * 1024 / fast))
    assert found.efficiency[0] > 0.9  # the goal of 1 to 8 H100


def test_faster_compute_lowers_efficiency() -> None:
    gradients = exchange("all-reduce", 4 * MEDIUM, "data", size=8)
    step = replace(step_of(MEDIUM, data=8), exchanges=(gradients,))
    half, all_of_it = (plan(step, H100, compute_efficiency=share) for share in (0.5, 1.0))
    assert all_of_it.seconds[0] < half.seconds[0]
    assert all_of_it.efficiency[0] < half.efficiency[0]
    with pytest.raises(ValueError, match=r"compute_efficiency: got 1\.5; expected a share"):
        plan(step, H100, compute_efficiency=1.5)


def test_compiled_program_takes_precedence_over_the_formula() -> None:
    step = replace(step_of(MEDIUM, data=8), compute_time=ComputeTime(0.030, 0.002))
    found = plan(step, H100)
    assert (found.compute, found.compute_efficiency) == (0.032, None)
    given = plan(step, H100, compute_efficiency=0.41)  # what is given comes before both
    assert given.compute == plan(replace(step, compute_time=None), H100).compute
    # Twice the devices have half the rows each, and the same state.
    assert on(step, 16, strong=True).compute == pytest.approx(0.015 + 0.002)
    assert on(step, 16, strong=False).compute == pytest.approx(0.032)


def test_pipeline_bubble_adds_time() -> None:
    # 4 stages and 12 microbatches: 3 of 15 turns are lost.
    found = plan(replace(step_of(MEDIUM, stage=4), bubble=3 / 15), H100)
    assert found.efficiency == pytest.approx((0.8, 0.8))


def test_an_axis_beyond_the_fast_domain_uses_slow_links() -> None:
    inside = exchange("all-gather", GIB, "tensor", size=8)
    assert seconds_of(inside, tensor=8) == pytest.approx(7 / 8 * GIB / 450e9)
    # With 8 tensor devices in each node, every member of data is in a node of its own.
    beyond = exchange("all-reduce", GIB, "data", size=4)
    assert seconds_of(beyond, data=4, tensor=8) == pytest.approx(2 * 3 / 4 * GIB / 50e9)
    # Of 32 along fsdp 8 are in each node: 4 nodes exchange over 8 slow links side by side.
    both = exchange("reduce-scatter", GIB, "fsdp", size=32)
    by_hand = 3 / 4 * GIB / 8 / 50e9 + 7 / 8 * GIB / 450e9
    assert seconds_of(both, fsdp=32) == pytest.approx(by_hand)
    # A pod joins 256 TPUs: nothing leaves it.
    assert seconds_of(both, "v5e", fsdp=32) == pytest.approx(31 / 32 * GIB / 100e9)
    # Of what is exchanged with 15 others, 8 are in the other node; of a ring one message is.
    swap = exchange("all-to-all", GIB, "context", size=16)
    assert seconds_of(swap, context=16) == pytest.approx(GIB / 2 / 50e9 + 7 / 16 * GIB / 450e9)
    ring = exchange("collective-permute", GIB, "context", size=16, runs=3)
    assert seconds_of(ring, context=16) == pytest.approx(3 * GIB / 50e9)


# Bytes by formula: 4 a parameter, 8 for Adam, 4 for a gradient; activations as said.
LLAMA_8B, LLAMA_70B = 8_030_261_248, 70_553_706_496


@pytest.mark.parametrize(
    ("chip", "parameters", "activations", "sizes", "fits"),
    [
        ("h100", LLAMA_8B, 0, {}, False),  # 96 GB of state alone
        ("h100", LLAMA_8B, 10 * GIB, {"fsdp": 8}, True),  # 16 GB and 11
        ("h100", LLAMA_70B, 0, {"fsdp": 8}, False),  # 106 GB of state each
        ("h100", LLAMA_70B, 10 * GIB, {"fsdp": 8, "tensor": 8}, True),  # 18 GB and 11
        # GPT-2 XL in fp32 has 24 GB of state; 48 layers keep at least 34 d numbers a token, d 1600.
        ("a100", 1_557_611_200, 8 * 1024 * 48 * 34 * 1600 * 4, {}, False),
        ("a100", 1_557_611_200, 1 * 1024 * 48 * 34 * 1600 * 4, {}, True),
    ],
)
def test_known_cases(
    chip: str, parameters: int, activations: int, sizes: dict[str, int], fits: bool
) -> None:
    gradients = step_of(parameters, **sizes).gradients
    found = plan(step_of(parameters, temporaries=activations + gradients, **sizes), CHIPS[chip])
    assert found.fits is fits


def on(step: StepProfile, devices: int, *, strong: bool) -> Plan:
    other = scale_step(step, devices, strong=strong)
    assert other is not None
    return plan(other, H100)


def test_scaling_from_one_device_adds_the_gradient_all_reduce() -> None:
    gradients = exchange("all-reduce", 4 * MEDIUM, "data", size=8)
    planned = replace(step_of(MEDIUM, data=8), exchanges=(gradients,))
    alone = on(planned, 1, strong=False)
    assert not alone.communication
    assert alone.efficiency == (1.0, 1.0)
    assert alone.step.tokens == planned.tokens / 8
    # Planned on one device, what 8 send is not in the program: the formula has it.
    for strong in (False, True):
        extrapolated = on(step_of(MEDIUM), 8, strong=strong)
        assert extrapolated.communication == plan(planned, H100).communication
    weak, strong_one = (on(planned, 64, strong=strong) for strong in (False, True))
    assert weak.compute > 7 * strong_one.compute
    assert weak.efficiency[0] > strong_one.efficiency[0]
    assert (weak.step.sequences, strong_one.step.sequences) == (2048, 256)
    assert scale_step(planned, 512, strong=True) is None  # fewer sequences than devices


def test_fewer_devices_than_planned_hold_more_of_the_state() -> None:
    planned = step_of(LLAMA_8B, fsdp=8)
    assert [on(planned, n, strong=False).fits for n in (1, 2, 4, 8, 16)] == [
        False, True, True, True, True,
    ]  # fmt: skip
    assert on(planned, 2, strong=False).step.parameters == 4 * planned.parameters
    assert on(planned, 16, strong=False).step.parameters == planned.parameters


def test_strong_scaling_reduces_the_microbatches() -> None:
    weights = exchange("all-gather", GIB, "fsdp", size=8, runs=16)
    activations = exchange("all-reduce", GIB, "tensor", size=2, runs=16)
    step = replace(
        step_of(MEDIUM, fsdp=8, tensor=2), microbatches=16, exchanges=(weights, activations)
    )
    half = on(step, 32, strong=True)
    before = plan(step, H100)
    for key in before.communication:
        assert half.communication[key].bytes == pytest.approx(before.communication[key].bytes / 2)
    # Beyond one microbatch the weights are gathered as often, and the activations still shrink.
    few = on(replace(step, microbatches=1), 32, strong=True)
    weights_key, activations_key = before.communication
    assert few.communication[weights_key].bytes == before.communication[weights_key].bytes
    ratio = few.communication[activations_key].bytes / before.communication[activations_key].bytes
    assert ratio == pytest.approx(0.5)
