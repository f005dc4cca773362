"""Benchmark a GPT training step against torch, eager and compiled; write JSON.

    python tools/bench/training.py [--torch-python PATH] [--suite cpu|gpu]

requires jax, tjx-kernels, tjx-nn, tjx-optim and tjx-trainer (or PYTHONPATH of their src), and uses
the CPU settings of the trainer. Both implementations start from the same weights and tokens; the
benchmark fails if their first losses differ. They are measured alternately in each round.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path

from turns import Json, Worker, machine, summary

HERE = Path(__file__).resolve().parent

# vocab_size, d_model, n_layer, n_head, seq_len; batch size in sequences; dtype.
CASES: dict[str, list[Json]] = {
    "cpu": [
        {
            "name": "4 layers, 256 wide, T 256, batch 8, vocabulary 4096, float32",
            "sizes": [4096, 256, 4, 4, 256], "batch": 8, "dtype": "float32",
        },
        {
            "name": "GPT-2 small, T 256, batch 1, float32",
            "sizes": [50257, 768, 12, 12, 256], "batch": 1, "dtype": "float32",
        },
    ],
    "gpu": [
        {
            "name": "GPT-2 small, T 1024, batch 16, bfloat16",
            "sizes": [50257, 768, 12, 12, 1024], "batch": 16, "dtype": "bfloat16",
        },
        {
            "name": "GPT-2 medium, T 1024, batch 8, bfloat16",
            "sizes": [50257, 1024, 24, 16, 1024], "batch": 8, "dtype": "bfloat16",
        },
    ],
}  # fmt: skip
LOSSES = 5  # number of first losses to compare
# Relative tolerance of the losses; rounding errors grow over the steps.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def measure(case: Json, torch_python: Path | None, *, rounds: int, steps: int) -> Json:
    """Measure one case in new workers, as two models may not fit in memory."""
    print(f"{case['name']} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        given = {**case, "weights": str(Path(folder) / "weights.npz")}
        workers = {"tjx": Worker([sys.executable, str(HERE / "training_jax.py")], {})}
        answers = {"tjx": workers["tjx"].ask("prepare", case=given, losses=LOSSES)}
        for mode in ("eager", "compile") if torch_python is not None else ():
            name = f"torch {mode}"
            # An empty compilation cache, as for tjx.
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
            command = [str(torch_python), str(HERE / "training_torch.py"), mode]
            workers[name] = Worker(command, cache)
            answers[name] = workers[name].ask("prepare", case=given, losses=LOSSES)
        for name, answer in answers.items():
            difference = max(
                abs(a - b) / b
                for a, b in zip(answer["losses"], answers["tjx"]["losses"], strict=True)
            )
            answer["loss_difference"] = difference
            if difference > TOLERANCE[case["dtype"]]:
                sys.exit(f"{name}: {answer['losses']} differs from {answers['tjx']['losses']}")
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds[name] += worker.ask("run", steps=steps)["seconds"]
        for worker in workers.values():
            worker.stop()
    tokens = case["batch"] * case["sizes"][4]
    for name, answer in answers.items():
        answer |= summary(seconds[name])
        answer["tokens_per_sec"] = round(1000 * tokens / answer["median_ms"])
        for kind in ("median", "least"):
            ratio = answer[f"{kind}_ms"] / summary(seconds["tjx"])[f"{kind}_ms"]
            answer["speed_of_tjx" if kind == "median" else "least_speed_of_tjx"] = round(ratio, 3)
        answer["compile_of_tjx"] = round(
            answers["tjx"]["compile_seconds"] / answer["compile_seconds"], 3
        )
        print(
            f"  {name:<14}{answer['median_ms']:>9.1f} ms (least {answer['least_ms']:.1f}), "
            f"tjx is {answer['speed_of_tjx']:.2f}x as fast (least: "
            f"{answer['least_speed_of_tjx']:.2f}x); {answer['tokens_per_sec']:,} tokens/s, "
            f"ready in {answer['compile_seconds']:.1f} s; tjx {answer['compile_of_tjx']:.3f} of it",
            flush=True,
        )
    return {**case, "rounds": rounds, "sides": answers}


def depth(*, rounds: int) -> Json:
    """Measure the effect of scan and remat on memory, step time and compile time."""
    print("scan, remat, 12 layers, 256 wide, T 256, batch 8 ...", flush=True)
    kinds: dict[str, Json] = {
        "scan": {"scan_layers": True},
        "scan, remat full": {"remat": "full"},
        "scan, remat attention": {"remat": "attention"},
        "unrolled": {"scan_layers": False},
    }
    case = {"sizes": [4096, 256, 12, 4, 256], "batch": 8, "dtype": "float32", "weights": None}
    workers = {name: Worker([sys.executable, str(HERE / "training_jax.py")], {}) for name in kinds}
    found = {
        name: workers[name].ask("prepare", case={**case, "options": options}, losses=1)
        for name, options in kinds.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name] += worker.ask("run", steps=2)["seconds"]
    for name, answer in found.items():
        workers[name].stop()
        answer |= summary(seconds[name])
        answer["temp_of_scan"] = round(answer["temp_bytes"] / found["scan"]["temp_bytes"], 3)
        print(
            f"  {name:<22}{answer['median_ms']:>9.1f} ms, {answer['temp_bytes'] / 2**20:.0f} MiB "
            f"({answer['temp_of_scan']:.2f} of scan), ready in {answer['compile_seconds']:.1f} s",
            flush=True,
        )
    return found


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(CASES), default="cpu")
    parser.add_argument("--torch-python", type=Path, help="Python interpreter with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps per implementation and round")
    parser.add_argument("--cases", default="", help="regular expression of case names to run")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    start = machine()
    print(
        f"{start['cpu']} ({', '.join(start['cpu_features'])}), pinned to CPUs "
        f"{start['pinned_cpus']} of {start['cpus']}, load {start['load_average'][0]:.1f}"
    )
    records = [
        measure(case, given.torch_python, rounds=given.rounds, steps=given.steps)
        for case in CASES[given.suite]
        if re.search(given.cases, case["name"])
    ]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": date, "machine": start, "cases": records}
    if given.suite == "cpu" and not given.cases:
        result["depth"] = depth(rounds=given.rounds)
    device = re.sub(r"[^a-z0-9]+", "-", records[0]["sides"]["tjx"]["device"].lower()).strip("-")
    output = given.output or HERE / "results" / f"training-{device}-{date[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
