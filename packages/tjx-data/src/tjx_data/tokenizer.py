"""One tokenizer class for every vocabulary: text to token ids and exactly back."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from tjx_data import hub
from tjx_data.atomic import write_atomically
from tjx_data.suggest import did_you_mean

# What vocabularies call the token between two documents; the first that exists is used.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>")
# GPT-2's own two files, and Hugging Face's names for the same.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
HUB_ALIASES = {"gpt2": ("openai-community/gpt2", "gpt2")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Tell whether a path that does not exist may be meant as a name on the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.endswith((".json", ".bpe", ".txt"))


class Tokenizer:
    """Text to token ids and back, over a Hugging Face ``tokenizers`` model.

    A special token written out in a text is text like any other, so that no document can end
    itself; `encode` makes exceptions only for the names in ``allowed_special``.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model. Padding and truncation are switched off: they would change documents.

    Examples
    --------
    >>> from tjx_data import char_tokenizer
    >>> tokenizer = char_tokenizer(["abc"])
    >>> tokenizer.encode("cab")
    [2, 0, 1]
    >>> tokenizer.decode([2, 0, 1])
    'cab'
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer from a file, a folder or the Hugging Face hub.

        Parameters
        ----------
        path : str or Path
            A ``tokenizer.json``; a folder that holds one, or GPT-2's ``encoder.json`` and
            ``vocab.bpe``, or ``vocab.json`` and ``merges.txt``; or a name on the hub such as
            ``"gpt2"``, which is looked up in the local cache first.

        Raises
        ------
        ValueError
            If there is no tokenizer there, or the file is not one.
        HubError
            If the hub is needed and cannot be reached.
        """
        place = Path(path).expanduser()
        if place.is_dir():
            return cls._load_folder(place)
        if place.is_file():
            for vocabulary, merges in GPT2_FILES:
                if place.name in (vocabulary, merges):
                    return cls._load_gpt2(place.with_name(vocabulary), place.with_name(merges))
            return cls._load_json(place)
        name = str(path)
        if not is_hub_name(name):
            raise ValueError(
                f"tokenizer={name!r}: there is no such file or folder; give a tokenizer.json, a "
                "folder that holds one or GPT-2's two files, or a name on the Hugging Face hub"
            )
        return cls._load_json(hub.download_tokenizer(name, HUB_ALIASES.get(name, (name,))))

    @classmethod
    def _load_folder(cls, folder: Path) -> "Tokenizer":
        if (folder / "tokenizer.json").is_file():
            return cls._load_json(folder / "tokenizer.json")
        for vocabulary, merges in GPT2_FILES:
            if (folder / vocabulary).is_file() and (folder / merges).is_file():
                return cls._load_gpt2(folder / vocabulary, folder / merges)
        raise ValueError(
            f"{folder}: no tokenizer here; a folder needs tokenizer.json, or encoder.json and "
            "vocab.bpe, or vocab.json and merges.txt"
        )

    @classmethod
    def _load_json(cls, file: Path) -> "Tokenizer":
        try:
            return cls(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception for whatever it dislikes
            raise ValueError(f"{file}: not a tokenizer.json: {error}") from error

    @classmethod
    def _load_gpt2(cls, vocabulary: Path, merges: Path) -> "Tokenizer":
        try:
            model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
        except Exception as error:  # the library raises bare Exception for whatever it dislikes
            raise ValueError(f"{vocabulary}, {merges}: not GPT-2's two files: {error}") from error
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        known = [name for name in END_OF_TEXT_NAMES if inner.token_to_id(name) is not None]
        inner.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in known]
        )
        return cls(inner)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Turn a text into token ids; nothing is added before or after.

        Parameters
        ----------
        text : str
            Any text without lone surrogates (which have no UTF-8).
        allowed_special : Collection[str]
            Names of special tokens that become their id where the text spells them out.

        Raises
        ------
        ValueError
            If a name is not a special token, or the text cannot be written in UTF-8.
        """
        if isinstance(allowed_special, str):
            allowed_special = (allowed_special,)
        for name in allowed_special:
            if name not in self.special_tokens:
                raise ValueError(
                    f"allowed_special: {name!r} is not a special token of this tokenizer; "
                    f"it has {sorted(self.special_tokens)}{did_you_mean(name, self.special_tokens)}"
                )
        if not allowed_special:
            return self.encode_batch([text])[0]
        longest_first = sorted(allowed_special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids: list[int] = []
        # re.split with a group alternates: text, special, text, special, ..., text.
        for i, encoded in enumerate(self.encode_batch(parts)):
            ids += [self.special_tokens[parts[i]]] if i % 2 else encoded
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, in parallel; special tokens in them are text."""
        try:
            # The fast form leaves out the offsets, which nobody here reads (up to 10x).
            encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise ValueError(
                "a text to encode holds a lone surrogate, which no UTF-8 file can hold: "
                "read files with encoding='utf-8', or encode with errors='replace' first"
            ) from error
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
        """Turn token ids back into text; special tokens appear by name.

        Bytes that are not UTF-8 (a character cut in half) become U+FFFD.
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as a ``tokenizer.json``, which every Hugging Face library reads."""
        write_atomically(Path(path), self._inner.to_str().encode("utf-8"))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens: name to id."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding table needs."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values())

    @cached_property
    def eot_id(self) -> int | None:
        """The id of the special token that ends a document, or None where there is none."""
        for name in END_OF_TEXT_NAMES:
            if name in self.special_tokens:
                return self.special_tokens[name]
        return None

    @cached_property
    def _json(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self._inner.to_str())
        return loaded

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON with sorted keys: equal for equal tokenizers."""
        canonical = json.dumps(self._json, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @cached_property
    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Bytes of UTF-8 text that each token stands for, int32 [vocab_size]; specials have 0.

        So the bytes behind labels are ``token_byte_lengths[labels]`` summed over the labels that
        count, which is what bits per byte divides by (`tjx_data.batch_bytes`).

        Raises
        ------
        ValueError
            If the tokenizer is neither byte-level nor of characters: its tokens do not stand for
            a fixed number of bytes.
        """
        byte_level = _mentions(self._json["decoder"], "ByteLevel")
        if not byte_level and not _mentions(self._json["decoder"], "Fuse"):
            raise ValueError(
                "bits per byte needs a byte-level or character tokenizer; this one decodes with "
                f"{self._json['decoder']}"
            )
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            # A byte-level vocabulary writes each byte as one character.
            lengths[i] = len(token) if byte_level else len(token.encode("utf-8"))
        for i, added in self._inner.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode("utf-8"))
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def always_splits_before_space(self) -> bool:
        """Whether a token never goes on from a letter or stop into the white space after it.

        True for GPT-2's pre-tokenisation and for characters. Long documents may then be encoded
        in pieces (`tjx_data.pieces.split_exactly`) with the same ids.
        """
        parts = self._json
        plain_added = any(not token["special"] for token in parts["added_tokens"])
        if parts["normalizer"] is not None or plain_added:
            return False
        before = parts["pre_tokenizer"]
        if before is None:
            return parts["model"]["type"] == "BPE" and not parts["model"]["merges"]
        return bool(
            before["type"] == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
        )


def _mentions(part: dict[str, Any] | None, kind: str) -> bool:
    if part is None:
        return False
    steps = part.get("decoders", [part])
    return any(step["type"] == kind for step in steps)
