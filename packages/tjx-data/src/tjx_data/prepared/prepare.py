"""Documents to a prepared set: tokens in shards, with an index, written whole or not at all."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import get_args

from tjx_data.atomic import sync_folder, write_atomically
from tjx_data.cache import locked
from tjx_data.corpora.documents import (
    Documents,
    Holdout,
    Part,
    Progress,
    SplitName,
    Stage,
    border,
    cut,
)
from tjx_data.prepared.assembly import PrepareSettings, assemble, part_file
from tjx_data.prepared.executors import SerialExecutor, available_cpus, process_pool
from tjx_data.prepared.index import FORMAT, INDEX_FILE, TOKENIZER_FILE, Index, read_index
from tjx_data.prepared.tokenize_parts import (
    PartRecord,
    PartTask,
    count_characters,
    part_identity,
    read_record,
    tokenize_part,
)
from tjx_data.tokenization.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
PLAN_FILE = "plan.json"  # without it nothing in a work folder is gone on from


def prepare(
    documents: Documents | Iterable[str],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    holdout: Holdout = "documents",
    holdout_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    strict: bool = False,
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Turn documents into token shards with an index; see `tjx_data.prepared.index` for the files.

    The same documents and tokenizer give the same bytes, whoever works on them and however many.
    `out_dir` appears when the set is complete. Until then what is finished lies in a folder beside
    it, so that a call after a kill goes on where the last one stopped.

    Parameters
    ----------
    documents : Documents or Iterable[str]
        Whole documents. What can be read only once cannot be split by "tail".
    tokenizer : Tokenizer
        If it has an end-of-text token, that stands before the first document and after each.
    out_dir : str or Path
        A folder that does not exist yet, or is empty.
    holdout : {"documents", "tail", "official"}
        How validation is split off. "documents": by the hash of each document. "tail": the last
        characters of the whole text, as nanoGPT splits one long text; a document that the border
        crosses is cut in two. "official": validation is ``documents.held_out``, and training all
        the rest.
    holdout_fraction : float
        The share of the documents or of the characters that is held out, between 0 and 1.
    shard_tokens : int
        Tokens in a shard.
    strict : bool
        Whether a malformed record is an error; else it is counted and listed.
    executor : concurrent.futures.Executor, optional
        Who does the work: processes, or other machines, which must reach the folder of `out_dir`
        (and the files of the corpus) by the same path. None is a process for each core, where
        there is work for more than one.
    in_flight : int, optional
        Parts of the corpus, of about 2 MB, that are handed out at a time; None is two for each
        core of this machine.
    progress : Progress, optional
        Told the bytes of text and the tokens that are done.

    Returns
    -------
    Index
        What was written.

    Raises
    ------
    ValueError
        If a setting is wrong, `out_dir` holds something, a document cannot be tokenised, or a
        split is left without a document.
    """
    settings = PrepareSettings(holdout, holdout_fraction, shard_tokens, strict)
    out_dir = Path(out_dir).absolute()
    _check(settings, out_dir)
    if not isinstance(documents, Documents):
        documents = _from_iterable(documents, holdout)
    if holdout == "official" and documents.held_out is None:
        raise ValueError(
            "holdout: got 'official' for documents without held_out; expected a corpus that has an "
            "official validation split; choose documents or tail"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_file(out_dir)):
        _check(settings, out_dir)  # another process may have made it while this one waited
        work = work_folder(out_dir)
        _begin(work, documents.source, tokenizer, settings)
        parts = iter(_parts(documents, settings))
        first = list(islice(parts, 2))
        chosen: AbstractContextManager[Executor] = nullcontext(executor or SerialExecutor())
        if executor is None and len(first) > 1:
            chosen = process_pool()
        try:
            with chosen as workers:
                crew = _Crew(
                    workers, in_flight or 2 * available_cpus(), documents.n_bytes, progress
                )
                records = crew.tokenize(chain(first, parts), documents, work, settings)
            index = assemble(work, records, documents.source, tokenizer, settings)
        except ValueError:  # a mistake that is mended by other documents or settings
            _discard(work)
            raise
        if out_dir.exists():
            out_dir.rmdir()
        (work / "set").rename(out_dir)
        sync_folder(out_dir.parent)
        _discard(work)
    return index


def work_folder(out_dir: Path) -> Path:
    """Return the folder of what is finished of a set that is being made."""
    return out_dir.with_name(f".{out_dir.name}.work")


def lock_file(out_dir: Path) -> Path:
    """Return the file whose lock is held by the process that makes a set."""
    return out_dir.with_name(f".{out_dir.name}.lock")


def is_prepared(directory: Path) -> bool:
    """Tell whether a folder holds a prepared set; a damaged one is an error, not a no."""
    if not (directory / INDEX_FILE).exists():
        return False
    read_index(directory)
    return True


def _check(settings: PrepareSettings, out_dir: Path) -> None:
    problems = []
    if settings.holdout not in get_args(Holdout):
        choices = " or ".join(get_args(Holdout))
        problems.append(f"holdout={settings.holdout!r} is unknown; choose {choices}")
    if not 0 < settings.holdout_fraction < 1:
        problems.append(
            f"holdout_fraction={settings.holdout_fraction}: choose a number between 0 and 1"
        )
    if settings.shard_tokens < 1:
        problems.append(f"shard_tokens={settings.shard_tokens}: a shard holds at least 1 token")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        problems.append(f"{out_dir} exists and is not an empty folder; remove it or name another")
    if problems:
        raise ValueError("\n".join(problems))


def _parts(documents: Documents, settings: PrepareSettings) -> Iterator[tuple[Part, SplitName]]:
    """Yield all parts; of an official split, which it is of."""
    for part in documents.parts():
        yield part, "train"
    if settings.holdout == "official":
        assert documents.held_out is not None
        for part in documents.held_out():
            yield part, "validation"


def _from_iterable(documents: Iterable[str], holdout: Holdout) -> Documents:
    if iter(documents) is documents and holdout == "tail":
        raise ValueError(
            "holdout='tail' reads the documents twice, to count their characters first: "
            f"give a list or a tjx_data.Documents, not a {type(documents).__name__}"
        )
    return Documents({}, lambda: cut(documents))


def _discard(work: Path) -> None:
    """Delete the folder of what is finished; killed on the way, it leaves none to go on from."""
    (work / PLAN_FILE).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


def _begin(
    work: Path, source: Mapping[str, str], tokenizer: Tokenizer, settings: PrepareSettings
) -> None:
    """Make the folder of what is finished, or keep it if it is of the same plan."""
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


class _Crew:
    """Hands parts out to an executor, a bounded number at a time."""

    def __init__(
        self, executor: Executor, in_flight: int, n_bytes: int | None, progress: Progress | None
    ):
        self._executor, self._in_flight = executor, in_flight
        self._n_bytes, self._progress = n_bytes, progress
        self._done_bytes = self._done_tokens = 0
        self._pending: dict[Future[PartRecord], int] = {}
        self._records: dict[int, PartRecord] = {}

    def tokenize(
        self,
        parts: Iterable[tuple[Part, SplitName]],
        documents: Documents,
        work: Path,
        settings: PrepareSettings,
    ) -> list[PartRecord]:
        """Return the records of all parts in order; their files are in the work folder."""
        for number, task in enumerate(self._tasks(parts, documents, work, settings)):
            found = read_record(task.file)
            if found is not None and found.identity == part_identity(task):
                self._finished(number, found)
                continue
            while len(self._pending) >= self._in_flight:
                self._collect()
            self._pending[self._executor.submit(tokenize_part, task)] = number
        while self._pending:
            self._collect()
        return [record for _, record in sorted(self._records.items())]

    def _tasks(
        self,
        parts: Iterable[tuple[Part, SplitName]],
        documents: Documents,
        work: Path,
        settings: PrepareSettings,
    ) -> Iterator[PartTask]:
        if settings.holdout == "tail":
            counts = [count_characters(part) for part, _ in parts]
            n_train = border(sum(counts), settings.holdout_fraction)
            before = accumulate(counts, initial=0)
            numbered = (
                (part, split, n_train - n)
                for (part, split), n in zip(_parts(documents, settings), before, strict=False)
            )
        else:
            numbered = ((part, split, 0) for part, split in parts)
        for number, (part, split, n_train_characters) in enumerate(numbered):
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
            self._finished(self._pending.pop(future), future.result())

    def _finished(self, number: int, record: PartRecord) -> None:
        self._records[number] = record
        self._done_bytes += sum(record.n_text_bytes.values())
        self._done_tokens += record.n_tokens
        if self._progress is not None:
            stage = Stage("write shards", self._done_bytes, self._n_bytes, self._done_tokens)
            self._progress(stage)
