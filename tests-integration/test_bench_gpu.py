"""GPU benchmark slices: dry run of the first, plans of all, and results after a crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu_slices import json_lines, requirements
from gpu_slices.plan import Plan, fastest
from gpu_slices.programs import Machine, Run
from gpu_slices.resume_check import differences
from gpu_slices.runner import Recorder, Stage, Step, run_stage
from gpu_slices.sizes import GPU

from tjx_kernels import backends
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_tree import leaves

ROOT = Path(gpu.__file__).resolve().parents[2]
# Absolute, since the processes start in other folders.
PYTHONPATH = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
KERNELS = dict.fromkeys(name for name in backends() if name not in ("tpu", "reference"))


def test_dry_run_of_the_first_slice_on_a_cpu(tmp_path: Path) -> None:
    # JAX's and XLA's: how tests compile quickly.
    names = [name for name in os.environ if name == "PATH" or name.startswith(("JAX_", "XLA_"))]
    kept = {name: os.environ[name] for name in names}
    done = subprocess.run(
        [sys.executable, gpu.__file__, "--rehearse", "--slice=1", f"--output={tmp_path / 'out'}"],
        env={**kept, "HOME": str(tmp_path), "PYTHONPATH": PYTHONPATH},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(files) == 3
    assert files[0].startswith("rehearsal-slice-1-")  # distinct from a GPU result
    assert files[1:] == ["slice-1.jsonl", "slice-1.tar.gz"]
    record = json.loads((tmp_path / "out" / files[0]).read_text())
    lines = (tmp_path / "out" / "slice-1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["cases"]
    assert record["versions"].keys() >= {"jax", "jaxlib", "flax", "optax"}

    by_step = {case["step"]: case for case in record["cases"]}
    assert {f"check-{name}" for name in KERNELS} < by_step.keys()
    for name in KERNELS:
        case = by_step[f"check-{name}"]
        if name == "cudnn":  # reported as skipped on a CPU
            assert case["status"] == "skipped"
            assert "not a Pallas kernel" in case["reason"]
        else:
            assert case["status"] == "ok"
            assert case["same_bits"]
            assert 0 < case["worst"] < 1e-2
    run = by_step["trainer-default"]
    assert run["tokens_per_sec"] > 0
    assert run["step_time"]["p10_ms"] <= run["step_time"]["p50_ms"] <= run["step_time"]["p99_ms"]
    assert len(run["operations"]) == 30
    assert "MFU" not in done.stdout  # the peak of a CPU is unknown


PROGRAM = """
import os, sys, time
from gpu_slices.json_lines import begin, finish
begin("first")
finish("first", "ok", speed=2.5)
print("CUDA_ERROR_ILLEGAL_ADDRESS")
{}
"""
CRASHES = "begin('second'); os.kill(os.getpid(), 11)"
HANGS = "begin('second'); time.sleep(60)"
STOPS = "begin('second')"
REPORTS = "begin('second'); finish('second', 'failed', reason='wrong')"


def test_failed_process_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    def step(name: str, body: str, seconds: float = 300.0, **options: Any) -> Step:
        command = [sys.executable, "-c", PROGRAM.format(body)]
        environment = {"PYTHONPATH": PYTHONPATH}
        return Step(name, command, seconds, environment, **options)

    steps = [
        step("crashes", CRASHES), step("hangs", HANGS, 5.0), step("stops", STOPS),
        step("reports", REPORTS), step("missing", "", skip="no GPU"),
        Step("silent", [sys.executable, "-c", ""], 300.0),
        Step("plain", [sys.executable, "-c", "print('tuned')"], 300.0, reports=False),
    ]  # fmt: skip
    recorder = Recorder(tmp_path / "lines.jsonl")
    deadline = time.monotonic() + 600
    stage = Stage("all", steps, 600.0, parallel=3)
    run_stage(stage, root=tmp_path, logs=tmp_path, recorder=recorder, deadline=deadline)
    late = Stage("late", [step("late", "")], 60.0)
    run_stage(late, root=tmp_path, logs=tmp_path, recorder=recorder, deadline=time.monotonic() + 1)
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines == recorder.cases
    found = {
        (line["step"], line["case"]): (line["status"], str(line.get("reason"))) for line in lines
    }
    for name in ("crashes", "hangs", "stops", "reports"):
        assert found.pop((name, "first"))[0] == "ok"
    expected = {
        ("crashes", "second"): ("failed", "status -11: CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("hangs", "second"): ("failed", "exceeded its limit of 5 s"),
        ("stops", "second"): ("failed", "ended before the case did"),
        ("reports", "second"): ("failed", "wrong"),
        ("missing", "missing"): ("skipped", "no GPU"),
        ("silent", "silent"): ("failed", "reported no case"),
        ("plain", "plain"): ("ok", "None"),
        ("late", "late"): ("failed", "no time left"),
    }
    assert found.keys() == expected.keys()
    for case, (status, reason) in expected.items():
        assert found[case][0] == status, case
        assert reason in found[case][1], case
    assert (tmp_path / "crashes.log").read_text().endswith("-- second\n")


TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no GPU")
def test_crashes(): import os; os.abort()
def test_is_lost(): pass
"""


def test_each_kernel_test_is_a_case(tmp_path: Path) -> None:
    (tmp_path / "test_kernels.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "gpu_slices.pytest_cases"]
    step = Step("tests", command, 300.0, {"PYTHONPATH": PYTHONPATH})
    recorder = Recorder(tmp_path / "lines.jsonl")
    deadline = time.monotonic() + 300
    stage = Stage("tests", [step], 300.0)
    run_stage(stage, root=tmp_path, logs=tmp_path, recorder=recorder, deadline=deadline)
    recorder.close()
    assert [(case["case"], case["status"]) for case in recorder.cases] == [
        ("test_passes", "ok"), ("test_fails", "failed"), ("test_skips", "skipped"),
        ("test_crashes", "failed"),
    ]  # fmt: skip
    assert "assert 1 == 2" in recorder.cases[1]["reason"]
    assert "no GPU" in recorder.cases[2]["reason"]
    assert "status -6" in recorder.cases[3]["reason"]


def test_other_output_is_not_parsed_as_a_case() -> None:
    for line in ("begin", '{"begin": ', '{"x": 1}', "{}", ""):
        assert json_lines.read(line) is None


def make_plan(tmp_path: Path, flags: list[str], winner: Run | None = None) -> Plan:
    here = Machine(
        implementations={**KERNELS, "mosaic_gpu": "needs an NVIDIA Hopper GPU (sm_90)"},
        trainer_flags=flags,
        peak_flops=989e12,
        torch_python="python3",
        processes=5,
    )
    return Plan(GPU, here, work=tmp_path, keep=tmp_path, winner=winner)


def test_every_gpu_run_has_valid_trainer_flags(tmp_path: Path) -> None:
    winner = Run("winner", ("--model.scan_layers=false",), 64, 40, "--xla_gpu_autotune_level=4")
    plan = make_plan(tmp_path, list(leaves()), winner)
    steps = [
        step for number in (1, 2, 3, 4) for stage in plan.slice(number) for step in stage.steps
    ]
    configs = {}
    for step in steps:
        if "gpu_slices.trainer_run" in step.command:
            words = step.command[step.command.index("--") + 1 :]
            varied = [w.removeprefix("--varied=") for w in step.command if "--varied=" in w]
            configs[step.name] = resolve([*words, *varied])
    assert configs["trainer-triton-unrolled"].model.attention_implementation == "triton"
    assert not configs["trainer-triton-unrolled"].model.scan_layers
    assert configs["trainer-cudnn-scan"].model.scan_layers
    assert not configs["trainer-repeat-1"].model.scan_layers
    assert not any("mosaic_gpu-" in name for name in configs)
    assert {step.name: step.skip for step in steps if step.skip} == {
        "trainer-mosaic_gpu": "needs an NVIDIA Hopper GPU (sm_90)"
    }
    repeat = next(step for step in steps if step.name == "trainer-repeat-1")
    assert "--batch=64" in repeat.command
    assert repeat.environment["XLA_FLAGS"] == "--xla_gpu_autotune_level=4"


def test_unknown_flag_skips_its_runs_by_name(tmp_path: Path) -> None:
    flags = [name for name in leaves() if name != "model.scan_layers"]
    steps = make_plan(tmp_path, flags).slice(2)[2].steps
    skipped = {step.name: step.skip for step in steps if step.name.endswith("-scan")}
    assert skipped == dict.fromkeys(
        ("trainer-triton-scan", "trainer-cudnn-scan"), "the trainer has no --model.scan_layers"
    )


def test_the_fastest_run_is_read_from_results(tmp_path: Path) -> None:
    def case(name: str, rate: float | None, step: str = "trainer-x") -> dict[str, Any]:
        return {
            "step": step, "case": name, "tokens_per_sec": rate, "varied": [f"--{name}"],
            "batch": 32, "steps": 30, "xla_flags": "",
        }  # fmt: skip

    files = [tmp_path / "2.json", tmp_path / "3.json"]
    files[0].write_text(json.dumps({"cases": [case("a", 10.0), case("peer", 99.0, "torch")]}))
    files[1].write_text(json.dumps({"cases": [case("b", 12.0), case("c", None)]}))
    assert fastest(files) == Run("b", ["--b"], 32, 30)
    files[0].write_text(json.dumps({"cases": [case("c", None)]}))
    with pytest.raises(ValueError, match="expected results with a successful run"):
        fastest(files[:1])


def test_resumed_run_with_a_different_bit_is_detected(tmp_path: Path) -> None:
    for name, weights, loss in (("a", b"12", 0.5), ("b", b"12", 0.5), ("c", b"13", 0.25)):
        checkpoint = tmp_path / name / "checkpoints" / "4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "params-00000.safetensors").write_bytes(weights)
        (checkpoint / "manifest.json").write_text(name)  # contains times, which differ
        record = {"step": 3, "train/loss": loss}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert differences(tmp_path / "a", tmp_path / "b", 4) == []
    found = differences(tmp_path / "a", tmp_path / "c", 4)
    assert found == ["params-00000.safetensors", "loss of step 3"]


def test_requirements_are_compared_with_installed_packages() -> None:
    assert requirements.problem("jax>=0.11.2,<0.12") is None
    assert requirements.problem("jax>=99") is not None
    assert requirements.problem("jax<0.1") is not None
    assert requirements.problem("no-such-package>=1") == "no-such-package is not installed"
    declared = requirements.declared(ROOT)
    assert {"optax>=0.2.8", "pydantic>=2.11", "beartype"} <= {*declared}
    assert not any(line.startswith("tjx-") for line in declared)
    pins = dict(line.split("==") for line in requirements.pinned(ROOT))
    assert pins.keys() == {*requirements.CARRIED}
