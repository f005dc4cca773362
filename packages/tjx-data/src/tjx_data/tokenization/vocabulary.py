"""Properties of vocabulary tokens: their bytes, and whether they start a word."""

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import tokenizers

from tjx_core import ConfigError

N_BYTES = 256
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>")
"""Names of the token between two documents; the first that a vocabulary has is used."""
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# In scripts without spaces each character counts as a word, as in BERT for Chinese.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


def _byte_characters() -> list[str]:
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {chr(byte) for byte in range(N_BYTES)} & alphabet
    others = iter(sorted(alphabet - printable))
    return [chr(byte) if chr(byte) in printable else next(others) for byte in range(N_BYTES)]


BYTE_CHARACTERS = tuple(_byte_characters())
"""GPT-2's character for each byte: itself if printable, else a replacement."""
_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def is_byte_level(description: Mapping[str, Any]) -> bool:
    """Return whether the tokens of a ``tokenizer.json`` are bytes."""
    return any(step["type"] == "ByteLevel" for step in _decoder_steps(description))


def token_byte_strings(
    inner: tokenizers.Tokenizer, description: Mapping[str, Any]
) -> list[bytes | None]:
    """Return the UTF-8 bytes of each token; special tokens are represented by their names.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model.
    description : Mapping
        Its JSON.

    Returns
    -------
    list
        Indexed by id; None for ids without a token.

    Raises
    ------
    ValueError
        If the tokenizer is not byte-level, of characters or SentencePiece's: its tokens have no
        fixed text.
    """
    to_bytes: Callable[[str], bytes] = partial(_decode_piece, _decoder_steps(description))
    added = {}
    if is_byte_level(description):
        to_bytes, added = decode_byte_characters, inner.get_added_tokens_decoder()
    ids = inner.get_vocab(with_added_tokens=True)
    texts: list[bytes | None] = [None] * (1 + max(ids.values()))
    for token, i in ids.items():
        if i in added:
            texts[i] = added[i].content.encode("utf-8")
        else:
            texts[i] = to_bytes(token)
    return texts


def _decode_piece(steps: Sequence[Mapping[str, Any]], token: str) -> bytes:
    """Return the bytes of a token by the steps of a decoder.

    Steps at the ends of a text are left out: a SentencePiece text begins with an added space.
    """
    for step in steps:
        match step:
            case {"type": "ByteFallback"} if _BYTE_PIECE.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                token = token.replace(old, new)
            case {"type": "Metaspace", "replacement": space}:
                token = token.replace(space, " ")
            case {"type": "Fuse" | "Strip" | "ByteFallback"}:
                pass
            case _:
                raise ValueError(
                    f"tokenizer: got one that decodes with {step}; expected a byte-level, "
                    "character or SentencePiece tokenizer, whose tokens have fixed bytes"
                )
    return token.encode()


def decode_byte_characters(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError as error:
        raise ValueError(
            f"token {token[:40]!r} of a byte-level vocabulary has the character {error}, which "
            "represents no byte: the tokenizer is damaged"
        ) from error


def byte_token_ids(vocabulary: Mapping[str, int]) -> list[int]:
    """Return the ids of the 256 single-byte tokens of a byte-level vocabulary.

    Raises
    ------
    ValueError
        If a byte has no token.
    """
    missing = [byte for byte in range(N_BYTES) if BYTE_CHARACTERS[byte] not in vocabulary]
    if missing:
        raise ValueError(
            f"tokenizer: got one without a token for {len(missing)} of the {N_BYTES} bytes, such "
            f"as {missing[0]:#04x}; use one made by train_bpe or byte_tokenizer"
        )
    return [vocabulary[character] for character in BYTE_CHARACTERS]


def unknown_characters_error(text: str, known: Collection[str]) -> ValueError:
    """Return the error for a text with characters that a character tokenizer lacks."""
    found = sorted(set(text).difference(known))
    names = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in found[:20])
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return ValueError(
        f"text: got the characters {names}{more}; expected the {len(known)} of this character "
        "tokenizer; leave them out, or make a tokenizer from text that has them"
    )


def starts_word(text: bytes) -> bool:
    """Return whether a token starts a word, judged by its bytes only.

    A token continues a word if it begins with a letter, a digit or a combining mark, or inside a
    character; all others start one. A word right after a newline or an opening quote therefore
    includes it. In scripts without spaces (Han, kana, Thai, ...) each character starts a word. For
    an incomplete first character, the first character with these leading bytes decides.

    Parameters
    ----------
    text : bytes
        UTF-8 of the token, possibly cut inside a character.
    """
    if not text:
        return False
    length = 1 if text[0] < 0x80 else 2 if text[0] < 0xE0 else 3 if text[0] < 0xF0 else 4
    first = text[:length].ljust(length, b"\x80").decode("utf-8", errors="replace")[0]
    if first == "\ufffd":  # starts inside a character
        return False
    if unicodedata.category(first)[0] not in "LNM":
        return True
    return unicodedata.name(first, "").startswith(_UNSPACED)


def make_special_tokens(
    names: Sequence[str], texts: Collection[str]
) -> list[tokenizers.AddedToken]:
    """Convert names to special tokens of the `tokenizers` library.

    Parameters
    ----------
    names : Sequence[str]
        Names of the special tokens.
    texts : Collection[str]
        Text tokens as the vocabulary writes them.

    Raises
    ------
    ValueError
        With one line for each name that is empty, repeated, or equal to a text token: that text
        would encode to the special token.
    """
    problems = []
    if "" in names:
        problems.append("special_tokens: got ''; expected a name, such as <|endoftext|>")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(
                f"special_tokens: got {name!r} {names.count(name)} times; expected it once"
            )
        if name in texts:
            problems.append(
                f"special_tokens: got {name!r}, which is also a token of text; expected a name "
                f"that no text encodes to, such as '<|{name}|>'"
            )
    if problems:
        raise ConfigError(problems)
    return [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]


def _decoder_steps(description: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    decoder: Mapping[str, Any] = description["decoder"] or {"type": None}
    steps: Sequence[Mapping[str, Any]] = decoder.get("decoders", [decoder])
    return steps
