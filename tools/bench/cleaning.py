"""Benchmark `tjx_data.clean`: duplicates found, throughput and memory; write JSON.

    python tools/bench/cleaning.py --data DATA

requires tjx-data[near-duplicates] (or PYTHONPATH of its src) on Linux. DATA has ``books/*.txt``,
``tinystories_2M.txt`` and ``wikitext2/test.raw.txt``. Planted are: copies of some documents with 5
to 20 % of their words substituted, deleted or inserted; evaluation texts, some of them in capitals,
without punctuation and in other lines; and exact spans of other documents. Throughput and memory
are measured for 1, 2 and 4 times the data, whose copies have other words.
"""

import argparse
import datetime
import json
import platform
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import numpy as np
from turns import Json, machine

import tjx_data
from tjx_data import clean, load_files
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.prepared.executors import SerialExecutor

HERE = Path(__file__).resolve().parent
DOCUMENT_CHARACTERS = 2500
FRACTIONS = (0.05, 0.1, 0.15, 0.2)
CHARACTER_FRACTIONS = (0.02, 0.05, 0.1)
CONFIG = CleanConfig(rules=(), masks=())
SPAN_BYTES = 200
TIMES = (1, 2, 4)


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


def edited(text: str, fraction: float, rng: random.Random, *, words: list[str]) -> str:
    """Substitute, delete or insert a fraction of the words of a text."""
    found = text.split(" ")
    for _ in range(max(1, round(fraction * len(found)))):
        i, kind = rng.randrange(len(found)), rng.randrange(3)
        found[i : i + (kind != 0)] = [] if kind == 1 and len(found) > 1 else [rng.choice(words)]
    return " ".join(found)


def misspelled(text: str, fraction: float, rng: random.Random) -> str:
    """Substitute, delete or insert a fraction of the characters of a text."""
    found = list(text)
    for _ in range(max(1, round(fraction * len(found)))):
        i, kind = rng.randrange(len(found)), rng.randrange(3)
        found[i : i + (kind != 0)] = [] if kind == 1 else [rng.choice(string.ascii_lowercase)]
    return "".join(found)


def clean_texts(
    texts: list[str], folder: Path, config: CleanConfig, evaluation: list[str] | None = None
) -> tuple[Json, list[str]]:
    """Clean documents in this process; return the report and the kept texts."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        report = clean(
            texts,
            Path(out) / "out",
            config,
            evaluation=evaluation or (),
            executor=SerialExecutor(),
        )
        lines = (Path(out) / "out" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return report, [json.loads(line)["text"] for line in lines]


def find_near_duplicates(
    documents: list[str],
    folder: Path,
    seed: int,
    edit: Callable[[str, float, random.Random], str],
    fractions: tuple[float, ...],
) -> Json:
    """Plant near-duplicates of a tenth of the documents; return recall and precision."""
    rng = random.Random(seed)  # noqa: S311  test data
    chosen = rng.sample(range(len(documents)), len(documents) // 10)
    copies = [edit(documents[i], fractions[k % len(fractions)], rng) for k, i in enumerate(chosen)]
    kept = set(clean_texts([*documents, *copies], folder, CONFIG)[1])
    n_found = sum(copy not in kept for copy in copies)
    n_false = sum(document not in kept for document in documents)
    recall = {
        f"{100 * fraction:g} %": round(
            sum(copy not in kept for copy in copies[k :: len(fractions)])
            / len(copies[k :: len(fractions)]),
            4,
        )
        for k, fraction in enumerate(fractions)
    }
    return {
        "seed": seed,
        "documents": len(documents),
        "planted": len(copies),
        "found": n_found,
        "false": n_false,
        "recall": round(n_found / len(copies), 4),
        "recall_by_fraction": recall,
        "precision": round(n_found / max(n_found + n_false, 1), 4),
    }


def find_evaluation_texts(
    documents: list[str], evaluation: list[str], folder: Path, seed: int
) -> Json:
    """Plant an evaluation text into each of some documents; return how many are dropped."""
    rng = random.Random(seed)  # noqa: S311  test data
    hosts = rng.sample(range(len(documents)), len(evaluation))
    texts = list(documents)
    for number, (i, text) in enumerate(zip(hosts, evaluation, strict=True)):
        forms = (
            text,
            text.upper().translate(str.maketrans("", "", string.punctuation)),
            text.replace(" ", "\n"),
        )
        where = rng.randrange(len(texts[i]))
        texts[i] = f"{texts[i][:where]} {forms[number % len(forms)]} {texts[i][where:]}"
    config = CleanConfig(rules=(), masks=(), near_duplicates=None)
    report, kept_texts = clean_texts(texts, folder, config, evaluation)
    kept = set(kept_texts)
    return {
        "seed": seed,
        "planted": len(hosts),
        "dropped": sum(texts[i] not in kept for i in hosts),
        "documents_dropped": report["dropped"]["contaminated"]["documents"],
    }


def find_spans(documents: list[str], folder: Path, seed: int) -> Json:
    """Plant spans of other documents into some; return how many are removed exactly."""
    config = CleanConfig(rules=(), masks=(), near_duplicates=None, repeated_spans=SPAN_BYTES)
    _, before = clean_texts(documents, folder, config)  # without repeats of their own
    before = [text for text in before if len(text) > 4 * SPAN_BYTES]
    rng = random.Random(seed)  # noqa: S311  test data
    half = len(before) // 2
    texts = list(before)
    planted = list(range(half, len(before), 10))
    for i in planted:
        source = before[rng.randrange(half)]
        length = rng.randrange(SPAN_BYTES, 4 * SPAN_BYTES)
        start = rng.randrange(len(source) - length)
        where = rng.randrange(len(texts[i]))
        span = source[start : start + length]
        texts[i] = f"{texts[i][:where]}\0{span}\0{texts[i][where:]}"
    report, after = clean_texts(texts, folder, config)
    restored = [text.replace("\0", "") for text in after]
    same = [a == b for a, b in zip_longest(restored, before)]
    return {
        "seed": seed,
        "planted": len(planted),
        "removed_exactly": sum(same[i] for i in planted),
        "other_documents_changed": same.count(False) - sum(not same[i] for i in planted),
        "bytes_removed": report["cut"]["bytes"],
    }


def write_copies(books: list[str], times: int, file: Path) -> None:
    """Write the books `times` times as JSON lines, each copy with other words."""
    with file.open("w", encoding="utf-8") as out:
        for copy in range(times):
            for text in books:
                words = text if not copy else " ".join(f"{w}{copy}" for w in text.split(" "))
                out.write(json.dumps({"text": words}) + "\n")


def peak_mib() -> int:
    """Return the peak memory of this process; that of getrusage includes its parent's."""
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return round(int(kib) / 1024)


def measure(file: Path) -> Json:
    """Clean a file with all stages in this process."""
    before = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        config = CleanConfig(repeated_spans=SPAN_BYTES)
        report = clean(load_files(file), Path(folder) / "out", config, executor=SerialExecutor())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    n_bytes = report["read"]["bytes"]
    return {
        "bytes": n_bytes,
        "documents": report["read"]["documents"],
        "kept": report["kept"]["documents"],
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "mb_per_cpu_s": round(n_bytes / cpu / 1e6, 3),
        "peak_mib_before": before,
        "peak_mib": peak_mib(),
    }


def slopes(sizes: list[Json]) -> Json:
    """Return the exponent of the time over the bytes, and the growth of the peak memory."""
    n_bytes = np.array([size["bytes"] for size in sizes], np.float64)
    cpu = np.array([size["cpu_s"] for size in sizes])
    peak = np.array([size["peak_mib"] for size in sizes])
    return {
        "time_exponent": round(float(np.polyfit(np.log(n_bytes), np.log(cpu), 1)[0]), 3),
        "peak_mib_per_mb": round(float(np.polyfit(n_bytes / 1e6, peak, 1)[0]), 3),
    }


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with books")
    parser.add_argument("--seed", type=int, default=1, help="of the planted texts")
    parser.add_argument("--measure", type=Path, help="clean one file in this process")
    parser.add_argument("--skip-sizes", action="store_true", help="measure planted texts only")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure)))
        return
    if given.data is None:
        parser.error("--data: got none; expected a folder with books")
    versions = {name: version(name) for name in ("numpy", "datasketch")}
    versions |= {"python": platform.python_version(), "tjx-data": tjx_data.__version__}
    result: Json = {"machine": machine(), "versions": versions, "duplicates": {}, "spans": {}}
    sources = read_sources(given.data)
    lines = (given.data / "wikitext2" / "test.raw.txt").read_text(encoding="utf-8").splitlines()
    evaluation = [line.strip() for line in lines if 13 <= len(re.findall("[a-z]+", line)) <= 120]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, documents in sources.items():
            words = " ".join(documents[::10]).split()
            edits: dict[str, tuple[Callable[..., str], tuple[float, ...]]] = {
                "words": (partial(edited, words=words), FRACTIONS),
                "characters": (misspelled, CHARACTER_FRACTIONS),
            }
            for unit, edit in edits.items():
                found = find_near_duplicates(documents, folder, given.seed, *edit)
                result["duplicates"].setdefault(source, {})[unit] = found
                print(source, unit, found, flush=True)
            result["spans"][source] = find_spans(documents, folder, given.seed)
            print(source, result["spans"][source], flush=True)
        documents = sources["tinystories"]
        found = find_evaluation_texts(documents, evaluation[:300], folder, given.seed)
        result["evaluation"] = found
        print(found, flush=True)
        for times in () if given.skip_sizes else TIMES:
            write_copies(sources["books"], times, folder / "texts.jsonl")
            command = [sys.executable, __file__, "--measure", str(folder / "texts.jsonl")]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result.setdefault("sizes", []).append({"times": times, **json.loads(answer)})
            print(result["sizes"][-1], flush=True)
    if "sizes" in result:
        result["slopes"] = slopes(result["sizes"])
        print(result["slopes"], flush=True)
    result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    output = given.output or HERE / "results" / f"cleaning-cpu-{result['date'][:10]}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
