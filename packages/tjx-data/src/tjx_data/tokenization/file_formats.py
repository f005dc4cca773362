"""Tokenizers as others store them: tokenizer.json, GPT-2's two files, the Hugging Face hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from tjx_data.bounded_io import read_bounded
from tjx_data.corpora import hub
from tjx_data.tokenization.vocabulary import END_OF_TEXT_NAMES, make_special_tokens

# GPT-2's own two files, and Hugging Face's names for the same.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
HUB_ALIASES = {"gpt2": ("openai-community/gpt2", "gpt2")}
MAX_FILE_BYTES = 64 << 20  # bytes; that of a vocabulary of 262,144 tokens has 33 million
# Tables of a number for each id are made: one token of a tiny file may have the id 2**32 - 1.
MAX_VOCAB_SIZE = 1 << 22
MAX_QUOTED_CHARACTERS = 500  # characters of what the library says, which may repeat the file
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Tell whether a path that does not exist may be meant as a name on the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.endswith((".json", ".bpe", ".txt"))


def read_model(path: str | Path) -> tokenizers.Tokenizer:
    """Read the model that a file, a folder or a name on the hub holds; see `Tokenizer.load`."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place)
    if place.is_file():
        for vocabulary, merges in GPT2_FILES:
            if place.name in (vocabulary, merges):
                return _read_gpt2(place.with_name(vocabulary), place.with_name(merges))
        return _read_json(place)
    name = str(path)
    if not is_hub_name(name):
        raise ValueError(
            f"tokenizer={name!r}: there is no such file or folder; give a tokenizer.json, a "
            "folder that holds one or GPT-2's two files, or a name on the Hugging Face hub"
        )
    return _read_json(hub.download_tokenizer(name, HUB_ALIASES.get(name, (name,))))


def _read_folder(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder / "tokenizer.json")
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _read_gpt2(folder / vocabulary, folder / merges)
    raise ValueError(
        f"{folder}: no tokenizer here; a folder needs tokenizer.json, or encoder.json and "
        "vocab.bpe, or vocab.json and merges.txt"
    )


def _read_json(file: Path) -> tokenizers.Tokenizer:
    with _refusals(f"{file}: not a tokenizer.json"):
        return _checked(tokenizers.Tokenizer.from_str(read_bounded(file, MAX_FILE_BYTES).decode()))


def _read_gpt2(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    with _refusals(f"{vocabulary}, {merges}: not GPT-2's two files"):
        for file in (vocabulary, merges):
            read_bounded(file, MAX_FILE_BYTES)
        model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
        inner = _checked(tokenizers.Tokenizer(model))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    known = [name for name in END_OF_TEXT_NAMES if inner.token_to_id(name) is not None]
    inner.add_special_tokens(make_special_tokens(known, ()))
    return inner


def _checked(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    ids = inner.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError("it has no token")
    if max(ids) >= MAX_VOCAB_SIZE:
        raise ValueError(f"it has the id {max(ids)}, and {MAX_VOCAB_SIZE - 1} is the largest")
    return inner


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn whatever the library dislikes into a ValueError that says what was read."""
    try:
        yield
    except BaseException as error:
        if not is_tokenizers_error(error):
            raise
        raise ValueError(f"{what}: {str(error)[:MAX_QUOTED_CHARACTERS]}") from error


def is_tokenizers_error(error: BaseException) -> bool:
    """Tell whether an error is the library's: a bare Exception, or a panic, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
