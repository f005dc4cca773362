"""Benchmark saving and restoring checkpoints against Orbax; write JSON.

    python tools/bench/checkpoint.py [--gigabytes 1.1] [--training]

requires tjx-ckpt and orbax-checkpoint; with --training also tjx-nn and tjx-optim (or PYTHONPATH of
their src). All implementations save and restore the same state, alternately in each round. tjx
writes and verifies checksums and flushes to disk (fsync); Orbax does neither. Reported ratios are
medians of the ratios of each round, as background load varies between rounds.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from pathlib import Path

from turns import Json, Worker, machine, summary

HERE = Path(__file__).resolve().parent
SIDES = ("tjx", "orbax", "orbax uncompressed")
# The trainer's preset gpt2_small with the smallest batch.
MODEL = {"name": "GPT-2 small, T 1024, batch 1, float32", "sizes": [50257, 768, 12, 12, 1024],
         "batch": 1, "dtype": "float32", "weights": None}  # fmt: skip
STEPS_A_SAVE = 100


def saving(folder: Path, gigabytes: float, *, rounds: int) -> Json:
    """Measure saving and restoring a state."""
    workers = {
        side: Worker([sys.executable, str(HERE / "checkpoint_sides.py"), side], {})
        for side in SIDES
    }
    found: dict[str, Json] = {
        side: worker.ask(
            "prepare", folder=str(folder / side.replace(" ", "_")), bytes=gigabytes * 1e9
        )
        for side, worker in workers.items()
    }
    times: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    for turn in range(rounds + 1):
        for side, worker in workers.items():
            seconds = worker.ask("save_and_restore", step=turn)
            if turn:  # the first round is a warm-up: later ones reuse its files and memory
                for name, value in seconds.items():
                    times[side].setdefault(name, []).append(value)
    for worker in workers.values():
        worker.stop()
    for side, answer in found.items():
        for name, values in times[side].items():
            answer[name] = summary(values)
            ratios = [a / b for a, b in zip(values, times["tjx"][name], strict=True)]
            answer[f"{name}_of_tjx"] = round(statistics.median(ratios), 3)
        print(
            f"  {side:<20}save {answer['save']['median_ms']:>7.0f} ms "
            f"({answer['save_of_tjx']:.2f} of tjx), restore {answer['restore']['median_ms']:>7.0f} "
            f"ms ({answer['restore_of_tjx']:.2f}), blocking {answer['blocking']['median_ms']:.1f}",
            flush=True,
        )
    return {"rounds": rounds, "sides": found}


def training(folder: Path, *, rounds: int, steps: int) -> Json:
    """Measure the slowdown of training steps during a background save."""
    print(f"{MODEL['name']}, {steps} steps with a save and {steps} without ...", flush=True)
    worker = Worker([sys.executable, str(HERE / "checkpoint_training.py")], {})
    prepared = worker.ask("prepare", case=MODEL, folder=str(folder / "training"))
    plain, saving = [], []
    for turn in range(rounds):
        plain.append(worker.ask("run", steps=steps, save=None)["seconds"])
        saving.append(worker.ask("run", steps=steps, save=turn + 1)["seconds"])
    worker.stop()
    step = statistics.median(plain) / steps
    extra = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
    found = {
        **prepared,
        "step_seconds": round(step, 3),
        "seconds_without": plain,
        "seconds_with": saving,
        "extra_seconds_a_save": round(extra, 3),
        "overhead": round(extra / (STEPS_A_SAVE * step), 5),
    }
    print(f"  {found}", flush=True)
    return found


def verdicts(saved: Json, trained: Json | None) -> list[str]:
    """Return one line per goal: measured value, goal, met or missed."""
    lines = []

    def judge(what: str, found: float, goal: float, *, least: bool) -> None:
        met = found >= goal if least else found <= goal
        lines.append(f"{what}: {found} of {goal}, {'met' if met else 'missed'}")

    for side, answer in saved["sides"].items():
        if side != "tjx":
            judge(f"save, times the speed of {side}", answer["save_of_tjx"], 1.0, least=True)
            judge(f"restore, times the speed of {side}", answer["restore_of_tjx"], 1.0, least=True)
    ours = saved["sides"]["tjx"]
    share = round(ours["blocking"]["median_ms"] / ours["save"]["median_ms"], 4)
    judge("blocking time, share of the save", share, 0.1, least=False)
    if trained is not None:
        what = f"overhead at a save each {STEPS_A_SAVE} steps, share of the step time"
        judge(what, trained["overhead"], 0.02, least=False)
    return lines


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.1, help="size of the state")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--training", action="store_true", help="train GPT-2 small too")
    parser.add_argument("--steps", type=int, default=4, help="steps with a save, and without")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if min(given.rounds, given.steps) < 1 or given.gigabytes <= 0:
        parser.error("--rounds, --steps and --gigabytes: expected more than 0")
    start = machine()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        saved = saving(Path(name), given.gigabytes, rounds=given.rounds)
        trained = None
        if given.training:
            trained = training(Path(name), rounds=given.rounds, steps=given.steps)
    lines = verdicts(saved, trained)
    print(*lines, sep="\n")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {
        "date": date, "machine": start, "saving": saved, "training": trained, "goals": lines,
    }  # fmt: skip
    output = given.output or HERE / "results" / f"checkpoint-cpu-{date[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
