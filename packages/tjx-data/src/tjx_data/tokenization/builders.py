"""Construction of tokenizers: byte-level BPE training, byte and character vocabularies."""

import json
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from tjx_data.corpora.documents import Progress, Stage
from tjx_data.tokenization.text_splitting import LONE_SURROGATE, split_at_token_boundaries
from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import (
    BYTE_CHARACTERS,
    END_OF_TEXT_NAMES,
    N_BYTES,
    make_special_tokens,
)

UNKNOWN = "<unk>"


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    *,
    progress: Progress | None = None,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenization.

    Special tokens get the first ids, followed by the 256 bytes and the merges in the order in which
    they were learned. The result depends on the set of texts only, not on their order or chunking
    by the iterable. Pass whole documents: cutting a document at an arbitrary position changes the
    words at the cut.

    Parameters
    ----------
    texts : Iterable[str]
        Documents, read once. Memory grows with the number of distinct words, not of texts.
    vocab_size : int
        Size of the vocabulary, special tokens and the 256 bytes included.
    special_tokens : Sequence[str]
        Tokens that no text encodes to.
    progress : Progress, optional
        Called with the bytes of text read.

    Returns
    -------
    Tokenizer
        A byte-level tokenizer.

    Raises
    ------
    ValueError
        If `vocab_size` is less than the bytes and special tokens, or more than the repeated pairs
        of the texts give; if a special token is empty, repeated, or equal to a text token; or if a
        text has no UTF-8.

    Examples
    --------
    >>> tokenizer = train_bpe(["the cat and the hat and the bat"], 262)
    >>> tokenizer.decode(tokenizer.encode("the tab, été"))
    'the tab, été'
    """
    smallest = N_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: got {vocab_size}; expected at least {smallest} for byte-level BPE "
            f"({N_BYTES} bytes and {len(special_tokens)} special tokens)"
        )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=make_special_tokens(special_tokens, BYTE_CHARACTERS),
        initial_alphabet=sorted(BYTE_CHARACTERS),
        show_progress=False,
    )
    try:
        inner.train_from_iterator(_split_texts(texts, progress), trainer)
    except UnicodeEncodeError as error:
        raise ValueError(LONE_SURROGATE) from error
    merges: list[list[str]] = json.loads(inner.to_str())["model"]["merges"]
    make_special_tokens(special_tokens, {"".join(pair) for pair in merges})
    learned = inner.get_vocab_size()
    if learned < vocab_size:
        raise ValueError(
            f"vocab_size: got {vocab_size}; expected at most {learned}, the tokens that the "
            "repeated pairs of this corpus give; choose a smaller size, or a larger corpus"
        )
    return Tokenizer(inner)


def _split_texts(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        yield from split_at_token_boundaries(text)
        if progress is not None:
            n_bytes += len(text.encode("utf-8"))
            progress(Stage("train tokenizer", n_bytes))


def byte_tokenizer(special_tokens: Sequence[str] = END_OF_TEXT_NAMES[:1]) -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes of UTF-8.

    The id of a byte is its value; special tokens follow from 256.

    Parameters
    ----------
    special_tokens : Sequence[str]
        Tokens that no text encodes to.

    Returns
    -------
    Tokenizer
        A byte-level tokenizer without merges.

    Raises
    ------
    ValueError
        If a special token is empty, repeated, or equal to the token of a byte.

    Examples
    --------
    >>> byte_tokenizer().encode("hé") == list("hé".encode())
    True
    """
    vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    # Without merges there is no need to split words first.
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(make_special_tokens(special_tokens, vocabulary))
    return Tokenizer(inner)


def char_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Return a tokenizer whose tokens are the distinct characters of texts, sorted.

    Characters have the ids of nanoGPT's ``prepare.py`` for the same text, followed by ``<unk>``,
    which no text encodes to, and the special tokens. Encoding an unknown character raises
    ValueError.

    Parameters
    ----------
    texts : Iterable[str]
        Read once.
    special_tokens : Sequence[str]
        For example ``("<|endoftext|>",)`` for a corpus of several documents.

    Returns
    -------
    Tokenizer
        A tokenizer of single characters.

    Raises
    ------
    ValueError
        If the texts are empty; if a special token is empty, repeated, or a character of the texts;
        or if a text has no UTF-8.

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
        raise ValueError("texts: got no character; expected at least one")
    if any("\ud800" <= character <= "\udfff" for character in characters):
        raise ValueError(LONE_SURROGATE)
    vocabulary = {token: i for i, token in enumerate([*characters, UNKNOWN])}
    # BPE without merges splits characters ten times as fast as WordLevel with a regular expression.
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False)
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(make_special_tokens((UNKNOWN, *special_tokens), characters))
    return Tokenizer(inner)
