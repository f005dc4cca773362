"""Reading of SentencePiece models (Unigram and BPE) as models of the `tokenizers` library.

Field numbers are those of ``sentencepiece_model.proto`` (github.com/google/sentencepiece).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
"""The character for a space in pieces."""
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "char"}
# Fields of ModelProto, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_CHARACTER_MAP, _ADDS_PREFIX, _REMOVES_SPACES, _ESCAPES_SPACES = 2, 3, 4, 5

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Kind(IntEnum):
    """Types of pieces."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """An entry of the vocabulary; its place is the id."""

    text: str
    score: float
    kind: Kind


def parse_model(data: bytes) -> tokenizers.Tokenizer:
    """Convert a SentencePiece model.

    Parameters
    ----------
    data : bytes
        Content of a ``tokenizer.model`` or ``spiece.model``.

    Returns
    -------
    tokenizers.Tokenizer
        A model with equal ids, except for a text that spells a byte piece of a Unigram model, such
        as ``<0x41>``, which becomes this piece. Control pieces are its special tokens.

    Raises
    ------
    ValueError
        If the data is not a Unigram or BPE model.
    """
    model: dict[int, list[Any]] = {_PIECES: [], _TRAINER: [], _NORMALIZER: []}
    for field, value in _fields(data):
        if field in model:
            model[field].append(_message(value))
    pieces = [_piece(fields) for fields in map(dict, map(_fields, model[_PIECES]))]
    trainer, normalizer = (
        {number: value for part in model[field] for number, value in _fields(part)}
        for field in (_TRAINER, _NORMALIZER)
    )
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} unknown pieces; expected one")
    kind = MODEL_TYPES.get(int(trainer.get(_MODEL_TYPE, 1)), "unknown")
    has_bytes = bool(trainer.get(_BYTE_FALLBACK, 0))
    if kind == "Unigram":
        scored = [(piece.text, piece.score) for piece in pieces]
        inner = tokenizers.Tokenizer(models.Unigram(scored, unknown[0], has_bytes))
    elif kind == "BPE":
        vocab = {piece.text: i for i, piece in enumerate(pieces)}
        inner = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_merges(pieces, vocab),
                unk_token=pieces[unknown[0]].text,
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        )
    else:
        raise ValueError(f"its model type is {kind}; expected Unigram or BPE")
    _add_text_steps(inner, normalizer, pieces)
    return inner


def _add_text_steps(
    inner: tokenizers.Tokenizer, spec: Mapping[int, Any], pieces: Sequence[Piece]
) -> None:
    """Add normalization, special tokens and decoding to a model."""
    if not spec.get(_ESCAPES_SPACES, 1):
        raise ValueError("it does not escape spaces (escape_whitespaces); expected one that does")
    adds_prefix = bool(spec.get(_ADDS_PREFIX, 1))
    own = [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]
    steps: list[Any] = []
    if characters := spec.get(_CHARACTER_MAP):
        table = _message(characters)
        # The library aborts the process if the table is shorter than its first number says.
        if int.from_bytes(table[:4], "little") > len(table) - 4:
            raise ValueError("its character map is truncated")
        steps.append(normalizers.Precompiled(table))
    if spec.get(_REMOVES_SPACES, 1):
        ends, gaps = tokenizers.Regex(f"^ +|[ {SPACE}]+$"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(gaps, " ")]
    if adds_prefix and not own:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    inner.normalizer = normalizers.Sequence(steps)
    if adds_prefix and own:  # a normalizer would begin each text between them with a space
        inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    special = [piece.text for piece in pieces if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)]
    added = tokenizers.AddedToken
    inner.add_special_tokens([added(text, special=True, normalized=False) for text in special])
    inner.add_tokens([added(text, special=False, normalized=SPACE in text) for text in own])
    strip = [decoders.Strip(" ", 1, 0)] if adds_prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _merges(pieces: Sequence[Piece], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that join to a piece, those of the highest score first."""
    normal = [piece for piece in pieces if piece.kind == Kind.NORMAL]
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):  # stable: by id if equal
        for i in range(1, len(piece.text)):
            left, right = piece.text[:i], piece.text[i:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    return merges


def _piece(fields: Mapping[int, Any]) -> Piece:
    text = _message(fields.get(1, b"")).decode("utf-8")
    score = fields.get(2, b"\0\0\0\0")
    if not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"the score of piece {text!r} is no float")
    return Piece(text, struct.unpack("<f", score)[0], Kind(fields.get(3, Kind.NORMAL)))


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number; expected a message")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the numbered fields of a Protocol Buffers message: integers, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(_MAX_VARINT_BYTES):
            if at >= len(data):
                raise ValueError("it is truncated")
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << (7 * shift)
            if byte < 0x80:
                return value
        raise ValueError("a number has too many bytes")

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            yield field, varint()
            continue
        if wire not in (_EIGHT_BYTES, _LENGTH, _FOUR_BYTES):
            raise ValueError(f"field {field} has the unknown type {wire}")
        length = varint() if wire == _LENGTH else {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[wire]
        if length > len(data) - at:
            raise ValueError("it is truncated")
        yield field, data[at : at + length]
        at += length
