"""Benchmark greedy generation against Hugging Face transformers and torch; write JSON.

    python tools/bench/generation.py [--torch-python PATH] [--suite cpu|gpu]

requires jax, tjx-kernels and tjx-nn (or PYTHONPATH of their src). All implementations use the same
weights and prompt; the benchmark fails if their tokens differ in float32. "tjx int8" and "tjx int4"
have the same weights quantized by `tjx_nn.quantize`. All are measured alternately in each round.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path

from turns import Json, Worker, WorkerError, machine, summary

HERE = Path(__file__).resolve().parent
# Sides with quantized weights, and their dtype.
QUANTIZED = {"tjx int8": "int8", "tjx int4": "int4"}
SMALL = {"sizes": [4096, 256, 4, 4, 256], "prompt": 16, "new": 100, "dtype": "float32"}
GPT2_SMALL = {"sizes": [50257, 768, 12, 12, 1024], "prompt": 16, "new": 100, "dtype": "float32"}

# The shape of stories15M, the smallest Llama of llama2.c.
LLAMA = {
    "sizes": [32000, 288, 6, 6, 256], "prompt": 16, "new": 100, "dtype": "float32",
    "options": {
        "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "d_ff": 768, "bias": False,
    },
}  # fmt: skip

# vocab_size, d_model, n_layer, n_head, max_seq_len; other fields of `GPTConfig`; tokens of the
# prompt and of the completion; goals as a speedup over Hugging Face transformers, or in tokens per
# second.
CASES: dict[str, list[Json]] = {
    "cpu": [
        {"name": "4 layers, 256 wide, batch 1", **SMALL, "batch": 1, "goal_ratio": 2.5},
        {"name": "4 layers, 256 wide, batch 8", **SMALL, "batch": 8},
        {"name": "Llama, 15M parameters, batch 1", **LLAMA, "batch": 1, "goal_ratio": 2.5},
        {"name": "GPT-2 small, batch 1", **GPT2_SMALL, "batch": 1, "goal_ratio": 1.8},
    ],
    "gpu": [
        {
            "name": f"GPT-2 small, bfloat16, batch {batch}",
            **GPT2_SMALL, "dtype": "bfloat16", "batch": batch, "new": 500, **goal,
        }
        for batch, goal in ((1, {"goal_tokens_per_sec": 2000}), (32, {}))
    ],
}  # fmt: skip


def measure(case: Json, torch_python: Path | None, *, rounds: int) -> Json:
    """Measure one case in new workers, as several models may not fit in memory."""
    print(f"{case['name']} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        given = {**case, "weights": str(Path(folder) / "weights.npz"), "saved": f"{folder}/saved"}
        own = [sys.executable, str(HERE / "generation_jax.py")]
        workers = {name: Worker(own, {}) for name in ("tjx", *QUANTIZED)}
        answers = {
            name: worker.ask("prepare", case={**given, "quantized": QUANTIZED.get(name)})
            for name, worker in workers.items()
        }
        # The torch loop knows GPT-2 only.
        kinds = ["transformers"] if "options" in case else ["transformers", "static cache"]
        for kind in kinds if torch_python is not None else ():
            command = [str(torch_python), str(HERE / "generation_torch.py"), kind]
            worker = Worker(command, {"HF_HUB_OFFLINE": "1"})
            try:
                answers[kind] = worker.ask("prepare", case=given)
            except WorkerError as end:  # torch may be installed without transformers
                print(f"  {kind} is skipped: {end}")
            else:
                workers[kind] = worker
        found = {name: answer.pop("tokens") for name, answer in answers.items()}
        exact = [x for name, x in found.items() if name not in QUANTIZED]
        if case["dtype"] == "float32" and any(x != found["tjx"] for x in exact):
            sys.exit(f"the tokens differ: {found}")
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds[name] += worker.ask("run", times=2)["seconds"]
        for worker in workers.values():
            worker.stop()
    for name, answer in answers.items():
        answer |= summary(seconds[name])
        answer["tokens_per_sec"] = round(1e3 * case["batch"] * case["new"] / answer["median_ms"], 1)
        answer["speed_of_tjx"] = round(answer["median_ms"] / answers["tjx"]["median_ms"], 3)
        print(
            f"  {name:<14}{answer['tokens_per_sec']:>9,.1f} tokens/s; tjx is "
            f"{answer['speed_of_tjx']:.2f}x as fast; ready in {answer['ready_seconds']:.1f} s",
            flush=True,
        )
    return {**case, "rounds": rounds, "sides": answers}


def goals(record: Json) -> list[str]:
    """Return one line per goal: measured value, goal, met or missed."""
    sides = record["sides"]
    lines = []
    if record["dtype"] == "float32":  # int4 saves memory
        ratio = round(1 / sides["tjx int8"]["speed_of_tjx"], 2)
        verdict = "met" if ratio > 1 else "missed"
        lines.append(f"{record['name']}: int8 {ratio}x float32 of above 1x, {verdict}")
    if "goal_ratio" in record and "transformers" in sides:
        found = sides["transformers"]["speed_of_tjx"]
        verdict = "met" if found >= record["goal_ratio"] else "missed"
        lines.append(f"{record['name']}: {found:.2f}x of {record['goal_ratio']}x, {verdict}")
    if "goal_tokens_per_sec" in record:
        found = sides["tjx"]["tokens_per_sec"]
        verdict = "met" if found >= record["goal_tokens_per_sec"] else "missed"
        lines.append(f"{record['name']}: {found} of {record['goal_tokens_per_sec']}/s, {verdict}")
    return lines


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(CASES), default="cpu")
    parser.add_argument("--torch-python", type=Path, help="Python interpreter with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="regular expression of case names to run")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}; expected at least 1")
    start = machine()
    records = [
        measure(case, given.torch_python, rounds=given.rounds)
        for case in CASES[given.suite]
        if re.search(given.cases, case["name"])
    ]
    if not records:
        parser.error(f"--cases: got {given.cases!r}; expected a match in the suite")
    verdicts = [line for record in records for line in goals(record)]
    print(*verdicts, sep="\n")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": date, "machine": start, "cases": records, "goals": verdicts}
    device = re.sub(r"[^a-z0-9]+", "-", records[0]["sides"]["tjx"]["device"].lower()).strip("-")
    output = given.output or HERE / "results" / f"generation-{device}-{date[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
