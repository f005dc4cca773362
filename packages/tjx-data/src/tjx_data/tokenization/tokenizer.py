"""Tokenizer: text to token ids and back, for every vocabulary."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import tokenizers

from tjx_core import did_you_mean, write_atomically
from tjx_data.tokenization.file_formats import (
    make_gpt2,
    read_model,
)
from tjx_data.tokenization.text_encoder import TextEncoder, wrap_error
from tjx_data.tokenization.text_splitting import (
    splits_before_space,
)
from tjx_data.tokenization.tiktoken_backend import (
    TiktokenEncoder,
    find_obstacle,
    tiktoken_version,
)
from tjx_data.tokenization.vocabulary import (
    END_OF_TEXT_NAMES,
    byte_token_ids,
    is_byte_level,
    starts_word,
    token_byte_strings,
)

# Decoding with "surrogateescape" maps bytes that are not UTF-8 to these.
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")

_NONCHARACTER = "\U0010ffff"

Ids = Iterable[int] | npt.NDArray[np.integer]
Backend = Literal["auto", "tiktoken", "tokenizers"]

_log = logging.getLogger(__name__)


class Tokenizer:
    """Encode text to token ids and decode it, with a Hugging Face ``tokenizers`` model.

    The name of a special token in a text is encoded as ordinary text, so that documents cannot
    contain control tokens; `encode` makes exceptions for the names in ``allowed_special``.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model. Padding and truncation are disabled, since they would change documents.
    backend : {"auto", "tiktoken", "tokenizers"}
        Library that encodes. "auto" is tiktoken if it is installed (extra ``tiktoken``) and gives
        equal ids: for BPE with GPT-2's splitting of words whose merges follow from its tokens. Ids
        and fingerprint do not depend on the backend.

    Raises
    ------
    ValueError
        If tiktoken is required and is not installed or does not give equal ids.

    Examples
    --------
    >>> from tjx_data import char_tokenizer
    >>> tokenizer = char_tokenizer(["abc"])
    >>> tokenizer.encode("cab")
    [2, 0, 1]
    >>> tokenizer.decode([2, 0, 1])
    'cab'
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, backend: Backend = "auto"):
        if backend not in get_args(Backend):
            choices = ", ".join(get_args(Backend))
            raise ValueError(f"backend: got {backend!r}; expected one of {choices}")
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner
        self._backend: Backend = backend
        if backend == "tiktoken":
            if tiktoken_version() is None:
                raise ValueError(
                    "backend: got 'tiktoken'; expected an installed one: "
                    "pip install 'tjx-data[tiktoken]'"
                )
            if obstacle := find_obstacle(inner, self._json):
                raise ValueError(
                    f"backend: got 'tiktoken'; expected 'tokenizers' for this tokenizer: {obstacle}"
                )

    def __reduce__(self) -> tuple[Callable[[str, Backend], "Tokenizer"], tuple[str, Backend]]:
        # Pickling the inner tokenizer would lose `encode_special_tokens`.
        return _from_json, (self._inner.to_str(), self._backend)

    @classmethod
    def from_vocab(
        cls,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        special_tokens: Sequence[str] = END_OF_TEXT_NAMES[:1],
    ) -> "Tokenizer":
        """Make a byte-level BPE tokenizer with GPT-2's splitting of words.

        Parameters
        ----------
        vocab : Mapping[str, int]
            Id of each token, in GPT-2's characters for bytes (`vocabulary` of a tokenizer).
        merges : Iterable of pairs
            Merges in order (`merges` of a tokenizer).
        special_tokens : Sequence[str]
            Tokens that no text encodes to. Tokens that `vocab` lacks get the ids after its largest.

        Returns
        -------
        Tokenizer
            The tokenizer.

        Raises
        ------
        ValueError
            If a merge is not of tokens of the vocabulary, or a special token is empty or repeated.

        Examples
        --------
        >>> from tjx_data import train_bpe
        >>> one = train_bpe(["the cat and the hat and the bat"], 262)
        >>> two = Tokenizer.from_vocab(one.vocabulary, one.merges)
        >>> two.encode("the bat") == one.encode("the bat")
        True
        """
        return cls(make_gpt2(vocab, merges, special_tokens))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer from a file, a folder or the Hugging Face hub.

        Parameters
        ----------
        path : str or Path
            A ``tokenizer.json``; a SentencePiece ``.model`` (Unigram or BPE); a folder that holds
            one, or GPT-2's ``encoder.json`` and ``vocab.bpe``, or ``vocab.json`` and
            ``merges.txt``; or a name on the hub such as ``"gpt2"``, which is searched in the local
            cache first.

        Returns
        -------
        Tokenizer
            The tokenizer.

        Raises
        ------
        ValueError
            If there is no tokenizer, or it is damaged.
        HubError
            If a hub tokenizer is neither in the cache nor reachable.
        """
        return cls(read_model(path))

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Encode a text without adding special tokens.

        Parameters
        ----------
        text : str
            Any text without lone surrogates, which have no UTF-8.
        allowed_special : Collection[str]
            Names of special tokens that are encoded to their id where the text contains them.

        Returns
        -------
        list of int
            Token ids.

        Raises
        ------
        ValueError
            If a name is not a special token, the text has no UTF-8, or a character tokenizer lacks
            characters of the text (the message lists them).
        """
        return next(self.encode_iterable([text], allowed_special))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts in parallel; as `encode_iterable`, in a list.

        Parameters
        ----------
        texts : sequence of str
            The texts.

        Returns
        -------
        list of list of int
            Token ids of each text.
        """
        return list(self.encode_iterable(texts))

    def encode_iterable(
        self, texts: Iterable[str], allowed_special: Collection[str] = ()
    ) -> Iterator[list[int]]:
        """Encode a stream of texts in parallel and in bounded memory.

        Parameters
        ----------
        texts : Iterable[str]
            Read once, about 300,000 characters for each core ahead.
        allowed_special : Collection[str]
            As of `encode`.

        Yields
        ------
        list of int
            Ids of each text, in order.

        Raises
        ------
        ValueError
            As `encode`.
        """
        if isinstance(allowed_special, str):
            allowed_special = (allowed_special,)
        for name in allowed_special:
            if name not in self.special_tokens:
                raise ValueError(
                    f"allowed_special: got {name!r}; expected special tokens of this tokenizer: "
                    f"{sorted(self.special_tokens)}{did_you_mean(name, self.special_tokens)}"
                )
        yield from self._encoder.encode(
            texts, {name: self.special_tokens[name] for name in allowed_special}
        )

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self._inner, self._json, self.special_tokens, self._tiktoken)

    @cached_property
    def _tiktoken(self) -> TiktokenEncoder | None:
        version = None if self._backend == "tokenizers" else tiktoken_version()
        if version is None or find_obstacle(self._inner, self._json) is not None:
            return None
        _log.info("encoding with tiktoken %s, whose ids equal those of tokenizers", version)
        return TiktokenEncoder(self._inner, self._json)

    @property
    def backend(self) -> str:
        """Library that encodes: "tiktoken" or "tokenizers"."""
        return "tokenizers" if self._tiktoken is None else "tiktoken"

    def with_backend(self, backend: Backend) -> "Tokenizer":
        """Return this tokenizer with another backend.

        Parameters
        ----------
        backend : {"auto", "tiktoken", "tokenizers"}
            As of the class.

        Returns
        -------
        Tokenizer
            A tokenizer with equal ids and fingerprint.

        Raises
        ------
        ValueError
            As of the class.
        """
        return _from_json(self._inner.to_str(), backend)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode arbitrary bytes so that `decode_bytes` returns exactly them.

        Valid UTF-8 is encoded as text; any other byte becomes the token of that byte.

        Parameters
        ----------
        data : bytes
            Any bytes.

        Returns
        -------
        list of int
            Token ids.

        Raises
        ------
        ValueError
            If the tokenizer is not byte-level, or normalizes texts, so that they do not round-trip.
        """
        byte_ids = self._byte_ids
        sections = _NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        texts = self.encode_iterable(sections[::2])
        ids: list[int] = []
        # re.split with a group alternates: text, other bytes, text, ..., text.
        for i, section in enumerate(sections):
            if i % 2:
                ids += [byte_ids[byte] for byte in section.encode("utf-8", "surrogateescape")]
            else:
                ids += next(texts)
        if self.decode_bytes(ids) != data:
            raise ValueError(
                "tokenizer: got one that changes texts (it normalizes, adds or drops something); "
                "expected one whose bytes round-trip; use encode, or a tokenizer made by train_bpe"
            )
        return ids

    def decode_bytes(self, ids: Ids) -> bytes:
        """Decode token ids to bytes; special tokens are decoded to their names.

        Parameters
        ----------
        ids : sequence or array of int
            Token ids.

        Returns
        -------
        bytes
            The bytes that the tokens stand for.

        Raises
        ------
        ValueError
            If the tokenizer is not byte-level, or an id is unknown.
        """
        self._check_byte_level()
        return b"".join(self._byte_strings[i] or b"" for i in self._check_ids(ids))

    def decode(self, ids: Ids) -> str:
        """Decode token ids to text; special tokens are decoded to their names.

        Bytes that are not UTF-8 (an incomplete character) become U+FFFD.

        Parameters
        ----------
        ids : sequence or array of int
            Token ids.

        Returns
        -------
        str
            The text.

        Raises
        ------
        ValueError
            If an id is unknown.
        """
        if is_byte_level(self._json):
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        known = self._check_ids(ids)
        try:
            return self._inner.decode(known, skip_special_tokens=False)
        except BaseException as error:
            raise wrap_error("decode these ids", error) from error

    def _check_ids(self, ids: Ids) -> list[int]:
        given = [int(i) for i in ids]
        if unknown := sorted(set(given) - self._ids):
            raise ValueError(
                f"ids: got {unknown[:10]}; expected ids of this tokenizer, which has "
                f"{len(self._ids)} from 0 to {self.vocab_size - 1}; decode with the tokenizer that "
                "encoded the text or trained the model"
            )
        return given

    def _check_byte_level(self) -> None:
        if not is_byte_level(self._json):
            raise ValueError(
                f"tokenizer: got one that decodes with {self._json['decoder']}; expected a "
                "byte-level tokenizer (train_bpe, byte_tokenizer, GPT-2's), which has all bytes"
            )

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the prompt of a language model, starting with the end-of-text token.

        In training every document follows an end-of-text token, so that a prompt, the start of a
        document, does too. Without an end-of-text token an empty prompt becomes a newline, or token
        0 if the vocabulary has no newline.

        Parameters
        ----------
        text : str
            The prompt; may be empty.

        Returns
        -------
        list of int
            Token ids, at least one.

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
        except ValueError:  # a character tokenizer of a single line
            return [0]

    def save(self, path: str | Path, *, begins_prompts: bool = False) -> None:
        """Write the tokenizer as ``tokenizer.json``, the format of Hugging Face libraries.

        Parameters
        ----------
        path : str or Path
            Output file.
        begins_prompts : bool
            Add a post-processor with which those libraries prepend the end-of-text token to a text,
            as `encode_prompt` does. A post-processor that already adds tokens is kept.
        """
        write_atomically(Path(path), self.to_json(begins_prompts=begins_prompts))

    def to_json(self, *, begins_prompts: bool = False) -> str:
        """Return the content of ``tokenizer.json``.

        Parameters
        ----------
        begins_prompts : bool
            As of `save`.

        Returns
        -------
        str
            JSON.
        """
        inner = self._inner
        adds_tokens = bool(inner.encode("", add_special_tokens=True).ids)
        if begins_prompts and self.eot_id is not None and not adds_tokens:
            inner = tokenizers.Tokenizer.from_str(inner.to_str())
            inner.post_processor = self._eot_post_processor()
        content: str = inner.to_str()
        return content

    def _eot_post_processor(self) -> Any:
        number = self.eot_id
        assert number is not None
        end = next(name for name, i in self.special_tokens.items() if i == number)
        return tokenizers.processors.TemplateProcessing(
            single=[end, "$A"], pair=[end, "$A", "$B:1"], special_tokens=[(end, number)]
        )

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token by name."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token as the model writes it, special tokens included."""
        return dict(self._inner.get_vocab(with_added_tokens=True))

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in the order in which BPE merges them; empty for other models."""
        return [(left, right) for left, right in self._json["model"].get("merges", [])]

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self.vocabulary.values())

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows of an embedding table."""
        return 1 + max(self._ids)

    @cached_property
    def eot_id(self) -> int | None:
        """Id of the end-of-text token, or None without one."""
        names = [name for name in END_OF_TEXT_NAMES if name in self.special_tokens]
        return self.special_tokens[names[0]] if names else None

    @cached_property
    def _json(self) -> Any:
        return json.loads(self._inner.to_str())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer JSON: equal for equal tokenizers.

        The post-processor that `save` adds with `begins_prompts` is excluded.
        """
        parts = dict(self._json)
        if self.eot_id is not None and parts["post_processor"] is not None:
            added = json.loads(self._eot_post_processor().__getstate__())
            if parts["post_processor"] == added:
                parts["post_processor"] = None
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @cached_property
    def _byte_strings(self) -> list[bytes | None]:
        return token_byte_strings(self._inner, self._json)

    @cached_property
    def _byte_ids(self) -> list[int]:
        self._check_byte_level()
        return byte_token_ids(self._inner.get_vocab(with_added_tokens=False))

    @cached_property
    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Bytes of UTF-8 text of each token, int32 [vocab_size]; 0 for special tokens.

        Their sum over labels (`tjx_data.batch_bytes`) is the denominator of bits per byte. The text
        is that after normalization; the space that SentencePiece adds before a text counts. Raises
        ValueError for a tokenizer that is not byte-level, of characters or SentencePiece's.
        """
        lengths = np.array([len(text or b"") for text in self._byte_strings], np.int32)
        lengths[list(self.special_tokens.values())] = 0
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        """Whether each token starts a word, bool [vocab_size], for whole-word masking.

        `vocabulary.starts_word` has the rule for byte-level and character tokenizers; special
        tokens start a word. WordPiece vocabularies mark continuing tokens. Raises ValueError for
        other kinds of tokenizers.
        """
        model = self._json["model"]
        if model["type"] == "WordPiece":
            starts = np.ones(self.vocab_size, bool)
            prefix = model["continuing_subword_prefix"]
            starts[[i for token, i in model["vocab"].items() if token.startswith(prefix)]] = False
        else:
            starts = np.array([t is None or starts_word(t) for t in self._byte_strings], bool)
        starts[list(self.special_tokens.values())] = True
        starts.flags.writeable = False
        return starts

    @cached_property
    def always_splits_before_space(self) -> bool:
        """Whether texts can be split before white space without changing ids."""
        return splits_before_space(self._json)


def _from_json(content: str, backend: Backend) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(content), backend=backend)
