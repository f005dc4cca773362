"""Attention benchmark: figures computed from measurements, and worker processes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_cases import (
    PASSES,
    Case,
    cases,
    errors,
    gpt2_medium,
    iterations,
    oracle,
    small_inputs,
)
from attention_report import Spread, best, clock, cpu_goals, gpu_goals, seconds, spread, table
from attention_worker import Worker, WorkerError

GIB = 2**30


def entry(name: str, ms: float, *, temp: int = GIB, clock_name: str = "host") -> dict[str, Any]:
    """An entry whose forward pass takes `ms`, backward 2.5 times and both 3.5 times that."""
    factors = {"forward": 1.0, "backward": 2.5, "both": 3.5}
    times = {
        which: [
            {"host": 2 * ms / 1e3 * factor * noise, "cpu": 1.0}
            | {clock_name: ms / 1e3 * factor * noise}
            for noise in (1.0, 0.9, 1.3)
        ]
        for which, factor in factors.items()
    }
    relative = {f"{x}_relative": 1e-3 for x in ("out", "dq", "dk", "dv")}
    return {
        "name": name,
        "skipped": None,
        "temp_bytes": dict.fromkeys(PASSES, temp),
        "errors": relative,
        "times": times,
    }


def record(case: Case, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"case": vars(case), "rounds": 3, "load_average": 0.0, "entries": [*entries]}


def test_flops_are_counted_as_in_the_flash_attention_papers() -> None:
    # Shah et al., "FlashAttention-3", 2024: 4 * T^2 * D * heads, halved when causal.
    case = Case(
        group="", batch=2, length=1024, heads=16, head_dim=128, dtype="bfloat16", causal=False
    )
    assert case.flops("forward") == 4 * 2 * 16 * 1024**2 * 128
    assert case.flops("backward") == 2.5 * case.flops("forward")
    assert case.flops("both") == case.flops("forward") + case.flops("backward")
    causal = Case(**{**vars(case), "causal": True})
    assert causal.flops("both") == case.flops("both") / 2


def test_gpu_cases_have_equal_work() -> None:
    sweep = [case for case in cases("gpu") if case != gpt2_medium()]
    assert {case.batch * case.length for case in sweep} == {2**14}
    assert {case.heads * case.head_dim for case in sweep} == {2048}
    assert {(case.head_dim, case.length) for case in sweep} == {
        (d, 1024 * 2**i) for d in (64, 128) for i in range(5)
    }


def test_iterations_fill_the_time() -> None:
    assert [iterations(t, 0.5) for t in (10.0, 0.5, 0.1, 0.06, 1e-9, 0.0)] == [1, 1, 5, 9, 20, 20]


@pytest.mark.parametrize("causal", [True, False])
def test_reference_gradients_are_its_derivatives(causal: bool) -> None:
    case = Case(
        group="", batch=1, length=5, heads=2, head_dim=3, dtype="float32", causal=causal
    ).small()
    assert case.length == 5
    q, k, v, dout = (np.asarray(x, np.float64) for x in small_inputs(case))
    _, *gradients = oracle(case, q, k, v, dout)
    direction = np.random.default_rng(1).standard_normal((3, *q.shape))
    for i, gradient in enumerate(gradients):
        step = np.zeros_like(direction)
        step[i] = 1e-6 * direction[i]
        above, below = (
            np.sum(oracle(case, q + d[0], k + d[1], v + d[2], dout)[0] * dout)
            for d in (step, -step)
        )
        assert (above - below) / 2e-6 == pytest.approx(np.sum(gradient * direction[i]), rel=1e-6)


def test_errors_are_relative_to_the_reference() -> None:
    right = tuple(np.full((2, 2), 2.0) for _ in range(4))
    found = (right[0] * 1.01, *right[1:])
    compared = errors(found, right)
    assert compared["out_relative"] == pytest.approx(0.01)
    assert compared["out_largest"] == pytest.approx(0.02)
    assert compared["dv_relative"] == 0


def test_spread_is_of_the_rounds() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(median=2.5, least=1.0, most=10.0)


def test_device_clock_is_used_only_if_every_round_has_it() -> None:
    whole = entry("tjx/triton", 1.0, clock_name="device")
    assert clock(whole) == "device"
    assert seconds(whole, "forward").median == pytest.approx(1e-3)
    whole["times"]["both"][1]["device"] = None
    assert clock(whole) == "host"
    assert seconds(whole, "forward").median == pytest.approx(2e-3)


def test_best_peer_has_the_lowest_median() -> None:
    case = gpt2_medium()
    one = record(case, entry("torch/math", 3.0), entry("torch/flash", 2.0), entry("tjx/xla", 1.0))
    one["entries"].append({"name": "torch/cudnn", "skipped": "failed", "times": None})
    assert best(one, "forward", lambda name: name.startswith("torch/")) == ("torch/flash", 2e-3)


def cpu_records(ratio_512: float, ratio_8192: float, memory: int) -> list[dict[str, Any]]:
    """Cases where ours takes `ratio` times dense attention's time."""
    return [
        record(
            case,
            entry("tjx/xla", 10 * (ratio_512 if case.length == 512 else ratio_8192), temp=GIB),
            entry("jax.nn/xla", 10, temp=memory * GIB),
        )
        for case in cases("cpu")
    ]


def test_cpu_goals() -> None:
    verdicts = [
        [goal.verdict for goal in cpu_goals(cpu_records(*numbers))]
        for numbers in ((1.09, 0.99, 16), (1.11, 0.99, 16), (1.0, 1.01, 16), (1.0, 0.99, 15))
    ]
    assert verdicts == [
        ["reached", "reached", "reached"],
        ["reached", "reached", "missed"],
        ["reached", "missed", "reached"],
        ["missed", "reached", "reached"],
    ]


def test_goal_is_judged_by_its_worst_case() -> None:
    records = cpu_records(1.0, 0.5, 16)
    worst = next(r for r in records if r["case"]["length"] == 8192 and not r["case"]["causal"])
    worst["entries"][0] = entry("tjx/xla", 20)
    speed = cpu_goals(records)[1]
    assert speed.verdict == "missed"
    assert speed.value == pytest.approx(0.5)
    assert "full" in speed.where


def test_goal_with_a_missing_case_or_entry_is_not_reached() -> None:
    records = cpu_records(1.0, 0.5, 16)
    assert {goal.verdict for goal in cpu_goals([])} == {"not measured"}
    records[1]["entries"].pop()
    assert [goal.verdict for goal in cpu_goals(records)].count("not measured") == 2
    assert "an entry is missing" in cpu_goals(records)[0].line()


def gpu_records(
    forward_ms: float, kernel: str = "tjx/mosaic_gpu", memory: int = 2
) -> list[dict[str, Any]]:
    """Peers take 10 ms, dense attention 25.7 ms."""
    return [
        record(
            case,
            entry(kernel, forward_ms, clock_name="device"),
            entry("tjx/cudnn", 1.0, clock_name="device"),
            *(entry(n, 10.0, clock_name="device") for n in ("jax.nn/cudnn", "torch/flash")),
            entry("jax.nn/xla", 25.7, temp=memory * GIB, clock_name="device"),
        )
        for case in cases("gpu")
    ]


def test_gpu_goals() -> None:
    def verdicts(records: list[dict[str, Any]]) -> list[str]:
        return [goal.verdict for goal in gpu_goals(records)]

    # 10 ms is 27 TFLOP/s at T 8k: only the goal of 430 TFLOP/s is out of reach.
    equal = verdicts(gpu_records(10.0))
    assert equal == ["reached"] * 4 + ["missed"] + ["reached"] * 2
    at_8k = Case(**gpu_records(1.0)[3]["case"])
    assert (at_8k.head_dim, at_8k.length) == (128, 8192)
    just = at_8k.flops("backward") / 430e12 * 1e3 / 2.5
    assert verdicts(gpu_records(just * 0.999)) == ["reached"] * 7
    slower = verdicts(gpu_records(10.8))  # 93 %
    assert slower == ["missed", "reached", "missed", "reached", "missed", "missed", "reached"]
    assert verdicts(gpu_records(10.0, memory=1))[-1] == "missed"


def test_wrapping_the_peer_reaches_no_goal() -> None:
    goals = gpu_goals(gpu_records(1.0, kernel="tjx/xla"))
    assert {goal.verdict for goal in goals} == {"not measured"}


def test_table_names_skipped_entries() -> None:
    one = record(gpt2_medium(), entry("tjx/triton", 2.0), entry("torch/flash", 1.0))
    one["entries"].append({"name": "torch/cudnn", "skipped": "failed: no such kernel"})
    lines = list(table(one))
    row = next(line for line in lines if "tjx/triton" in line and "forward" in line)
    assert row.split()[-4:] == ["0.50", "1024.0", "1000.00", "1.0e-03"]
    assert "torch/cudnn         skipped: failed: no such kernel" in lines[-1]


WORKER = """
import os, sys, time
from attention_worker import serve

class Fake:
    def __init__(self): print("noise of a library")
    def describe(self): print("more noise"); return {"pid": os.getpid()}
    def prepare(self, case, exclude, progress):
        for name in ("a", "b"):
            if name not in exclude:
                progress(name)
                if name == case.group: sys.exit("the reason")
                if case.group == "hang": time.sleep(60)
        return [{"name": name, "skipped": exclude.get(name)} for name in ("a", "b")]
    def measure(self, seconds, progress): return {}
    def release(self): pass

serve(Fake)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    script = tmp_path / "fake.py"
    script.write_text(WORKER)
    environment = {"PYTHONPATH": ":".join(sys.path)}
    made = Worker([sys.executable, str(script)], environment, patience=20)
    yield made
    made.stop()


def test_worker_answers_despite_other_output(worker: Worker) -> None:
    assert worker.describe() == worker.describe()
    assert worker.prepare(gpt2_medium(), {}) == [
        {"name": "a", "skipped": None},
        {"name": "b", "skipped": None},
    ]


def test_dead_worker_names_its_case_and_restarts(worker: Worker) -> None:
    pid = worker.describe()
    case = Case(**{**vars(gpt2_medium()), "group": "b"})
    with pytest.raises(WorkerError, match=r"status 1: the reason") as caught:
        worker.prepare(case, {})
    assert caught.value.entry == "b"
    assert worker.prepare(case, {"b": "it died"})[1]["skipped"] == "it died"
    assert worker.describe() != pid


def test_hanging_worker_is_killed(worker: Worker) -> None:
    worker.describe()
    worker._patience = 0.5
    with pytest.raises(WorkerError, match="gave no output") as caught:
        worker.prepare(Case(**{**vars(gpt2_medium()), "group": "hang"}), {})
    assert caught.value.entry == "a"
