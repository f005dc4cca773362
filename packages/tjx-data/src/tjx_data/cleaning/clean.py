"""Cleaning of a corpus: kept documents as JSON lines with a report, written resumably."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_core import fsync_path, write_atomically
from tjx_data.cache import locked
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.cleaning.clean_parts import (
    EXAMPLE_CHARACTERS,
    N_EXAMPLES,
    CleanRecord,
    CleanTask,
    add_dropped,
    clean_part,
    kept_texts,
    read_clean_record,
)
from tjx_data.cleaning.contamination import index_evaluation_texts
from tjx_data.cleaning.language import find_identifier
from tjx_data.cleaning.near_duplicates import N_VALUES, check_installed, first_of_cluster
from tjx_data.cleaning.repeated_spans import Texts, cut_spans, find_repeated_spans
from tjx_data.cleaning.report import format_report
from tjx_data.cleaning.rules import RULES
from tjx_data.corpora.documents import (
    Documents,
    Part,
    Progress,
    Stage,
    cut_into_parts,
    is_empty,
)
from tjx_data.prepared.executors import (
    SerialExecutor,
    available_cpus,
    process_pool,
    run_in_order,
)
from tjx_data.prepared.npz import read_arrays, write_arrays

DOCUMENTS_FILE = "documents.jsonl"
REPORT_FILE = "report.json"
HTML_FILE = "report.html"
_PLAN_FILE = "plan.json"
_FORMAT = 2


def clean(
    documents: Documents | Iterable[str],
    out_dir: str | Path,
    config: CleanConfig | None = None,
    *,
    evaluation: Iterable[str] = (),
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Drop bad and repeated documents; write the others and a report.

    `out_dir` gets ``documents.jsonl`` (one object with "text" per line, in the order of the
    corpus), ``report.json`` and ``report.html``. They are a deterministic function of documents and
    settings, independent of the executor. Finished parts are kept in a work folder beside `out_dir`
    until all is written, so that a repeated call resumes after a kill. Parts are cleaned in
    parallel; this process then searches duplicates, in memory proportional to the number of
    documents and a memory-mapped file of 768 bytes per document, and repeated spans, in the memory
    that `repeated_spans` states.

    Parameters
    ----------
    documents : Documents or Iterable[str]
        Whole documents, for example `load_files`. With a `min_score` each begins with a line of
        its score, as ``text_field=scored_text("text", column)`` gives it.
    out_dir : str or Path
        A folder that is missing or empty.
    config : CleanConfig, optional
        Settings.
    evaluation : Iterable[str]
        Evaluation texts: documents that share 13 consecutive words with one are dropped, or a whole
        one of 5 to 12 words.
    executor, in_flight, progress
        As of `prepare`.

    Returns
    -------
    dict
        The report.

    Raises
    ------
    ValueError
        If `out_dir` is not empty, the extra for near-duplicates is not installed, or there is no
        such function to identify languages.

    Examples
    --------
    >>> import tempfile
    >>> config = CleanConfig(rules=(), near_duplicates=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     clean(["a", "b", "a"], f"{folder}/out", config)["kept"]["documents"]
    2
    """
    config = config or CleanConfig()
    out_dir = Path(out_dir).absolute()
    if config.near_duplicates is not None:
        check_installed()
    if config.language_identifier is not None:
        find_identifier(config.language_identifier)
    if not isinstance(documents, Documents):
        texts = documents
        documents = Documents({}, lambda: cut_into_parts(texts))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(out_dir.with_name(f".{out_dir.name}.lock")):
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ValueError(
                f"out_dir: got {out_dir}, which is not an empty folder; remove it or name another"
            )
        work = out_dir.with_name(f".{out_dir.name}.work")
        index, n_short = index_evaluation_texts(evaluation)
        identity = {str(n): hashlib.sha256(found).hexdigest() for n, found in index.items()}
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        _begin(work, {"format": _FORMAT, **asdict(config), "evaluation": digest})
        file = work / f"evaluation_{digest}.npz" if index else None
        if file is not None:
            write_arrays(file, {str(n): found for n, found in index.items()})
        tasks = _tasks(documents.parts(), work, config, file)
        files, record = _clean_parts(tasks, executor, in_flight, documents.n_bytes, progress)
        report = {
            "source": dict(documents.source),
            "settings": {**asdict(config), "evaluation_ngrams": sum(map(len, index.values()))},
            "short_evaluation_texts": n_short,
            **_write(work, files, record, config),
        }
        made = work / "out"
        write_atomically(made / REPORT_FILE, json.dumps(report, indent=1) + "\n")
        write_atomically(made / HTML_FILE, format_report(report))
        if out_dir.exists():
            out_dir.rmdir()
        made.rename(out_dir)
        fsync_path(out_dir.parent)
        shutil.rmtree(work)
    return report


def _begin(work: Path, plan: dict[str, Any]) -> None:
    """Create the work folder, or keep one of the same settings."""
    file, content = work / _PLAN_FILE, json.dumps(plan).encode()
    if not file.is_file() or file.read_bytes() != content:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_atomically(file, content)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()


def _tasks(
    parts: Iterable[Part], work: Path, config: CleanConfig, evaluation: Path | None
) -> Iterator[CleanTask]:
    for number, part in enumerate(parts):
        yield CleanTask(
            part=part,
            file=work / f"part_{number:06d}.npz",
            config=config,
            evaluation=evaluation,
        )


def _clean_parts(
    tasks: Iterator[CleanTask],
    executor: Executor | None,
    in_flight: int | None,
    n_bytes: int | None,
    progress: Progress | None,
) -> tuple[list[Path], CleanRecord]:
    """Clean the parts that are not finished; return all files and the sum of their records."""
    files: list[Path] = []
    first = list(islice(tasks, 2))
    chosen: AbstractContextManager[Executor] = nullcontext(executor or SerialExecutor())
    if executor is None and len(first) > 1:
        chosen = process_pool()
    total = CleanRecord(identity="", n_documents=0, n_bytes=0, dropped={}, masked={})
    with chosen as workers:

        def remaining() -> Iterator[tuple[CleanTask, CleanRecord | None]]:
            for task in chain(first, tasks):
                files.append(task.file)
                found = read_clean_record(task.file)
                same = found is not None and found.identity == task.part.identity
                yield task, found if same else None

        for record in run_in_order(
            workers, clean_part, remaining(), in_flight or 2 * available_cpus()
        ):
            total = _sum(total, record)
            if progress is not None:
                progress(Stage("clean documents", total.n_bytes, n_bytes))
    return files, total


def _sum(total: CleanRecord, record: CleanRecord) -> CleanRecord:
    dropped = dict(total.dropped)
    for reason, (count, n_bytes, examples) in record.dropped.items():
        before, bytes_before, shown = dropped.get(reason, (0, 0, []))
        shown = [*shown, *examples][:N_EXAMPLES]
        dropped[reason] = before + count, bytes_before + n_bytes, shown
    return CleanRecord(
        identity="",
        n_documents=total.n_documents + record.n_documents,
        n_bytes=total.n_bytes + record.n_bytes,
        dropped=dropped,
        masked=dict(Counter(total.masked) + Counter(record.masked)),
    )


def _write(
    work: Path, files: list[Path], record: CleanRecord, config: CleanConfig
) -> dict[str, Any]:
    """Write the kept documents; return their counts and those of the dropped ones by reason."""
    reasons = _duplicates(work, files, config)
    spans = _repeated_spans(files, reasons, config)
    dropped = dict(record.dropped)
    kept, cut = Counter[str](), Counter[str]()
    examples: list[str] = []
    cut_examples: list[str] = []
    with (work / "out" / DOCUMENTS_FILE).open("w", encoding="utf-8") as out:
        for number, (whole, text, removed) in enumerate(_cut_texts(files, spans)):
            name = ("", "exact-duplicate", "near-duplicate")[reasons[number]]
            if name or is_empty(text):
                add_dropped(dropped, name or "repeated", len(whole.encode()), whole)
                continue
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size = len(text.encode())
            kept.update(documents=1, bytes=size)
            cut.update(
                documents=bool(removed), spans=len(removed), bytes=len(whole.encode()) - size
            )
            examples += [text[:EXAMPLE_CHARACTERS]][: N_EXAMPLES - len(examples)]
            shown = (span[:EXAMPLE_CHARACTERS] for span in removed)
            cut_examples += islice(shown, N_EXAMPLES - len(cut_examples))
    fsync_path(work / "out" / DOCUMENTS_FILE)
    order = ["malformed", "empty", "score", "language", "contaminated"]
    order += [*(rule.name for rule in RULES), "exact-duplicate", "near-duplicate", "repeated"]
    return {
        "read": {"documents": record.n_documents, "bytes": record.n_bytes},
        "kept": {**_counts(kept, "documents", "bytes"), "examples": examples},
        "dropped": {
            reason: dict(zip(("documents", "bytes", "examples"), dropped[reason], strict=True))
            for reason in order
            if reason in dropped
        },
        "masked": record.masked,
        "cut": {**_counts(cut, "documents", "spans", "bytes"), "examples": cut_examples},
    }


def _counts(counter: Counter[str], *names: str) -> dict[str, int]:
    return {name: counter[name] for name in names}


def _cut_texts(
    files: list[Path], spans: npt.NDArray[np.int64]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each document whole and without its repeated spans, and these spans."""
    position = 0
    for file in files:
        for whole in kept_texts(read_arrays(file)):
            content = whole.encode()
            first, last = np.searchsorted(spans[:, 0], (position, position + len(content)))
            own = spans[first:last] - position
            position += len(content)
            removed = [content[start:end].decode(errors="ignore") for start, end in own.tolist()]
            yield whole, cut_spans(content, own).decode() if removed else whole, removed


def _repeated_spans(
    files: list[Path], reasons: npt.NDArray[np.int8], config: CleanConfig
) -> npt.NDArray[np.int64]:
    """Return the spans to remove, in the text of all files one after another, int64 [spans, 2]."""
    if config.repeated_spans is None:
        return np.zeros((0, 2), np.int64)

    def parts() -> Iterator[Texts]:
        first = 0
        for file in files:
            arrays = read_arrays(file)
            last = first + len(arrays["lengths"])
            yield Texts(arrays["text"], arrays["lengths"], reasons[first:last] == 0)
            first = last

    return find_repeated_spans(parts, config.repeated_spans)


def _duplicates(work: Path, files: list[Path], config: CleanConfig) -> npt.NDArray[np.int8]:
    """Return 0, 1 (exact duplicate) or 2 (near-duplicate) for each document in the parts' files."""
    digests = [read_arrays(file)["digests"] for file in files]
    together = np.concatenate([np.zeros((0, 16), np.uint8), *digests])
    count = len(together)
    reasons = np.zeros(count, np.int8)
    if config.exact_duplicates:
        keys = np.ascontiguousarray(together).view("V16")[:, 0]
        repeated = np.ones(count, bool)
        repeated[np.unique(keys, return_index=True)[1]] = False
        reasons[repeated] = 1
    if config.near_duplicates is not None and count:
        signatures = np.lib.format.open_memmap(
            work / "signatures.npy", "w+", np.uint32, (count, N_VALUES)
        )
        start = 0
        for file in files:
            some = read_arrays(file)["signatures"]
            signatures[start : start + len(some)] = some
            start += len(some)
        near = first_of_cluster(signatures, config.near_duplicates) != np.arange(count)
        reasons[near & (reasons == 0)] = 2
    return reasons
