"""A vocabulary of the 256 bytes: it needs no training and knows every text."""

from collections.abc import Sequence

import tokenizers

from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import BYTE_CHARACTERS, END_OF_TEXT_NAMES, make_special_tokens


def byte_tokenizer(special_tokens: Sequence[str] = END_OF_TEXT_NAMES[:1]) -> Tokenizer:
    """Make a tokenizer whose tokens are the 256 bytes of UTF-8.

    The id of a byte is its value; the special tokens follow from 256 on.

    Parameters
    ----------
    special_tokens : Sequence[str]
        Tokens that no text produces.

    Raises
    ------
    ValueError
        If a special token has no name, is given twice, or is named as a byte is written.

    Examples
    --------
    >>> byte_tokenizer().encode("hé") == list("hé".encode())
    True
    """
    vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    # Nothing is merged, so that words need not be found first.
    whole = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = whole
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(make_special_tokens(special_tokens, vocabulary))
    return Tokenizer(inner)
