"""Benchmark reading batches against nanoGPT and Grain; write JSON.

    python tools/bench/data.py [--peers-python PATH] [--training]

requires tjx-data (or PYTHONPATH of its src); with --training also tjx-trainer. --peers-python needs
torch and grain. All implementations read the same 100 million tokens, shuffled, alternately in each
round. Sets of 10 billion tokens are sparse files. Streams of 50 and 500 MB must need the same
memory; with --training, the preset quickstart trains on a stream and on a prepared set in turn.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from turns import Json, Worker, machine, summary

HERE = Path(__file__).resolve().parent
N_TOKENS = 100_000_000
MANY_TOKENS = 10_000_000_000
SHARD_TOKENS = 1 << 27
SEQ_LEN = 1024
WAYS = ("nanogpt", "grain0", "grain2")  # Grain without and with threads; the faster one counts


def reading(folder: Path, peers_python: Path | None, batch: int, *, rounds: int) -> Json:
    """Measure the throughput for one batch size."""
    print(f"batches of {batch} x {SEQ_LEN + 1} ...", flush=True)
    file = str(folder / "tokens.bin")
    ours = Worker([sys.executable, str(HERE / "data_tjx.py")], {})
    workers = {"tjx": ours}
    answers = {
        "tjx": ours.ask("open", folder=str(folder / "set"), batch=batch, seq_len=SEQ_LEN, step=0)
    }
    for way in WAYS if peers_python is not None else ():
        workers[way] = Worker([str(peers_python), str(HERE / "data_peers.py")], {})
        answers[way] = workers[way].ask("open", way=way, file=file, batch=batch, seq_len=SEQ_LEN)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            n_batches = 20_000 if name == "tjx" else 1000
            seconds[name] += worker.ask("run", batches=n_batches)["seconds"]
    for name, worker in workers.items():
        worker.stop()
        answers[name] |= summary(seconds[name])
    for name, answer in answers.items():
        answer["batches_per_sec"] = round(1e3 / answer["median_ms"])
        answer["speed_of_tjx"] = round(answer["median_ms"] / answers["tjx"]["median_ms"], 2)
        print(
            f"  {name:<8}{answer['batches_per_sec']:>8,} batches/s; tjx is "
            f"{answer['speed_of_tjx']:.1f}x as fast",
            flush=True,
        )
    return {"batch": batch, "seq_len": SEQ_LEN, "rounds": rounds, "sides": answers}


def opening(folder: Path) -> Json:
    """Measure opening a set of 10 billion tokens, and resuming at step 10^6."""
    maker = Worker([sys.executable, str(HERE / "data_tjx.py")], {})
    many = str(folder / "many")
    maker.ask(
        "make", folder=many, tokens_file=None, n_tokens=MANY_TOKENS, shard_tokens=SHARD_TOKENS
    )
    maker.stop()
    found = {}
    for step in (0, 1_000_000):
        worker = Worker([sys.executable, str(HERE / "data_tjx.py")], {})
        found[f"step {step}"] = worker.ask("open", folder=many, batch=32, seq_len=1024, step=step)
        worker.stop()
        print(f"10 billion tokens, step {step}: {found[f'step {step}']}", flush=True)
    return found


def streaming(folder: Path) -> Json:
    """Measure speed and peak memory of streams of 50 and 500 MB, read once."""
    words = np.array([f"word{n}" for n in range(1000)])
    draw, found = np.random.default_rng(0), {}
    text = "\n".join(json.dumps({"text": " ".join(draw.choice(words, 800))}) for _ in range(2000))
    for copies in (4, 40):
        file = folder / f"stream-{copies}.jsonl"
        file.write_text(f"{text}\n" * copies)
        worker = Worker([sys.executable, str(HERE / "data_tjx.py")], {})
        n_tokens = int(0.85 * file.stat().st_size)  # a tenth is held out
        found[f"{copies} copies"] = worker.ask(
            "stream", file=str(file), cache=str(folder / "cache"), n_tokens=n_tokens
        )
        worker.stop()
        print(f"stream of {file.stat().st_size:,} bytes: {found[f'{copies} copies']}", flush=True)
    return found


def training(folder: Path, *, rounds: int) -> Json:
    """Measure the preset quickstart, alternately with a prepared set and with a stream.

    Returns
    -------
    dict
        For each, the median seconds between two records of the log in each round, and the fraction
        of the time that the step waits for data; the speed is the median ratio over rounds.
    """
    seconds: dict[str, list[float]] = {"prepared": [], "streamed": []}  # medians of the rounds
    shares: dict[str, list[float]] = {"prepared": [], "streamed": []}
    for number in range(rounds):
        for name in seconds:
            run = folder / f"{name}-{number}"
            command = [sys.executable, "-m", "tjx_trainer.main", "--config", "quickstart"]
            command += ["--run_dir", str(run), "--train.max_steps", "300"]
            command += ["--data.cache_dir", str(folder / "cache")]
            command += ["--data.stream", str(name == "streamed").lower()]
            subprocess.run(command, check=True)
            records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            times = [{k: v for k, v in each.items() if k.startswith("time/")} for each in records]
            # The first record includes compilation.
            times = [each for each in times if each][1:]
            seconds[name].append(float(np.median([sum(each.values()) for each in times])))
            shares[name] += [each["time/data_wait"] / sum(each.values()) for each in times]
    found: Json = {
        name: {
            "seconds_by_round": seconds[name],
            "data_wait": float(np.median(shares[name])),
            "most_data_wait": max(shares[name]),
            "records": len(shares[name]),
        }
        for name in seconds
    }
    speeds = np.divide(seconds["prepared"], seconds["streamed"])
    found["speed_of_streamed"] = round(float(np.median(speeds)), 3)
    print(f"quickstart: {found}", flush=True)
    return found


def verdicts(records: list[Json], opened: Json, streamed: Json, trained: Json | None) -> list[str]:
    """Return one line per goal: measured value, goal, met or missed."""
    lines = []

    def judge(what: str, found: float, goal: float, *, least: bool) -> None:
        met = found >= goal if least else found <= goal
        lines.append(f"{what}: {found} of {goal}, {'met' if met else 'missed'}")

    for record in records:
        sides = record["sides"]
        if "nanogpt" in sides:
            grain = min(side["speed_of_tjx"] for way, side in sides.items() if "grain" in way)
            what = f"batch {record['batch']}, times the speed of"
            judge(f"{what} nanoGPT's", sides["nanogpt"]["speed_of_tjx"], 8.0, least=True)
            judge(f"{what} Grain's best", grain, 10.0, least=True)
    late, first = opened["step 1000000"], opened["step 0"]
    judge("resuming at step 10^6, seconds", late["first_batch_seconds"], 0.05, least=False)
    judge("opening 10 billion tokens, seconds", first["open_seconds"], 1.0, least=False)
    judge("memory after it, MiB", first["mib"], 200.0, least=False)
    ratio = round(streamed["40 copies"]["mib"] / streamed["4 copies"]["mib"], 3)
    judge("memory of a stream of 10 times the text, ratio", ratio, 1.15, least=False)
    if trained is not None:
        prepared, stream = trained["prepared"], trained["streamed"]
        judge("quickstart, share of waiting", prepared["data_wait"], 0.01, least=False)
        judge("quickstart streamed, share of waiting", stream["data_wait"], 0.02, least=False)
        ratio = trained["speed_of_streamed"]
        judge("quickstart streamed, times the speed of prepared", ratio, 0.9, least=True)
    return lines


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", type=Path, help="interpreter with torch and grain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training", action="store_true", help="train the preset quickstart too")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}; expected at least 1")
    start = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.random.default_rng(0).integers(0, 50257, N_TOKENS, np.uint16).tofile(
            folder / "tokens.bin"
        )
        maker = Worker([sys.executable, str(HERE / "data_tjx.py")], {})
        maker.ask(
            "make",
            folder=str(folder / "set"),
            tokens_file=str(folder / "tokens.bin"),
            n_tokens=N_TOKENS,
            shard_tokens=SHARD_TOKENS,
        )
        maker.stop()
        records = [
            reading(folder, given.peers_python, batch, rounds=given.rounds) for batch in (12, 32)
        ]
        opened = opening(folder)
        streamed = streaming(folder)
        trained = training(folder, rounds=given.rounds) if given.training else None
    lines = verdicts(records, opened, streamed, trained)
    print(*lines, sep="\n")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {
        "date": date, "machine": start, "reading": records, "opening": opened,
        "streaming": streamed, "training": trained, "goals": lines,
    }  # fmt: skip
    output = given.output or HERE / "results" / f"data-cpu-{date[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
