"""Training a byte-level BPE vocabulary as GPT-2's was made."""

import json
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from tjx_data.corpora.documents import Progress, Stage
from tjx_data.tokenization.text_splitting import LONE_SURROGATE, split_at_token_boundaries
from tjx_data.tokenization.tokenizer import Tokenizer
from tjx_data.tokenization.vocabulary import BYTE_CHARACTERS, N_BYTES, make_special_tokens


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    *,
    progress: Progress | None = None,
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary with GPT-2's pre-tokenisation.

    The special tokens get the first ids, then come the 256 bytes, then the merges in the order
    in which they were learnt. The result depends on the texts alone, not on their order or on
    how the iterable hands them over. Give whole documents: where a document is cut at an
    arbitrary place, the words at the cut are other words.

    Parameters
    ----------
    texts : Iterable[str]
        The documents; read once. Memory grows with the number of distinct words, not of texts.
    vocab_size : int
        Size of the vocabulary, special tokens and the 256 bytes included.
    special_tokens : Sequence[str]
        Tokens that no text produces.
    progress : Progress, optional
        Told the bytes of text that have been read.

    Raises
    ------
    ValueError
        If the vocabulary is too small to hold the bytes and a merge, or the texts hold too few
        repeated pairs to fill it; or a special token has no name, is given twice, or is also the
        spelling of a token of text; or a text cannot be written in UTF-8.

    Examples
    --------
    >>> tokenizer = train_bpe(["the cat and the hat and the bat"], 262)
    >>> tokenizer.decode(tokenizer.encode("the tab, été"))
    'the tab, été'
    """
    smallest = N_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: byte-level BPE needs at least {smallest} "
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
        inner.train_from_iterator(_read(texts, progress), trainer)
    except UnicodeEncodeError as error:
        raise ValueError(LONE_SURROGATE) from error
    make_special_tokens(special_tokens, {"".join(pair) for pair in _merges(inner)})
    learnt = inner.get_vocab_size()
    if learnt < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is more than this corpus can fill: its repeated pairs give "
            f"{learnt} tokens; choose vocab_size={learnt} or less, or a larger corpus"
        )
    return Tokenizer(inner)


def _merges(inner: tokenizers.Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(inner.to_str())["model"]["merges"]
    return merges


def _read(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        yield from split_at_token_boundaries(text)
        if progress is not None:
            n_bytes += len(text.encode("utf-8"))
            progress(Stage("train tokenizer", n_bytes))
