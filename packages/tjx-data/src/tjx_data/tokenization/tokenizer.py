"""One tokenizer class for every vocabulary: text to token ids and exactly back."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from tjx_data.atomic import write_atomically
from tjx_data.suggest import did_you_mean
from tjx_data.tokenization.file_formats import (
    MAX_QUOTED_CHARACTERS,
    is_tokenizers_error,
    read_model,
)
from tjx_data.tokenization.text_splitting import LONE_SURROGATE, batches
from tjx_data.tokenization.vocabulary import (
    BYTE_CHARACTERS,
    END_OF_TEXT_NAMES,
    N_BYTES,
    is_byte_level,
    starts_word,
    token_byte_strings,
)

# What decoding with "surrogateescape" makes of bytes that are not UTF-8.
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


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

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        # The library forgets on the way that special tokens in a text are text.
        return _with_json, (self._inner.to_str(),)

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
        return cls(read_model(path))

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
            If a name is not a special token, the text cannot be written in UTF-8, or a tokenizer of
            single characters lacks one of the text (all are named).
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
        # re.split with a group alternates: text, special, text, special, ..., text.
        first, *others = self.encode_batch(parts[::2])
        for name, encoded in zip(parts[1::2], others, strict=True):
            first += [self.special_tokens[name], *encoded]
        return first

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, in parallel; special tokens in them are text.

        Raises
        ------
        ValueError
            As `encode`.
        """
        return list(self.encode_iterable(texts))

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Turn texts into token ids one after the other, in parallel and in bounded memory.

        About 300,000 characters are read ahead, more where one text is longer; special tokens
        in the texts are text.

        Parameters
        ----------
        texts : Iterable[str]
            Read once, as far as the ids are asked for.

        Yields
        ------
        list[int]
            The ids of each text, in the order of the texts.

        Raises
        ------
        ValueError
            As `encode`.
        """
        begun: list[list[int]] = []  # the ids of a text that was cut
        for batch in batches(texts, may_cut=self.always_splits_before_space):
            try:
                # The fast form leaves out the offsets, which nobody here reads (up to 10x).
                encoded = self._inner.encode_batch_fast(
                    [piece.text for piece in batch], add_special_tokens=False
                )
            except TypeError as error:
                raise ValueError(LONE_SURROGATE) from error
            except BaseException as error:
                raise _cannot("encode a text", error) from error
            for piece, encoding in zip(batch, encoded, strict=True):
                if self._unknown_character is not None and self._unknown_character in encoding.ids:
                    raise self._unknown_characters(piece.text)
                begun.append(encoding.ids)
                if piece.is_last:
                    yield begun[0] if len(begun) == 1 else list(chain.from_iterable(begun))
                    begun = []
        assert not begun

    def encode_bytes(self, data: bytes) -> list[int]:
        """Turn any bytes into token ids that `decode_bytes` turns into exactly those bytes.

        Stretches of UTF-8 are encoded as text; any other byte is the token of that byte.

        Raises
        ------
        ValueError
            If the tokenizer is not byte-level, or changes texts, so that they do not come back.
        """
        byte_ids = self._byte_ids
        stretches = _NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        texts = self.encode_iterable(stretches[::2])
        ids: list[int] = []
        # re.split with a group alternates: text, other bytes, text, ..., text.
        for i, stretch in enumerate(stretches):
            if i % 2:
                ids += [byte_ids[byte] for byte in stretch.encode("utf-8", "surrogateescape")]
            else:
                ids += next(texts)
        if self.decode_bytes(ids) != data:
            raise ValueError(
                "this tokenizer changes texts (it normalises them, or adds or drops something), so "
                "that bytes do not come back; use encode, or a tokenizer made by train_bpe"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        """Turn token ids into the bytes that they stand for; special tokens appear by name.

        Raises
        ------
        ValueError
            If the tokenizer is not byte-level, or has no token with one of the ids.
        """
        self._check_byte_level()
        texts = self._texts
        return b"".join(texts[i] or b"" for i in self._known(ids))

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
        """Turn token ids back into text; special tokens appear by name.

        Bytes that are not UTF-8 (a character cut in half) become U+FFFD.

        Raises
        ------
        ValueError
            If the tokenizer has no token with one of the ids.
        """
        if is_byte_level(self._json):
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        known = self._known(ids)
        try:
            return self._inner.decode(known, skip_special_tokens=False)
        except BaseException as error:
            raise _cannot("decode these ids", error) from error

    @cached_property
    def _unknown_character(self) -> int | None:
        """The id of characters that a tokenizer of single characters lacks; None of all others."""
        model = self._json["model"]
        if model["type"] != "BPE" or model["merges"] or model["unk_token"] is None:
            return None
        return self.vocabulary[model["unk_token"]]

    def _unknown_characters(self, text: str) -> ValueError:
        found = sorted(set(text) - self.vocabulary.keys())
        names = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in found[:20])
        more = f" and {len(found) - 20} more" if len(found) > 20 else ""
        known = len(self.vocabulary) - len(self.special_tokens)
        return ValueError(
            f"text: got the characters {names}{more}; expected the {known} of this character "
            "tokenizer; leave them out, or make a tokenizer from text that has them"
        )

    def _known(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> list[int]:
        given = [int(i) for i in ids]
        if unknown := sorted(set(given) - self._ids):
            raise ValueError(
                f"ids {unknown[:10]} are no tokens; this tokenizer has {len(self._ids)}, from 0 "
                f"to {self.vocab_size - 1}: was the text encoded, or the model trained, with "
                "another one?"
            )
        return given

    def _check_byte_level(self) -> None:
        if not is_byte_level(self._json):
            raise ValueError(
                "any bytes make the round trip with a byte-level tokenizer alone (train_bpe, "
                f"byte_tokenizer, GPT-2's); this one decodes with {self._json['decoder']}"
            )

    def encode_prompt(self, text: str) -> list[int]:
        """Turn a text into the ids that a language model continues.

        A prompt is the beginning of a document, and in training a document begins after the
        end-of-text token. So that token comes first; a tokenizer without one begins with the text,
        with a newline where there is none, and with token 0 where it has no newline either.

        Raises
        ------
        ValueError
            As `encode`.

        Examples
        --------
        >>> from tjx_data import byte_tokenizer
        >>> byte_tokenizer().encode_prompt("ab")
        [256, 97, 98]
        """
        if self.eot_id is not None:
            return [self.eot_id, *self.encode(text)]
        if text:
            return self.encode(text)
        try:
            return self.encode("\n")
        except ValueError:  # a tokenizer of the characters of one line
            return [0]

    def save(self, path: str | Path, *, begins_prompts: bool = False) -> None:
        """Write the tokenizer as a ``tokenizer.json``, which every Hugging Face library reads.

        Parameters
        ----------
        path : str or Path
            The file.
        begins_prompts : bool
            Whether those libraries put the end-of-text token before a text, as `encode_prompt`
            does. A post-processor that adds tokens of its own stays.
        """
        inner = self._inner
        if begins_prompts and self.eot_id is not None and not self._adds_tokens:
            inner = tokenizers.Tokenizer.from_str(inner.to_str())
            inner.post_processor = self._begin_with_eot()
        write_atomically(Path(path), inner.to_str().encode("utf-8"))

    def _begin_with_eot(self) -> Any:
        number = self.eot_id
        assert number is not None
        end = next(name for name, i in self.special_tokens.items() if i == number)
        return tokenizers.processors.TemplateProcessing(
            single=[end, "$A"], pair=[end, "$A", "$B:1"], special_tokens=[(end, number)]
        )

    @cached_property
    def _adds_tokens(self) -> bool:
        """Whether Hugging Face libraries add special tokens of the tokenizer's own to a text."""
        ids = self._inner.encode("", add_special_tokens=True).ids
        return bool(ids)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens: name to id."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token as the model writes it, special tokens among them, with its id."""
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        return vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding table needs."""
        return 1 + max(self._ids)

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self.vocabulary.values())

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
        """SHA-256 of the tokenizer's JSON with sorted keys: equal for equal tokenizers.

        What `save` adds for other libraries with `begins_prompts` is left out.
        """
        parts = dict(self._json)
        if self.eot_id is not None and parts["post_processor"] is not None:
            added = json.loads(self._begin_with_eot().__getstate__())
            if parts["post_processor"] == added:
                parts["post_processor"] = None
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @cached_property
    def _texts(self) -> list[bytes | None]:
        return token_byte_strings(self._inner, self._json)

    @cached_property
    def _byte_ids(self) -> list[int]:
        self._check_byte_level()
        vocabulary = self._inner.get_vocab(with_added_tokens=False)
        missing = [byte for byte in range(N_BYTES) if BYTE_CHARACTERS[byte] not in vocabulary]
        if missing:
            raise ValueError(
                f"this tokenizer has no token for {len(missing)} of the {N_BYTES} bytes, the first "
                f"of them {missing[0]:#04x}; use one made by train_bpe or byte_tokenizer"
            )
        return [vocabulary[character] for character in BYTE_CHARACTERS]

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
        lengths = np.array([len(text or b"") for text in self._texts], np.int32)
        lengths[list(self.special_tokens.values())] = 0
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        """Whether each token starts a word, bool [vocab_size], for masking whole words.

        A token goes on with a word if it begins with a letter, a digit or a mark on a letter, or
        inside a character; any other one starts a word: white space, punctuation, special tokens.
        In scripts without spaces (Han, kana, Thai, ...) each character starts a word. The token
        alone decides, so that a word straight after a newline or an opening quote is one word with
        it. A WordPiece vocabulary marks the tokens that go on.

        Raises
        ------
        ValueError
            If the tokenizer is neither byte-level nor of characters nor WordPiece.
        """
        model = self._json["model"]
        if model["type"] == "WordPiece":
            starts = np.ones(self.vocab_size, bool)
            prefix = model["continuing_subword_prefix"]
            starts[[i for token, i in model["vocab"].items() if token.startswith(prefix)]] = False
        else:
            starts = np.array([text is None or starts_word(text) for text in self._texts], bool)
        starts[list(self.special_tokens.values())] = True
        starts.flags.writeable = False
        return starts

    @cached_property
    def always_splits_before_space(self) -> bool:
        """Whether a token never goes on from a letter or stop into the white space after it.

        True for GPT-2's pre-tokenisation, for characters and for bytes. Long documents may then
        be encoded in pieces with the same ids: see `tjx_data.tokenization.text_splitting`.
        """
        parts = self._json
        plain_added = any(not token["special"] for token in parts["added_tokens"])
        if parts["normalizer"] is not None or plain_added:
            return False
        model, before = parts["model"], parts["pre_tokenizer"]
        joins = model["type"] != "BPE" or bool(model["merges"]) or model["ignore_merges"]
        if before is None:
            return not joins
        if before["type"] != "ByteLevel" or before["add_prefix_space"]:
            return False
        return bool(before["use_regex"]) or not joins


def _cannot(do: str, error: BaseException) -> BaseException:
    """Return what to raise for an error of the library, whose tokenizer was not made for this."""
    if not is_tokenizers_error(error):
        return error
    return ValueError(f"this tokenizer cannot {do}: {str(error)[:MAX_QUOTED_CHARACTERS]}")


def _with_json(content: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(content))
