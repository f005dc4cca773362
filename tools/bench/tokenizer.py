"""Benchmark encoding and corpus preparation with the GPT-2 vocabulary; write JSON.

    python tools/bench/tokenizer.py --data DATA [--skip-prepare]

requires tjx-data (or PYTHONPATH of its src) and tiktoken on Linux. DATA has folders ``gpt2``
(encoder.json, vocab.bpe), ``books`` and ``udhr`` (*.txt). The peer is tiktoken. All implementations
encode the same documents, alternately in each round, on all cores and on one; the benchmark fails
if their ids differ. The baseline of `prepare` is the summed throughput of the tokenizers library
alone, in one single-threaded process per core.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turns import Json, Worker, machine, summary

HERE = Path(__file__).resolve().parent
OURS = str(HERE / "tokenizer_tjx.py")
DOCUMENT_CHARACTERS = 4000
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
GOAL = 0.9  # prepare: minimum fraction of the summed throughput
TIKTOKEN_GOAL = 0.9  # encoding: minimum fraction of tiktoken's throughput
GROWTH = 1.1  # maximum memory ratio for a corpus four times as large


def documents_of(text: str) -> list[str]:
    """Split a text at paragraphs into documents of about `DOCUMENT_CHARACTERS`."""
    documents: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + DOCUMENT_CHARACTERS)
        end = len(text) if end < 0 else end + 2
        documents.append(text[start:end])
        start = end
    return documents


def encoding(gpt2: Path, documents: Path, name: str, rounds: int, *, one_core: bool) -> Json:
    """Measure the encoding throughput of all implementations."""
    print(f"{name} ...", flush=True)
    commands = {
        way: [sys.executable, OURS, way]
        for way in ("tjx", "tjx with tokenizers", "tokenizers", "tokenizers raw")
    }
    commands["tiktoken"] = [sys.executable, str(HERE / "tokenizer_tiktoken.py")]
    environment = ONE_THREAD if one_core else {}
    workers = {way: Worker(command, environment) for way, command in commands.items()}
    given = {"gpt2": str(gpt2), "documents": str(documents), "part": 0, "parts": 1}
    answers = {way: worker.ask("open", **given) for way, worker in workers.items()}
    if len({answer.pop("ids") for answer in answers.values()}) != 1:
        sys.exit(f"the ids differ: {answers}")
    seconds: dict[str, list[float]] = {way: [] for way in workers}
    for _ in range(rounds):
        for way, worker in workers.items():
            seconds[way] += worker.ask("run")["seconds"]
    for way, answer in answers.items():
        workers[way].stop()
        answer |= summary(seconds[way])
        answer["mb_per_sec"] = round(answer["n_bytes"] / answer["median_ms"] / 1e3, 2)
        # Background load varies: compare the two of each round.
        answer["speed_of_tiktoken"] = round(
            statistics.median(
                peer / own for peer, own in zip(seconds["tiktoken"], seconds[way], strict=True)
            ),
            3,
        )
        print(
            f"  {way:<20}{answer['mb_per_sec']:>8.2f} MB/s, {answer['speed_of_tiktoken']:.2f} of "
            "tiktoken",
            flush=True,
        )
    return {"name": name, "rounds": rounds, "sides": answers}


class Cores:
    """Baseline: the tokenizers library in one single-threaded process per core."""

    def __init__(self, gpt2: Path, documents: Path) -> None:
        count = os.cpu_count() or 1
        command = [sys.executable, OURS, "tokenizers raw"]
        self._workers = [Worker(command, ONE_THREAD) for _ in range(count)]
        self._bytes: list[int] = [
            worker.ask("open", gpt2=str(gpt2), documents=str(documents), part=i, parts=count)[
                "n_bytes"
            ]
            for i, worker in enumerate(self._workers)
        ]

    def rate(self) -> float:
        """Return the summed throughput in MB/s."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            answers = list(pool.map(lambda worker: worker.ask("run"), self._workers))
        seconds: list[float] = [answer["seconds"][0] for answer in answers]
        return sum(n_bytes / time / 1e6 for n_bytes, time in zip(self._bytes, seconds, strict=True))

    def stop(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.stop()


def write_corpus(documents: list[str], file: Path, n_bytes: int) -> None:
    """Write documents repeatedly as JSON lines, until the file has `n_bytes` bytes."""
    n_written = 0
    with file.open("w", encoding="utf-8") as stream:
        for text in itertools.cycle(documents):
            n_written += stream.write(json.dumps({"text": text}) + "\n")
            if n_written >= n_bytes:
                return


def preparing(gpt2: Path, documents: Path, folder: Path, megabytes: int, rounds: int) -> Json:
    """Measure prepare and the baseline alternately, on a corpus and one four times as large."""
    print(f"prepare, {megabytes} MB and {4 * megabytes} MB ...", flush=True)
    texts = json.loads(documents.read_text())
    files = [folder / f"corpus_{i}.jsonl" for i in range(4)]
    for file in files:
        write_corpus(texts, file, megabytes * 10**6)
    cores = Cores(gpt2, documents)
    records: dict[str, list[Json]] = {"small": [], "large": []}
    for _ in range(rounds):
        for name, corpus in (("small", files[:1]), ("large", files)):
            before = cores.rate()
            worker = Worker([sys.executable, OURS, "tjx"], {})
            answer = worker.ask("prepare", gpt2=str(gpt2), corpus=[str(file) for file in corpus])
            worker.stop()
            # Background load varies: compare with the baseline before and after prepare.
            answer["encode_mb_per_sec"] = round((before + cores.rate()) / 2, 2)
            answer["mb_per_sec"] = round(answer["n_bytes"] / answer["seconds"][0] / 1e6, 2)
            answer["of_encode"] = round(answer["mb_per_sec"] / answer["encode_mb_per_sec"], 3)
            print(
                f"  {answer['n_bytes'] / 1e6:.0f} MB: {answer['mb_per_sec']:.2f} MB/s, "
                f"{answer['of_encode']:.3f} of {answer['encode_mb_per_sec']:.2f}; "
                f"{answer['peak_mib']} MiB in {answer['processes']} processes, the largest "
                f"{answer['peak_mib_of_largest']}",
                flush=True,
            )
            records[name].append(answer)
    cores.stop()
    shares = {
        name: statistics.median(record["of_encode"] for record in found)
        for name, found in records.items()
    }
    peaks = {name: max(record["peak_mib"] for record in found) for name, found in records.items()}
    return {
        "megabytes": megabytes,
        **records,
        "of_encode": shares,
        "growth": round(peaks["large"] / peaks["small"], 3),
    }


def encoding_verdicts(records: list[Json]) -> list[str]:
    """Return one line per case: speed relative to tiktoken, goal, met or missed."""
    speeds = {record["name"]: record["sides"]["tjx"]["speed_of_tiktoken"] for record in records}
    return [
        f"encoding, {name}: {speed} of tiktoken's speed, goal {TIKTOKEN_GOAL}, "
        f"{'met' if speed >= TIKTOKEN_GOAL else 'missed'}"
        for name, speed in speeds.items()
    ]


def verdicts(prepared: Json) -> list[str]:
    """Return one line per goal: measured value, goal, met or missed."""
    small, large = prepared["of_encode"]["small"], prepared["of_encode"]["large"]
    growth = prepared["growth"]
    return [
        # For a small corpus, process startup takes a large part of the time.
        f"prepare, of the library's encoding alone on all cores: {large} (small: {small}) of "
        f"{GOAL}, {'met' if large >= GOAL else 'missed'}",
        f"its memory, where the corpus is four times as large: {growth} times, at most {GROWTH}, "
        f"{'met' if growth <= GROWTH else 'missed'}",
    ]


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gpt2 and books")
    parser.add_argument("--skip-prepare", action="store_true", help="measure encoding only")
    parser.add_argument("--megabytes", type=int, default=60, help="of text for prepare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if min(given.rounds, given.megabytes) < 1:
        parser.error("--rounds and --megabytes: expected at least 1")
    start = machine()
    gpt2 = given.data / "gpt2"
    books = [file.read_text(encoding="utf-8") for file in sorted(given.data.glob("books/*.txt"))]
    if not books:
        parser.error(f"--data: got {given.data}; expected a folder with books/*.txt")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        languages = sorted(given.data.glob("udhr/*.txt"))
        cases = {
            f"documents of about {DOCUMENT_CHARACTERS} characters": [
                document for book in books for document in documents_of(book)
            ],
            "whole books": books,
            f"{len(languages)} languages": [file.read_text("utf-8") for file in languages] * 8,
        }
        records = []
        for number, (case, texts) in enumerate(cases.items()):
            file = folder / f"documents_{number}.json"
            file.write_text(json.dumps(texts))
            for one_core in (False, True):
                name = f"{case}, {'one core' if one_core else 'all cores'}"
                records.append(encoding(gpt2, file, name, given.rounds, one_core=one_core))
        lines = encoding_verdicts(records)
        prepared = None
        if not given.skip_prepare:
            prepared = preparing(
                gpt2, folder / "documents_0.json", folder, given.megabytes, given.rounds
            )
            lines += verdicts(prepared)
    print(*lines, sep="\n")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {
        "date": date, "machine": start, "encoding": records, "prepare": prepared, "goals": lines,
    }  # fmt: skip
    output = given.output or HERE / "results" / f"tokenizer-cpu-{date[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
