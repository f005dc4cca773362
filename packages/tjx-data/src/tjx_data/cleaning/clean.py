"""Cleaning of a corpus: kept documents as JSON lines with a report, written resumably."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError, fsync_path, problems_of, write_atomically
from tjx_data.cache import locked
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
from tjx_data.cleaning.near_duplicates import N_VALUES, check_installed, first_of_cluster
from tjx_data.cleaning.report import format_report
from tjx_data.cleaning.rules import RULES, find_masks, find_rules
from tjx_data.corpora.documents import Documents, Part, Progress, Stage, cut_into_parts
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
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Settings of `clean`.

    Attributes
    ----------
    rules : tuple of str
        Quality rules or groups of them: gopher, c4, fineweb, or single names from
        `tjx_data.cleaning.rules.RULES`.
    masks : tuple of str
        Personal data to mask: email, ip, phone.
    exact_duplicates : bool
        Drop documents that an earlier one equals.
    near_duplicates : float or None
        Drop documents whose estimated Jaccard similarity (pairs of words) with an earlier one is at
        least this; None keeps them. Needs the extra ``near-duplicates``.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    rules: tuple[str, ...] = ("gopher", "c4", "fineweb")
    masks: tuple[str, ...] = ("email", "ip")
    exact_duplicates: bool = True
    near_duplicates: float | None = 0.3

    def __post_init__(self) -> None:
        problems: list[Any] = []
        for find, names in ((find_rules, self.rules), (find_masks, self.masks)):
            try:
                find(names)
            except ValueError as error:
                problems += problems_of(error)
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            problems.append(
                f"near_duplicates: got {self.near_duplicates}; expected above 0 and at most 1, "
                "such as 0.3"
            )
        if problems:
            raise ConfigError(problems)


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
    documents and a memory-mapped file of 768 bytes per document.

    Parameters
    ----------
    documents : Documents or Iterable[str]
        Whole documents, for example `load_files`.
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
        If `out_dir` is not empty, or the extra for near-duplicates is not installed.

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
            rules=tuple(rule.name for rule in find_rules(config.rules)),
            masks=tuple(mask.name for mask in find_masks(config.masks)),
            evaluation=evaluation,
            with_signatures=config.near_duplicates is not None,
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
    dropped = dict(record.dropped)
    n_kept = n_bytes = number = 0
    kept: list[str] = []
    with (work / "out" / DOCUMENTS_FILE).open("w", encoding="utf-8") as out:
        for file in files:
            for text in kept_texts(read_arrays(file)):
                size = len(text.encode())
                if reason := reasons[number]:
                    name = ("", "exact-duplicate", "near-duplicate")[reason]
                    add_dropped(dropped, name, size, text)
                else:
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    n_kept, n_bytes = n_kept + 1, n_bytes + size
                    kept = kept if len(kept) == N_EXAMPLES else [*kept, text[:EXAMPLE_CHARACTERS]]
                number += 1
    fsync_path(work / "out" / DOCUMENTS_FILE)
    order = ["malformed", "empty", "contaminated", *(rule.name for rule in RULES)]
    order += ["exact-duplicate", "near-duplicate"]
    return {
        "read": {"documents": record.n_documents, "bytes": record.n_bytes},
        "kept": {"documents": n_kept, "bytes": n_bytes, "examples": kept},
        "dropped": {
            reason: dict(zip(("documents", "bytes", "examples"), dropped[reason], strict=True))
            for reason in order
            if reason in dropped
        },
        "masked": record.masked,
    }


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
