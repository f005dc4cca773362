"""From a DataConfig to prepared sets in the cache: found there, or made once."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tjx_data.cache import default_cache_dir, locked
from tjx_data.config import DataConfig
from tjx_data.corpora.documents import Documents, Progress, training_texts
from tjx_data.corpora.files import find_file_problems, load_files
from tjx_data.corpora.registry import corpus_source, load_corpus
from tjx_data.prepared.index import FORMAT
from tjx_data.prepared.packing import open_packing
from tjx_data.prepared.prepare import is_prepared, prepare, work_folder
from tjx_data.prepared.tokenize_parts import SPLITS
from tjx_data.tokenization.bpe import train_bpe
from tjx_data.tokenization.byte_level import byte_tokenizer
from tjx_data.tokenization.characters import char_tokenizer
from tjx_data.tokenization.file_formats import is_hub_name
from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import END_OF_TEXT_NAMES

__all__ = ["default_cache_dir", "find_problems", "open_or_prepare", "open_sets"]


def find_problems(config: DataConfig) -> list[str]:
    """Return a line for each reason why the text or the tokenizer cannot be used.

    Reads the user's files (at about disk speed) and a tokenizer given by path; never the network.
    """
    problems = []
    for name in config.weights:
        if config.is_path(name):
            problems += find_file_problems(name, text_field=config.text_field)
    kind = config.tokenizer_kind
    if kind not in ("bpe", "char", "byte") and not _comes_from_hub(kind):
        try:
            Tokenizer.load(kind)
        except ValueError as error:
            problems.append(str(error))
    return problems


def open_or_prepare(
    config: DataConfig,
    cache_dir: str | Path | None = None,
    *,
    executor: Executor | None = None,
    in_flight: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the prepared set of a config of one corpus, making it if need be.

    As `open_sets`, which tells the parameters; a mixture has several folders.
    """
    if config.mixture is not None:
        raise ValueError(f"mixture={config.mixture!r} is several sets: use tjx_data.open_sets")
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
    """Return the folders of the prepared sets that a config asks for, making them if need be.

    A folder's name holds a hash of the source and the settings, so that a second start finds it
    and another setting gets another folder. Of two processes that start at once one makes a set
    and the other waits. Each folder holds the tokenizer, the same one: ``Tokenizer.load(folder)``.

    Parameters
    ----------
    config : DataConfig
        `seq_len` plays no part where `packing` is "windows": rows are cut when they are read.
    cache_dir : str or Path, optional
        Folder for prepared sets, before `config.cache_dir` and the user's cache folder.
    executor, in_flight
        Who does the work, as of `prepare`.
    progress : Progress, optional
        Told how far it is; stages are ``train tokenizer`` and ``write shards``.

    Returns
    -------
    dict
        Corpus or path to folder; one entry but for a mixture.

    Raises
    ------
    HubError
        If a corpus or the tokenizer is neither in the cache nor within reach.
    ValueError
        If the text or the tokenizer cannot be used.
    """
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
                if is_prepared(folder):  # perhaps by a process that this one waited for
                    continue
                tokenizer = tokenizer or _tokenizer(config, corpora, chosen, folders, progress)
                prepare(
                    corpora[name].open(config),
                    tokenizer,
                    folder,
                    holdout=config.holdout_of(name),
                    holdout_fraction=config.holdout_fraction,
                    strict=config.strict,
                    executor=executor,
                    in_flight=in_flight,
                    progress=progress,
                )
    for folder in folders.values():
        shutil.rmtree(work_folder(folder), ignore_errors=True)  # of a kill in the last moment
        if config.packing == "documents":
            for split in SPLITS:
                open_packing(folder, split, config.seq_len)
    return folders


@dataclass(frozen=True)
class _Corpus:
    """A corpus whose text was not opened yet, or files, which were scanned."""

    name: str
    source: Mapping[str, str]
    files: Documents | None

    @classmethod
    def find(cls, config: DataConfig, name: str) -> "_Corpus":
        if not config.is_path(name):
            return cls(name, corpus_source(name), None)
        files = load_files(name, text_field=config.text_field)
        return cls(name, files.source, files)

    def open(self, config: DataConfig) -> Documents:
        """Fetch the text if need be."""
        if self.files is not None:
            return self.files
        is_official = config.holdout_of(self.name) == "official"
        return load_corpus(self.name, with_validation=is_official)

    def folder(self, config: DataConfig, chosen: "_TokenizerChoice") -> str:
        """Return the name of the prepared set's folder."""
        settings = {
            "format": FORMAT,
            "source": {name: value for name, value in self.source.items() if name != "path"},
            "tokenizer": chosen.identity,
            "holdout": config.holdout_of(self.name),
            "holdout_fraction": config.holdout_fraction,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        name = self.name.replace(":", "-") if self.files is None else "files"
        return f"{name}-{key}"


@dataclass(frozen=True)
class _TokenizerChoice:
    identity: str  # what the tokens depend on, beside the source
    loaded: Tokenizer | None = None


def _choose_tokenizer(config: DataConfig, corpora: Mapping[str, _Corpus]) -> _TokenizerChoice:
    kind = config.tokenizer_kind
    if kind in ("bpe", "char"):
        identity = f"bpe {config.vocab_size}" if kind == "bpe" else "char"
        if len(corpora) > 1:  # it is learnt from all of them
            identity += f" of {json.dumps([dict(corpus.source) for corpus in corpora.values()])}"
        return _TokenizerChoice(identity)
    if kind == "byte" or _comes_from_hub(kind):
        return _TokenizerChoice(kind)  # a prepared set is found again without the network
    loaded = Tokenizer.load(kind)
    return _TokenizerChoice(loaded.fingerprint, loaded)


def _tokenizer(
    config: DataConfig,
    corpora: Mapping[str, _Corpus],
    chosen: _TokenizerChoice,
    folders: Mapping[str, Path],
    progress: Progress | None,
) -> Tokenizer:
    """Return the tokenizer of all sets, from one that is there already or made of their text."""
    for folder in folders.values():
        if is_prepared(folder):
            return Tokenizer.load(folder)
        if (work_folder(folder) / "tokenizer.json").is_file():  # a set that was begun
            return Tokenizer.load(work_folder(folder))
    if chosen.loaded is not None:
        return chosen.loaded
    kind = config.tokenizer_kind
    if kind == "byte":
        return byte_tokenizer()
    if kind == "char":
        # The alphabet is that of the whole text, as in nanoGPT. One long text needs no marks.
        texts = (
            text for corpus in corpora.values() for text in corpus.open(config).with_held_out()
        )
        return char_tokenizer(texts, () if config.holdout == "tail" else END_OF_TEXT_NAMES[:1])
    if kind != "bpe":
        return Tokenizer.load(kind)
    return train_bpe(_training_texts(config, corpora), config.vocab_size, progress=progress)


def _training_texts(config: DataConfig, corpora: Mapping[str, _Corpus]) -> Iterator[str]:
    """Yield what is not held out: the merges too are learnt from training text alone."""
    for corpus in corpora.values():
        holdout = config.holdout_of(corpus.name)
        yield from training_texts(corpus.open(config), holdout, config.holdout_fraction)


def _comes_from_hub(kind: str) -> bool:
    return is_hub_name(kind) and not Path(kind).expanduser().exists()
