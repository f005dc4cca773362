"""Benchmark `tjx_data.clean`: duplicates found, throughput and memory; write JSON.

    python tools/bench/cleaning.py --data DATA

requires tjx-data[near-duplicates] (or PYTHONPATH of its src) on Linux. DATA has ``books/*.txt`` and
``tinystories_2M.txt``. A copy of some documents with 5 to 20 % of their words substituted, deleted
or inserted is planted. Throughput is measured for 1, 2 and 4 times the data, whose copies have
other words.
"""

import argparse
import datetime
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import Json, machine

from tjx_data import clean
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.prepared.executors import SerialExecutor

HERE = Path(__file__).resolve().parent
DOCUMENT_CHARACTERS = 2500
FRACTIONS = (0.05, 0.1, 0.15, 0.2)
CONFIG = CleanConfig(rules=(), masks=())


def read_sources(data: Path) -> dict[str, list[str]]:
    """Return the documents of books, cut at paragraphs, and of TinyStories."""
    books: list[str] = []
    for file in sorted(data.glob("books/*.txt")):
        text, start = file.read_text(encoding="utf-8"), 0
        while start < len(text):
            end = text.find("\n\n", start + DOCUMENT_CHARACTERS)
            end = len(text) if end < 0 else end + 2
            books.append(text[start:end])
            start = end
    stories = (data / "tinystories_2M.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    return {"books": books, "tinystories": [text for text in stories if text.strip()]}


def edited(text: str, fraction: float, words: list[str], rng: random.Random) -> str:
    """Substitute, delete or insert a fraction of the words of a text."""
    found = text.split(" ")
    for _ in range(max(1, round(fraction * len(found)))):
        i, kind = rng.randrange(len(found)), rng.randrange(3)
        found[i : i + (kind != 0)] = [] if kind == 1 and len(found) > 1 else [rng.choice(words)]
    return " ".join(found)


def quality(documents: list[str], folder: Path) -> Json:
    """Plant near-duplicates of a tenth of the documents; return recall and precision."""
    rng = random.Random(0)  # noqa: S311  # test data
    words = " ".join(documents[::10]).split()
    chosen = rng.sample(range(len(documents)), len(documents) // 10)
    copies = [
        edited(documents[i], FRACTIONS[k % len(FRACTIONS)], words, rng)
        for k, i in enumerate(chosen)
    ]
    clean([*documents, *copies], folder / "out", CONFIG, executor=SerialExecutor())
    lines = (folder / "out" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    kept = {json.loads(line)["text"] for line in lines}
    n_found = sum(copy not in kept for copy in copies)
    n_false = sum(document not in kept for document in documents)
    recall = {
        str(fraction): sum(copy not in kept for copy in copies[k :: len(FRACTIONS)])
        / len(copies[k :: len(FRACTIONS)])
        for k, fraction in enumerate(FRACTIONS)
    }
    return {
        "documents": len(documents),
        "planted": len(copies),
        "recall": round(n_found / len(copies), 4),
        "recall_by_fraction": recall,
        "precision": round(n_found / max(n_found + n_false, 1), 4),
    }


def measure(data: Path, times: int) -> Json:
    """Clean the books `times` times, each copy with other words, in this process."""
    books = read_sources(data)["books"]
    texts = [
        text if not copy else " ".join(f"{word}{copy}" for word in text.split(" "))
        for copy in range(times)
        for text in books
    ]
    config = CleanConfig()
    n_bytes = sum(len(text.encode()) for text in texts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        report = clean(texts, Path(folder) / "out", config, executor=SerialExecutor())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "times": times,
        "bytes": n_bytes,
        "documents": len(texts),
        "kept": report["kept"]["documents"],
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "mb_per_cpu_s": round(n_bytes / cpu / 1e6, 3),
        "peak_mib_before": round(before / 1024),
        "peak_mib": round(peak / 1024),
    }


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with books")
    parser.add_argument("--times", type=int, help="measure one size in this process")
    parser.add_argument("--skip-sizes", action="store_true", help="measure duplicates only")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if given.times is not None:
        print(json.dumps(measure(given.data, given.times)))
        return
    result: Json = {"machine": machine(), "duplicates": {}, "sizes": []}
    for name, documents in read_sources(given.data).items():
        with tempfile.TemporaryDirectory() as folder:
            result["duplicates"][name] = quality(documents, Path(folder))
        print(name, result["duplicates"][name], flush=True)
    for times in () if given.skip_sizes else (1, 2, 4):
        command = [sys.executable, __file__, "--data", str(given.data), "--times", str(times)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result["sizes"].append(json.loads(answer))
        print(result["sizes"][-1], flush=True)
    result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    output = given.output or HERE / "results" / f"cleaning-cpu-{result['date'][:10]}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
