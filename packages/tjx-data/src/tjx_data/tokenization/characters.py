"""A vocabulary of single characters, for small experiments on one text."""

from collections.abc import Iterable, Sequence

import tokenizers

from tjx_data.tokenization.text_splitting import LONE_SURROGATE
from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import make_special_tokens

UNKNOWN = "<unk>"


def char_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Make a tokenizer whose tokens are the distinct characters of the texts, sorted.

    The ids of the characters are those of nanoGPT's ``prepare.py`` for the same text; then come
    ``<unk>``, which no text becomes, and the special tokens. Text of known characters makes the
    round trip exactly; encoding an unknown character raises ValueError.

    Parameters
    ----------
    texts : Iterable[str]
        Read once.
    special_tokens : Sequence[str]
        For example ``("<|endoftext|>",)`` for a corpus of more than one document.

    Raises
    ------
    ValueError
        If the texts hold no character; or a special token has no name, is given twice, or is
        itself a character of the texts; or a text cannot be written in UTF-8.

    Examples
    --------
    >>> char_tokenizer(["hello"]).encode("hole")
    [1, 3, 2, 0]
    """
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    characters = sorted(seen)
    if not characters:
        raise ValueError("the texts hold no character: a character tokenizer needs at least one")
    if any("\ud800" <= character <= "\udfff" for character in characters):
        raise ValueError(LONE_SURROGATE)
    vocabulary = {token: i for i, token in enumerate([*characters, UNKNOWN])}
    # BPE without merges cuts a text into characters ten times as fast as WordLevel after a
    # regular expression that matches each of them.
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False)
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(make_special_tokens((UNKNOWN, *special_tokens), characters))
    return Tokenizer(inner)
