"""Run the trainer and report throughput, MFU, step times, memory and top operations.

    python -m gpu_slices.trainer_run --case NAME --folder WORK --keep RESULTS --batch 32 \
        --varied=--model.scan_layers=false -- FLAGS

FLAGS are trainer flags; --varied gives the flags that distinguish this case from others. The
measurements are read from the files of the run directory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_slices.json_lines import begin, finish
from turns import percentiles

TRAINER = [sys.executable, "-m", "tjx_trainer.main"]
WARM_UP = 5  # steps excluded from the measurement
PROFILED = 5  # number of last steps to profile


def recording_flags(run_dir: Path, *, steps: int, profile: bool) -> list[str]:
    """Return the trainer flags for the number of steps, logging and profiling."""
    found = [f"--run_dir={run_dir}", f"--train.max_steps={steps}", "--log.every=1"]
    found += [f"--train.eval_every={steps}", f"--checkpoint.every={steps}"]
    if profile:
        found.append(f"--profile.steps={steps - PROFILED + 1}-{steps}")
    return found


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the training records of a run, one per step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def step_seconds(record: dict[str, Any]) -> float:
    """Return the time since the previous record: one step without evaluation and saves."""
    phases = ("time/data_wait", "time/dispatch", "time/device", "time/other")
    return float(sum(record[phase] for phase in phases))


def measure(run_dir: Path, *, steps: int, profile: bool) -> dict[str, Any]:
    """Read the measurements of a completed run.

    Parameters
    ----------
    run_dir : Path
        The run directory.
    steps : int
        Steps of the run.
    profile : bool
        Whether the last steps were profiled; profiled steps are excluded from the step times.

    Returns
    -------
    dict
        "tokens_per_sec" by the median step, "mfu" or None, "step_time" percentiles, peaks of memory
        [bytes], "compile_seconds", first and last loss [nats per token], "operations" and "shares".
    """
    records = read_records(run_dir)
    last = steps - PROFILED if profile else steps
    measured = [record for record in records if WARM_UP < record["step"] <= last]
    times = percentiles([step_seconds(record) for record in measured])
    counts = [record["train/tokens"] for record in records]
    rate = 1e3 * (counts[1] - counts[0]) / times["p50_ms"]
    # Rescale the trainer's MFU, which is a mean over the last 50 steps.
    end = measured[-1]
    mfu = end["train/mfu"] / end["train/tokens_per_sec"] * rate if "train/mfu" in end else None
    report = run_dir / "profile" / "report.json"
    found = {
        "tokens_per_sec": round(rate, 1),
        "mfu": mfu,
        "step_time": times,
        "device_peak_bytes": end.get("memory/device_peak_bytes"),
        "host_peak_bytes": end["memory/host_peak_bytes"],
        "compile_seconds": round(end["compile/seconds"], 1),
        "loss_first": records[0]["train/loss"],
        "loss_last": records[-1]["train/loss"],
    }
    if profile:
        content = json.loads(report.read_text())
        found |= {"operations": content["operations"], "shares": content["shares"]}
    return found


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True, help="name of the case")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the run directory")
    parser.add_argument("--keep", type=Path, required=True, help="folder for its small files")
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--varied", action="append", default=[], help="a flag of this case")
    parser.add_argument("--profile", action="store_true", help="profile the last steps")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilation cache")
    parser.add_argument("flags", nargs="+", help="flags of the trainer, after --")
    given = parser.parse_args()
    run_dir: Path = given.folder / given.case
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    flags = [*given.flags, f"--train.batch_size={given.batch}", *given.varied]
    flags += recording_flags(run_dir, steps=given.steps, profile=given.profile)
    name = f"compile {given.case}" if given.compile_only else given.case
    begin(name)
    start = time.monotonic()
    command = [*TRAINER, *flags, *(["--dry_run"] if given.compile_only else [])]
    status = subprocess.run(command, cwd=run_dir.parent).returncode
    wall = round(time.monotonic() - start, 1)
    about = {
        "seconds": wall,
        "batch": given.batch,
        "steps": given.steps,
        "varied": given.varied,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if status:
        reason = f"the trainer ended with status {status}; see the log of this case"
        finish(name, "failed", reason=reason, **about)
        sys.exit(1)
    if given.compile_only:
        finish(name, "ok", **about)
        return
    found = measure(run_dir, steps=given.steps, profile=given.profile)
    shutil.copy(run_dir / "metrics.jsonl", given.keep / f"{given.case}-metrics.jsonl")
    shutil.rmtree(run_dir)  # checkpoints of 1.5 GB each
    finish(name, "ok", **found, **about)


if __name__ == "__main__":
    main()
