"""Loading of stored tokenizers: tokenizer.json, SentencePiece, GPT-2's files, the hub."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from tjx_core import ConfigError, Problem
from tjx_data.bounded_io import read_bounded
from tjx_data.corpora import hub
from tjx_data.tokenization import sentencepiece
from tjx_data.tokenization.vocabulary import (
    BYTE_CHARACTERS,
    END_OF_TEXT_NAMES,
    make_special_tokens,
)

# GPT-2's own two files, and Hugging Face's names for the same.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
HUB_ALIASES = {"gpt2": ("openai-community/gpt2", "gpt2")}
MAX_FILE_BYTES = 64 << 20
"""Largest file that is read; a vocabulary of 262,144 tokens has 33 million bytes."""
MAX_VOCAB_SIZE = 1 << 22
"""Largest id plus one: tables are allocated by id, and a tiny file can claim 2**32 - 1."""
MAX_QUOTED_CHARACTERS = 500
"""Characters quoted from the library's error messages, which may contain the file."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Return whether a path that does not exist can be a name on the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.endswith(
        (".json", ".bpe", ".txt", ".model")
    )


def read_model(path: str | Path) -> tokenizers.Tokenizer:
    """Read a `tokenizers` model from a file, a folder or the hub; see `Tokenizer.load`."""
    location = Path(path).expanduser()
    if location.is_dir():
        return _read_folder(location)
    if location.is_file():
        for vocabulary, merges in GPT2_FILES:
            if location.name in (vocabulary, merges):
                return _read_gpt2(location.with_name(vocabulary), location.with_name(merges))
        if location.suffix == ".model":
            return _read_sentencepiece(location)
        return _read_json(location)
    name = str(path)
    if not is_hub_name(name):
        message = (
            f"got {name!r}; no such file or folder; expected a tokenizer.json or a "
            "tokenizer.model, a folder that holds one or GPT-2's two files, or a name on the "
            "Hugging Face hub"
        )
        raise ConfigError([Problem("tokenizer", message)])
    return _read_json(hub.download_tokenizer(name, HUB_ALIASES.get(name, (name,))))


def _read_folder(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder / "tokenizer.json")
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _read_gpt2(folder / vocabulary, folder / merges)
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _read_sentencepiece(folder / name)
    message = (
        f"got {folder}; no tokenizer here; expected tokenizer.json, or encoder.json and vocab.bpe, "
        "or vocab.json and merges.txt, or tokenizer.model"
    )
    raise ConfigError([Problem("tokenizer", message)])


def _read_json(file: Path) -> tokenizers.Tokenizer:
    with _as_value_error(f"{file}: not a tokenizer.json"):
        content = read_bounded(file, MAX_FILE_BYTES).decode()
        return _checked(tokenizers.Tokenizer.from_str(content))


def _read_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    with _as_value_error(f"{file}: not a SentencePiece model"):
        return _checked(sentencepiece.parse_model(read_bounded(file, MAX_FILE_BYTES)))


def _read_gpt2(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    with _as_value_error(f"{vocabulary}, {merges}: not GPT-2's two files"):
        for file in (vocabulary, merges):
            read_bounded(file, MAX_FILE_BYTES)
        model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
        inner = _checked(tokenizers.Tokenizer(model))
    known = [name for name in END_OF_TEXT_NAMES if inner.token_to_id(name) is not None]
    return _split_as_gpt2(inner, known)


def make_gpt2(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], special_tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    """Make a model from a vocabulary in memory; see `Tokenizer.from_vocab`."""
    with _as_value_error("vocab, merges: got a vocabulary that has no model"):
        pairs = [(left, right) for left, right in merges]
        model = tokenizers.models.BPE(vocab=dict(vocab), merges=pairs)
        inner = _checked(tokenizers.Tokenizer(model))
    texts = {*BYTE_CHARACTERS, *(left + right for left, right in pairs)}
    make_special_tokens(special_tokens, texts)
    return _split_as_gpt2(inner, special_tokens)


def _split_as_gpt2(
    inner: tokenizers.Tokenizer, special_tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(make_special_tokens(special_tokens, ()))
    return inner


def _checked(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    ids = inner.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError("it has no token")
    if max(ids) >= MAX_VOCAB_SIZE:
        raise ValueError(f"got id {max(ids)}; expected at most {MAX_VOCAB_SIZE - 1}")
    unknown = getattr(inner.model, "unk_token", None)
    # With merges an unused name is common: GPT-2's is empty.
    if unknown and inner.token_to_id(unknown) is None:
        model = json.loads(inner.to_str())["model"]
        if model["type"] == "BPE" and not model["merges"]:
            raise ValueError(f"got unk_token {unknown!r}, which has no id; expected one in vocab")
    return inner


@contextmanager
def _as_value_error(message: str) -> Iterator[None]:
    """Convert errors of the `tokenizers` library to ValueError with a message."""
    try:
        yield
    except BaseException as error:
        if not is_tokenizers_error(error):
            raise
        raise ValueError(f"{message}: {str(error)[:MAX_QUOTED_CHARACTERS]}") from error


def is_tokenizers_error(error: BaseException) -> bool:
    """Return whether an exception is a bare Exception or a Rust panic of `tokenizers`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
