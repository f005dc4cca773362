"""Cache of prepared sets: find the sets of a `DataConfig`, or create them."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tjx_core import ConfigError, Problem, problems_of
from tjx_data.cache import default_cache_dir, locked
from tjx_data.config import DataConfig
from tjx_data.conversations.built_in_templates import CHAT_TOKENS
from tjx_data.corpora.document_limits import limit_documents
from tjx_data.corpora.documents import (
    Documents,
    Holdout,
    Progress,
    fraction_of_few,
    has_both_splits,
    training_texts,
)
from tjx_data.corpora.files import find_file_problems, load_files
from tjx_data.corpora.registry import corpus_source, load_corpus
from tjx_data.loading.token_splits import token_file_problems
from tjx_data.prepared.index import FORMAT
from tjx_data.prepared.packing import open_packing
from tjx_data.prepared.prepare import is_prepared, prepare, work_folder
from tjx_data.prepared.tokenize_parts import SPLITS
from tjx_data.tokenization.builders import byte_tokenizer, char_tokenizer, train_bpe
from tjx_data.tokenization.file_formats import is_hub_name
from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import END_OF_TEXT_NAMES

BUDGET_CHARACTERS_PER_TOKEN = 8
"""With a budget of tokens, BPE is trained on this many characters for each of them."""


def find_problems(config: DataConfig) -> list[Problem]:
    """Check that the files and the tokenizer of a config are usable, without network access.

    Reads the user's files at about disk speed, and a tokenizer given by path.

    Parameters
    ----------
    config : DataConfig
        The settings.

    Returns
    -------
    list of Problem
        Paths are relative to the config; problems with one file have none.
    """
    problems: list[Problem] = []
    if config.reads_tokens:
        problems += token_file_problems(config)
    for name in config.weights:
        if config.is_path(name) and not config.reads_tokens:
            problems += find_file_problems(name, text_field=config.text_field)
    kind = config.tokenizer_kind
    if kind not in ("bpe", "char", "byte") and not _comes_from_hub(kind):
        try:
            Tokenizer.load(kind)
        except ValueError as error:
            problems += problems_of(error)
    return problems


def open_or_prepare(
    config: DataConfig,
    cache_dir: str | Path | None = None,
    *,
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the prepared set of one corpus, creating the set on the first call.

    Parameters
    ----------
    config : DataConfig
        A config without a mixture.
    cache_dir, executor, in_flight, progress
        As of `open_sets`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        As `open_sets`, or if the config has a mixture.
    """
    if config.mixture is not None:
        raise ValueError(
            f"mixture: got {config.mixture!r}; expected None for a single set; use "
            "tjx_data.open_sets"
        )
    sets = open_sets(config, cache_dir, executor=executor, in_flight=in_flight, progress=progress)
    return next(iter(sets.values()))


def open_sets(
    config: DataConfig,
    cache_dir: str | Path | None = None,
    *,
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Return the folders of the prepared sets of a config, creating missing ones.

    A folder's name contains a hash of the source and the settings, so that a second call reuses it
    and other settings get another folder. Concurrent calls are safe: one process creates a set, the
    others wait. Each folder holds the common tokenizer: ``Tokenizer.load(folder)``.

    Parameters
    ----------
    config : DataConfig
        Corpora, tokenizer and holdout. `seq_len` is used with ``packing="documents"`` only.
    cache_dir : str or Path, optional
        Folder of prepared sets; by default `config.cache_dir`, else `default_cache_dir`.
    executor, in_flight
        As of `prepare`.
    progress : Progress, optional
        Called with the progress of the stages ``train tokenizer`` and ``write shards``.

    Returns
    -------
    dict
        Folder of each corpus or path; one entry without a mixture.

    Raises
    ------
    HubError
        If a corpus or the tokenizer is neither in the cache nor reachable.
    ValueError
        If the text or the tokenizer is unusable.
    """
    if config.reads_tokens:
        message = f"got {config.path!r}, token ids; expected text; read them by TokenLoader"
        raise ConfigError([Problem("path", message)])
    root = Path(cache_dir or config.cache_dir or default_cache_dir()).expanduser()
    corpora = {name: _Corpus.find(config, name) for name in config.weights}
    chosen = _choose_tokenizer(config, corpora)
    folders = {name: root / corpus.folder(config, chosen) for name, corpus in corpora.items()}
    if not all(map(is_prepared, folders.values())):
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            for folder in sorted(set(folders.values())):
                locks.enter_context(locked(root / f".{folder.name}.open.lock"))
            tokenizer = None
            for name, folder in folders.items():
                if is_prepared(folder):  # perhaps by the process that held the lock
                    continue
                tokenizer = tokenizer or _make_tokenizer(config, corpora, chosen, folders, progress)
                prepare(
                    corpora[name].open(config),
                    tokenizer,
                    folder,
                    holdout=corpora[name].holdout,
                    holdout_fraction=corpora[name].holdout_fraction(config),
                    strict=config.strict,
                    max_tokens=config.max_tokens,
                    executor=executor,
                    in_flight=in_flight,
                    progress=progress,
                )
    for folder in folders.values():
        # A kill right after the rename leaves the work folder behind.
        shutil.rmtree(work_folder(folder), ignore_errors=True)
        if config.packing == "documents":
            for split in SPLITS:
                open_packing(folder, split, config.seq_len)
    return folders


def open_training_documents(config: DataConfig) -> dict[str, tuple[Documents, Holdout, float]]:
    """Return the documents of each corpus and path, with the holdout and fraction that split them.

    They are within the config's budget of documents, and split as the sets of `open_sets` are.

    Raises
    ------
    HubError
        If a corpus is neither in the cache nor reachable.
    ValueError
        If the text is unusable.
    """
    corpora = {name: _Corpus.find(config, name) for name in config.weights}
    return {
        name: (corpus.open(config), corpus.holdout, corpus.holdout_fraction(config))
        for name, corpus in corpora.items()
    }


@dataclass(frozen=True)
class _Corpus:
    """A named corpus, not opened yet, or local files, already scanned."""

    name: str
    source: Mapping[str, str]
    files: Documents | None
    holdout: Holdout

    @classmethod
    def find(cls, config: DataConfig, name: str) -> "_Corpus":
        holdout = config.holdout_of(name)
        if not config.is_path(name):
            return cls(name, corpus_source(name, text_field=config.text_field), None, holdout)
        files = load_files(name, text_field=config.text_field)
        corpus = cls(name, files.source, files, holdout)
        is_whole = config.max_tokens is None and not config.stream  # otherwise the end is unknown
        if config.holdout != "auto" or not is_whole:
            return corpus
        if has_both_splits(corpus.open(config), config.holdout_fraction):
            return corpus
        return replace(corpus, holdout="tail")

    def open(self, config: DataConfig) -> Documents:
        """Return the documents within the budget, downloading them if necessary."""
        documents = self.files
        if documents is None:
            documents = load_corpus(
                self.name,
                text_field=config.text_field,
                with_validation=self.holdout == "official",
            )
        if not config.limits_documents:
            return documents
        return limit_documents(documents, subset=config.subset, max_documents=config.max_documents)

    def holdout_fraction(self, config: DataConfig) -> float:
        """Return the fraction that is held out: of a few files, at least one document."""
        if self.files is None or self.holdout != "documents":
            return config.holdout_fraction
        return fraction_of_few(self.open(config), config.holdout_fraction)

    def folder(self, config: DataConfig, chosen: "_TokenizerChoice") -> str:
        """Return the folder name of the prepared set."""
        settings = {
            "format": FORMAT,
            "source": {name: value for name, value in self.source.items() if name != "path"},
            "tokenizer": chosen.identity,
            "holdout": self.holdout,
            "holdout_fraction": config.holdout_fraction,
        }
        settings |= config.budget
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "-", self.name) if self.files is None else "files"
        return f"{name}-{key}"


@dataclass(frozen=True)
class _TokenizerChoice:
    identity: str  # everything that determines the tokenizer besides the corpus
    loaded: Tokenizer | None = None


def _choose_tokenizer(config: DataConfig, corpora: Mapping[str, _Corpus]) -> _TokenizerChoice:
    kind = config.tokenizer_kind
    if kind in ("bpe", "char"):
        identity = f"bpe {config.vocab_size}" if kind == "bpe" else "char"
        if config.chat_tokens:
            identity += " with chat tokens"
        if len(corpora) > 1 and config.budget:
            identity += f" within {json.dumps(config.budget)}"
        if len(corpora) > 1:  # trained on all of them
            identity += f" of {json.dumps([dict(corpus.source) for corpus in corpora.values()])}"
        return _TokenizerChoice(identity)
    if kind == "byte" or _comes_from_hub(kind):
        return _TokenizerChoice(kind)  # by name: a cached set must not need the network
    loaded = Tokenizer.load(kind)
    return _TokenizerChoice(loaded.fingerprint, loaded)


def _make_tokenizer(
    config: DataConfig,
    corpora: Mapping[str, _Corpus],
    chosen: _TokenizerChoice,
    folders: Mapping[str, Path],
    progress: Progress | None,
) -> Tokenizer:
    """Return the common tokenizer: that of an existing or unfinished set, or a new one."""
    for folder in folders.values():
        if is_prepared(folder):
            return Tokenizer.load(folder)
        if (work_folder(folder) / "tokenizer.json").is_file():
            return Tokenizer.load(work_folder(folder))
    if chosen.loaded is not None:
        return chosen.loaded
    kind = config.tokenizer_kind
    if kind == "byte":
        return byte_tokenizer()
    chat_tokens = CHAT_TOKENS if config.chat_tokens else ()
    if kind == "char":
        # The alphabet is that of the whole text, as in nanoGPT. One long text needs no separator.
        texts = (
            text for corpus in corpora.values() for text in corpus.open(config).with_held_out()
        )
        separator = () if config.holdout == "tail" else END_OF_TEXT_NAMES[:1]
        return char_tokenizer(texts, (*separator, *chat_tokens))
    if kind != "bpe":
        return Tokenizer.load(kind)
    return train_bpe(
        _training_texts(config, corpora),
        config.vocab_size,
        special_tokens=(END_OF_TEXT_NAMES[0], *chat_tokens),
        progress=progress,
    )


def _training_texts(config: DataConfig, corpora: Mapping[str, _Corpus]) -> Iterator[str]:
    """Yield the training texts of all corpora; BPE merges must not see held-out text."""
    for corpus in corpora.values():
        texts = training_texts(corpus.open(config), corpus.holdout, corpus.holdout_fraction(config))
        if config.max_tokens is None:
            yield from texts
            continue
        n_left = config.max_tokens * BUDGET_CHARACTERS_PER_TOKEN
        for text in texts:
            yield text[:n_left]
            n_left -= len(text)
            if n_left <= 0:
                break


def _comes_from_hub(kind: str) -> bool:
    return is_hub_name(kind) and not Path(kind).expanduser().exists()
