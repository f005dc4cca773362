"""Preparation of documents: token shards with an index, written atomically and resumably."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import get_args

from tjx_core import ConfigError, fsync_path, write_atomically
from tjx_data.cache import locked
from tjx_data.corpora.documents import (
    Documents,
    Holdout,
    Part,
    Progress,
    SplitName,
    Stage,
    count_training_characters,
    cut_into_parts,
)
from tjx_data.prepared.assembly import PrepareSettings, assemble, part_file
from tjx_data.prepared.executors import SerialExecutor, available_cpus, process_pool
from tjx_data.prepared.index import FORMAT, INDEX_FILE, TOKENIZER_FILE, Index, read_index
from tjx_data.prepared.token_budget import TokenBudget
from tjx_data.prepared.tokenize_parts import (
    PartRecord,
    PartTask,
    count_characters,
    part_identity,
    read_record,
    tokenize_part,
)
from tjx_data.tokenization.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27
"""Tokens per shard by default: 256 MiB of uint16."""
PLAN_FILE = "plan.json"
"""File of the settings of a work folder; a folder without it is not resumed from."""


def prepare(
    documents: Documents | Iterable[str],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    holdout: Holdout = "documents",
    holdout_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    strict: bool = False,
    max_tokens: int | None = None,
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Tokenize documents into shards with an index (layout: `tjx_data.prepared.index`).

    The output is a deterministic function of documents, tokenizer and settings, independent of the
    executor. `out_dir` is created when the set is complete; until then finished parts are kept in a
    work folder beside it, so that a repeated call resumes after a kill.

    Parameters
    ----------
    documents : Documents or Iterable[str]
        Whole documents. An iterator cannot be split by "tail", which reads them twice.
    tokenizer : Tokenizer
        Its end-of-text token, if any, is written before the first document and after each.
    out_dir : str or Path
        A folder that is missing or empty.
    holdout : {"documents", "tail", "official"}
        How the validation split is made. "documents": by the hash of each document. "tail": the
        last characters of the text, as nanoGPT splits one long text; a document that crosses the
        border is cut in two. "official": ``documents.held_out``.
    holdout_fraction : float
        Share of the documents or characters held out, between 0 and 1.
    shard_tokens : int
        Tokens per shard.
    strict : bool
        Whether a malformed record is an error; else it is counted and listed.
    max_tokens : int, optional
        Most training tokens: those at the start of the corpus, whose last document may be cut. The
        rest of the corpus is not read, except with "tail".
    executor : concurrent.futures.Executor, optional
        Runs the parts, on processes or on other machines that reach `out_dir` and the corpus by the
        same paths. By default one process per core, if there is more than one part.
    in_flight : int, optional
        Parts of about 2 MB submitted at a time; by default two per core of this machine.
    progress : Progress, optional
        Called with the bytes of text and the tokens finished.

    Returns
    -------
    Index
        Index of the written set.

    Raises
    ------
    ValueError
        If a setting is invalid, `out_dir` is not empty, a document cannot be tokenized, or a split
        has no document.

    Examples
    --------
    >>> import tempfile
    >>> from tjx_data import byte_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prepare(["a", "b", "c"], byte_tokenizer(), f"{folder}/set", holdout="tail",
    ...             holdout_fraction=0.4).splits["train"].n_documents
    1
    """
    settings = PrepareSettings(holdout, holdout_fraction, shard_tokens, strict, max_tokens)
    out_dir = Path(out_dir).absolute()
    _check(settings, out_dir)
    if not isinstance(documents, Documents):
        documents = _from_iterable(documents, holdout)
    if holdout == "official" and documents.held_out is None:
        raise ValueError(
            "holdout: got 'official' for documents without held_out; expected a corpus that has an "
            "official validation split; choose documents or tail"
        )
    if max_tokens is not None:
        source = {**documents.source, "max_tokens": str(max_tokens)}
        documents = replace(documents, source=source)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(out_dir.with_name(f".{out_dir.name}.lock")):
        _check(settings, out_dir)  # another process may have finished while this one waited
        work = work_folder(out_dir)
        _begin(work, documents.source, tokenizer, settings)
        budget = TokenBudget(max_tokens, holdout)
        parts = iter(_parts(documents, settings, budget))
        first = list(islice(parts, 2))
        chosen: AbstractContextManager[Executor] = nullcontext(executor or SerialExecutor())
        if executor is None and len(first) > 1:
            chosen = process_pool()
        try:
            with chosen as workers:
                n_in_flight = in_flight or 2 * available_cpus()
                scheduler = _PartScheduler(
                    workers, n_in_flight, budget, documents.n_bytes, progress
                )
                records = scheduler.tokenize(chain(first, parts), documents, work, settings)
            index = assemble(work, records, documents.source, tokenizer, settings)
        except ValueError:  # other documents or settings are needed: nothing to resume
            _discard(work)
            raise
        if out_dir.exists():
            out_dir.rmdir()
        (work / "set").rename(out_dir)
        fsync_path(out_dir.parent)
        _discard(work)
    return index


def work_folder(out_dir: Path) -> Path:
    """Return the folder of finished parts of an incomplete set."""
    return out_dir.with_name(f".{out_dir.name}.work")


def is_prepared(directory: Path) -> bool:
    """Return whether a folder holds a prepared set; raise ValueError if its index is damaged."""
    if not (directory / INDEX_FILE).exists():
        return False
    read_index(directory)
    return True


def _check(settings: PrepareSettings, out_dir: Path) -> None:
    problems = []
    if settings.holdout not in get_args(Holdout):
        choices = ", ".join(get_args(Holdout))
        problems.append(f"holdout: got {settings.holdout!r}; expected one of {choices}")
    if not 0 < settings.holdout_fraction < 1:
        problems.append(
            f"holdout_fraction: got {settings.holdout_fraction}; expected a number between 0 and 1"
        )
    if settings.max_tokens is not None and settings.max_tokens < 3:
        problems.append(f"max_tokens: got {settings.max_tokens}; expected at least 3")
    if settings.shard_tokens < 1:
        problems.append(f"shard_tokens: got {settings.shard_tokens}; expected at least 1")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        problems.append(
            f"out_dir: got {out_dir}, which is not an empty folder; remove it or name another"
        )
    if problems:
        raise ConfigError(problems)


def _parts(
    documents: Documents, settings: PrepareSettings, budget: TokenBudget
) -> Iterator[tuple[Part, SplitName]]:
    """Yield the needed parts with their split, which has a meaning for holdout "official" only."""
    for part in documents.parts():
        if budget.reached:
            break
        yield part, "train"
    if settings.holdout == "official":
        assert documents.held_out is not None
        for part in documents.held_out():
            yield part, "validation"


def _from_iterable(documents: Iterable[str], holdout: Holdout) -> Documents:
    if iter(documents) is documents and holdout == "tail":
        raise ValueError(
            f"documents: got a {type(documents).__name__}; holdout='tail' reads the documents "
            "twice, to count their characters; give a list or tjx_data.Documents"
        )
    return Documents({}, lambda: cut_into_parts(documents))


def _discard(work: Path) -> None:
    """Delete a work folder; its plan first, so that a kill in between leaves none to resume."""
    (work / PLAN_FILE).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


def _begin(
    work: Path, source: Mapping[str, str], tokenizer: Tokenizer, settings: PrepareSettings
) -> None:
    """Create the work folder, or keep one with the same plan."""
    plan = json.dumps(
        {
            "format": FORMAT,
            "source": dict(source),
            "tokenizer": tokenizer.fingerprint,
            "holdout": settings.holdout,
            "holdout_fraction": settings.holdout_fraction,
            "strict": settings.strict,
        }
    ).encode()
    file = work / PLAN_FILE
    if not file.is_file() or file.read_bytes() != plan:
        _discard(work)
        work.mkdir()
        tokenizer.save(work / TOKENIZER_FILE)
        write_atomically(file, plan)
    shutil.rmtree(work / "set", ignore_errors=True)


class _PartScheduler:
    """Submit parts to an executor, a bounded number at a time."""

    def __init__(
        self,
        executor: Executor,
        in_flight: int,
        budget: TokenBudget,
        n_bytes: int | None,
        progress: Progress | None,
    ):
        self._executor, self._in_flight, self._budget = executor, in_flight, budget
        self._n_bytes, self._progress = n_bytes, progress
        self._done_bytes = self._done_tokens = 0
        self._pending: dict[Future[PartRecord], tuple[int, SplitName]] = {}
        self._records: dict[int, PartRecord] = {}

    def tokenize(
        self,
        parts: Iterable[tuple[Part, SplitName]],
        documents: Documents,
        work: Path,
        settings: PrepareSettings,
    ) -> dict[int, PartRecord]:
        """Tokenize the needed parts into the work folder; return their records in order."""
        splits: dict[int, SplitName] = {}
        for number, task in enumerate(self._tasks(parts, documents, work, settings)):
            splits[number] = task.split
            found = read_record(task.file)
            if found is not None and found.identity == part_identity(task):
                self._finish(number, task.split, found)
                continue
            while len(self._pending) >= self._in_flight:
                self._collect()
            self._pending[self._executor.submit(tokenize_part, task)] = number, task.split
        while self._pending:
            self._collect()
        return {
            number: record
            for number, record in sorted(self._records.items())
            if self._budget.needs(number, splits[number])
        }

    def _tasks(
        self,
        parts: Iterable[tuple[Part, SplitName]],
        documents: Documents,
        work: Path,
        settings: PrepareSettings,
    ) -> Iterator[PartTask]:
        if settings.holdout == "tail":
            counts = [count_characters(part) for part, _ in parts]
            n_train = count_training_characters(sum(counts), settings.holdout_fraction)
            before = accumulate(counts, initial=0)
            with_counts = (
                (part, split, n_train - n)
                for (part, split), n in zip(
                    _parts(documents, settings, self._budget), before, strict=False
                )
            )
        else:
            with_counts = ((part, split, 0) for part, split in parts)
        for number, (part, split, n_train_characters) in enumerate(with_counts):
            yield PartTask(
                part=part,
                split=split,
                tokenizer=work / TOKENIZER_FILE,
                file=part_file(work, number),
                holdout=settings.holdout,
                holdout_fraction=settings.holdout_fraction,
                n_train_characters=n_train_characters,
                strict=settings.strict,
            )

    def _collect(self) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            self._finish(*self._pending.pop(future), future.result())

    def _finish(self, number: int, split: SplitName, record: PartRecord) -> None:
        self._records[number] = record
        self._budget.add(number, split, record)
        self._done_bytes += sum(record.n_text_bytes.values())
        self._done_tokens += record.n_tokens
        if self._progress is not None:
            stage = Stage("write shards", self._done_bytes, self._n_bytes, self._done_tokens)
            self._progress(stage)
