"""What the tokens of a vocabulary stand for: their bytes, and whether they start a word."""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tokenizers

N_BYTES = 256
# What vocabularies call the token between two documents; the first that exists is used.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>")
# Scripts without spaces between words: there each character is a word, as in BERT's Chinese.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


def _byte_characters() -> list[str]:
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    themselves = {chr(byte) for byte in range(N_BYTES)} & alphabet
    others = iter(sorted(alphabet - themselves))
    return [chr(byte) if chr(byte) in themselves else next(others) for byte in range(N_BYTES)]


# How a byte-level vocabulary writes each byte: as itself if that can be seen, as GPT-2 has it.
BYTE_CHARACTERS = tuple(_byte_characters())
_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def is_byte_level(description: Mapping[str, Any]) -> bool:
    """Tell from a tokenizer's JSON whether its tokens are bytes."""
    return _decodes_by(description, "ByteLevel")


def token_byte_strings(
    inner: tokenizers.Tokenizer, description: Mapping[str, Any]
) -> list[bytes | None]:
    """Return the UTF-8 bytes that each token stands for, special tokens by their names.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model.
    description : Mapping
        Its JSON.

    Returns
    -------
    list
        For each id from 0 on; None for an id that no token has.

    Raises
    ------
    ValueError
        If the tokenizer is neither byte-level nor of characters: its tokens do not stand for a
        fixed text.
    """
    byte_level = is_byte_level(description)
    if not byte_level and not _decodes_by(description, "Fuse"):
        raise ValueError(
            "the bytes behind a token are known for a byte-level or character tokenizer; this one "
            f"decodes with {description['decoder']}"
        )
    ids = inner.get_vocab(with_added_tokens=True)
    added = inner.get_added_tokens_decoder()
    texts: list[bytes | None] = [None] * (1 + max(ids.values()))
    for token, i in ids.items():
        if i in added:
            texts[i] = added[i].content.encode("utf-8")
        else:
            texts[i] = _bytes_of(token) if byte_level else token.encode()
    return texts


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError as error:
        raise ValueError(
            f"token {token[:40]!r} of a byte-level vocabulary has the character {error}, which "
            "stands for no byte: the tokenizer is damaged"
        ) from error


def starts_word(text: bytes) -> bool:
    """Tell whether a token of text, seen alone, starts a word.

    It does unless it begins with a letter, a digit or a mark on a letter, or inside a character.
    Scripts without spaces have a word at each character. Where a token holds only the beginning
    of its first character, the first character with that beginning decides.
    """
    if not text:
        return False
    length = 1 if text[0] < 0x80 else 2 if text[0] < 0xE0 else 3 if text[0] < 0xF0 else 4
    first = text[:length].ljust(length, b"\x80").decode("utf-8", errors="replace")[0]
    if first == "\ufffd":  # not the beginning of a character
        return False
    if unicodedata.category(first)[0] not in "LNM":
        return True
    return unicodedata.name(first, "").startswith(_UNSPACED)


def make_special_tokens(
    names: Sequence[str], texts: Collection[str]
) -> list[tokenizers.AddedToken]:
    """Return special tokens as the library wants them.

    Parameters
    ----------
    names : Sequence[str]
        What they are called.
    texts : Collection[str]
        How the vocabulary writes its tokens of text.

    Raises
    ------
    ValueError
        With a line for each name that is empty, given twice, or that of a token of text: such a
        text would then turn into the special token.
    """
    problems = []
    if "" in names:
        problems.append("a special token has no name; give it one, such as <|endoftext|>")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(
                f"special token {name!r} is given {names.count(name)} times; give it once"
            )
        if name in texts:
            problems.append(
                f"special token {name!r} is also a token of text; choose a name that no text "
                f"makes, such as '<|{name}|>'"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]


def _decodes_by(description: Mapping[str, Any], kind: str) -> bool:
    decoder = description["decoder"]
    if decoder is None:
        return False
    return any(step["type"] == kind for step in decoder.get("decoders", [decoder]))
