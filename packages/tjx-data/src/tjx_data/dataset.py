"""From a DataConfig to a prepared set in the cache: found there, or made once."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tjx_data.bpe import train_bpe
from tjx_data.cache import default_cache_dir, locked
from tjx_data.characters import char_tokenizer
from tjx_data.config import DataConfig
from tjx_data.corpora import corpus_source, load_corpus
from tjx_data.documents import Documents, Progress, split_documents
from tjx_data.files import find_file_problems, load_files
from tjx_data.index import FORMAT
from tjx_data.preparation import is_prepared, prepare, temporary_prefix
from tjx_data.tokenizer import END_OF_TEXT_NAMES, Tokenizer, is_hub_name

__all__ = ["default_cache_dir", "find_problems", "open_or_prepare"]


def find_problems(config: DataConfig) -> list[str]:
    """Return a line for each reason why the text or the tokenizer cannot be used.

    Reads the user's files (at about disk speed) and a tokenizer given by path; never the network.
    """
    problems = [] if config.path is None else find_file_problems(config.path)
    kind = config.tokenizer_kind
    if kind not in ("bpe", "char") and not _comes_from_hub(kind):
        try:
            Tokenizer.load(kind)
        except ValueError as error:
            problems.append(str(error))
    return problems


def open_or_prepare(
    config: DataConfig,
    cache_dir: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the prepared set that a config asks for, making it if need be.

    The folder's name holds a hash of the source and the settings, so that a second start finds it
    and another setting gets another folder. Of two processes that start at once one makes the set
    and the other waits. The folder holds the tokenizer: ``Tokenizer.load(folder)``.

    Parameters
    ----------
    config : DataConfig
        `seq_len` plays no part: rows are cut when they are read.
    cache_dir : str or Path, optional
        Folder for prepared sets, before `config.cache_dir` and the user's cache folder.
    progress : Progress, optional
        Called as ``progress(stage, done, total)``; stages are ``train tokenizer`` and ``write
        shards``, in bytes of text.

    Raises
    ------
    HubError
        If the corpus or the tokenizer is neither in the cache nor within reach.
    ValueError
        If the text or the tokenizer cannot be used.
    """
    root = Path(cache_dir or config.cache_dir or default_cache_dir()).expanduser()
    files = None if config.path is None else load_files(config.path)
    source = corpus_source(config.corpus) if files is None else files.source
    chosen = _choose_tokenizer(config)
    directory = (
        root / f"{config.corpus if files is None else 'files'}-{_key(config, source, chosen)}"
    )
    if is_prepared(directory):
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{directory.name}.lock"):
        if is_prepared(directory):  # another process made it while this one waited
            return directory
        for left_over in root.glob(f"{temporary_prefix(directory)}*"):  # of a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        documents = load_corpus(config.corpus) if files is None else files
        prepare(
            documents,
            chosen.make(config, documents, progress),
            directory,
            holdout=config.holdout,
            holdout_fraction=config.holdout_fraction,
            progress=progress,
        )
    return directory


@dataclass(frozen=True)
class _TokenizerChoice:
    identity: str  # what the tokens depend on, beside the source
    loaded: Tokenizer | None = None

    def make(
        self, config: DataConfig, documents: Documents, progress: Progress | None
    ) -> Tokenizer:
        if self.loaded is not None:
            return self.loaded
        if config.tokenizer_kind == "char":
            # The alphabet is that of the whole text, as in nanoGPT. One long text needs no marks.
            return char_tokenizer(
                documents, () if config.holdout == "tail" else END_OF_TEXT_NAMES[:1]
            )
        if config.tokenizer_kind != "bpe":
            return Tokenizer.load(config.tokenizer_kind)
        return train_bpe(_training_texts(config, documents), config.vocab_size, progress=progress)


def _training_texts(config: DataConfig, documents: Documents) -> Iterator[str]:
    """Yield what is not held out: the merges too are learnt from training text alone."""
    for split, text in split_documents(documents, config.holdout, config.holdout_fraction):
        if split == "train":
            yield text


def _comes_from_hub(kind: str) -> bool:
    return is_hub_name(kind) and not Path(kind).expanduser().exists()


def _choose_tokenizer(config: DataConfig) -> _TokenizerChoice:
    kind = config.tokenizer_kind
    if kind == "bpe":
        return _TokenizerChoice(f"bpe {config.vocab_size}")
    if kind == "char" or _comes_from_hub(kind):
        return _TokenizerChoice(kind)  # a prepared set is found again without the network
    loaded = Tokenizer.load(kind)
    return _TokenizerChoice(loaded.fingerprint, loaded)


def _key(config: DataConfig, source: Mapping[str, str], chosen: _TokenizerChoice) -> str:
    settings = {
        "format": FORMAT,
        "source": {name: value for name, value in source.items() if name != "path"},
        "tokenizer": chosen.identity,
        "holdout": config.holdout,
        "holdout_fraction": config.holdout_fraction,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
