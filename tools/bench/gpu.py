"""Everything to do on the day that a GPU is lent: one command, one folder of results.

    python tools/bench/gpu.py --output results [--torch-python PATH] [--minutes 28]

wants an environment with jax[cuda13], flax, optax, lazy_loader, numpy, pytest, jaxtyping and
beartype (tools/locks/cuda13.txt has all of them), and matplotlib for pictures. What matters most
comes first: the tests of the real kernels, the benchmarks of attention, training and generation,
then block sizes for the table. Each step is a process of its own with a
time limit of its own; one that fails or runs out of time does not stop the others, and what it
wrote by then stays. The exit status is 0 if every step succeeded.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "packages" / "tjx-kernels"
PACKAGES = ("kernels", "nn", "optim")


@dataclass(frozen=True)
class Step:
    """One program to run.

    Attributes
    ----------
    name
        Names the step and the file of its output.
    command
        What runs, in the root of the repository.
    minutes
        Its time limit; less where less is left of all.
    environment
        Variables that it needs.
    """

    name: str
    command: list[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)


def steps(output: Path, torch_python: Path | None) -> list[Step]:
    """List the steps in the order of their worth."""
    python = sys.executable
    folders = [ROOT / "packages" / f"tjx-{name}" / "src" for name in PACKAGES]
    sources = os.pathsep.join(map(str, [*folders, KERNELS / "tests"]))
    found = {"PYTHONPATH": sources, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    benchmark = [python, "tools/bench/attention.py", "--suite", "gpu", "--minutes", "7"]
    benchmark += ["--output", str(output / "attention.json")]
    if torch_python is not None:
        benchmark += ["--torch-python", str(torch_python)]
    all_steps = [
        Step(
            "tests",
            [python, "-m", "pytest", "-m", "gpu", "-q", "--durations=10",
             f"--junit-xml={output / 'tests.xml'}",
             str(KERNELS / "tests" / "test_kernels_on_gpu.py")],
            8,
            {**found, "JAX_PLATFORMS": "cuda,cpu"},
        ),
        Step("benchmark", benchmark, 9, found),
    ]  # fmt: skip
    for name in ("training", "generation"):
        command = [python, f"tools/bench/{name}.py", "--suite", "gpu", "--rounds", "3"]
        command += ["--output", str(output / f"{name}.json")]
        command += [] if torch_python is None else ["--torch-python", str(torch_python)]
        all_steps.append(Step(name, command, 5, found))
    for implementation, head_dim in [
        ("mosaic_gpu", 128), ("mosaic_gpu", 64), ("triton", 128), ("triton", 64),
    ]:  # fmt: skip
        name = f"tune_{implementation}_{head_dim}"
        command = [python, "tools/kernels/tune.py", "--implementation", implementation]
        command += ["--head-dims", str(head_dim), "--causal", "yes", "--minutes-a-row", "1"]
        command += ["--output", str(output / f"{name}.json")]
        all_steps.append(Step(name, command, 4, found))
    return all_steps


def run(step: Step, output: Path, seconds: float) -> dict[str, Any]:
    """Run a step, its output shown and kept; what it started ends with it."""
    print(f"=== {step.name}: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, **step.environment}
    with (output / f"{step.name}.txt").open("w") as log:
        process = subprocess.Popen(
            step.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = str(process.wait(timeout=seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that was started above, no other
            process.wait()
            status = f"stopped after {seconds:.0f} s"
    text = (output / f"{step.name}.txt").read_text(errors="replace")
    print("\n".join(text.splitlines()[-40:]), flush=True)
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def machine() -> dict[str, Any]:
    """Describe the GPU as JAX and as its driver sees it.

    Without one nothing is started: its tests would be skipped and seem to pass.
    """
    ask = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, jax.__version__)"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if not answer.stdout.startswith("gpu"):
        sys.exit(f"JAX sees no GPU: {answer.stdout}{answer.stderr[-500:]}")
    if not shutil.which("nvidia-smi"):
        return {"jax": answer.stdout.strip()}
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {"jax": answer.stdout.strip(), "fields": fields, "gpus": found}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--torch-python", type=Path, help="interpreter that can import torch")
    parser.add_argument("--minutes", type=float, default=28.0, help="limit of all steps together")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="tests, benchmark, training, generation, tune_..."
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = steps(output, arguments.torch_python)
    if arguments.only:
        unknown = set(arguments.only) - {step.name for step in chosen}
        if unknown:
            parser.error(f"--only must be of {', '.join(step.name for step in chosen)}")
        chosen = [step for step in chosen if step.name in arguments.only]
    until = time.monotonic() + 60 * arguments.minutes
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    summary: dict[str, Any] = {"date": date, "machine": machine(), "steps": []}
    for step in chosen:
        seconds = min(60 * step.minutes, until - time.monotonic())
        if seconds > 1:
            result = run(step, output, seconds)
        else:
            result = {"step": step.name, "status": "not started: out of time", "seconds": 0.0}
        summary["steps"].append(result)
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for result in summary["steps"]:
        print(f"{result['step']}: {result['status']} ({result['seconds']} s)")
    sys.exit(any(result["status"] != "0" for result in summary["steps"]))


if __name__ == "__main__":
    main()
