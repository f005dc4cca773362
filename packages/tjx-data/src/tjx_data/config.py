"""The choices that turn text into batches of tokens."""

from dataclasses import dataclass
from typing import Literal

from tjx_data.corpora import CORPORA, OTHER_DATA, find_corpus


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text to train on, and how it becomes batches of tokens.

    Attributes
    ----------
    corpus : str
        Name of a corpus (python-docs needs no network); text in path is taken in its place. Data
        for other models than of text: mnist (images; path is their folder), byte-reversal.
    path : str or None
        Text files of your own (UTF-8): a file, or a pattern such as 'books/*.txt'.
    seq_len : int
        Tokens in a row of a batch; with byte-reversal the bytes of the longest string.
    tokenizer : str
        bpe (learnt from the training text), char, gpt2 (from the hub), a tokenizer.json, a folder
        that holds a tokenizer, or auto: gpt2 for corpora from the hub, bpe for all others.
    vocab_size : int
        Tokens in the vocabulary that bpe learns; other tokenizers bring their own.
    holdout : str
        What is held out for validation: documents (chosen by their hash) or tail (the end of the
        text, for a corpus that is one long document).
    holdout_fraction : float
        Share of the text that is held out, between 0 and 1.
    cache_dir : str or None
        Folder for prepared data; None is tjx/data in the user's cache folder.
    """

    corpus: str = "python-docs"
    path: str | None = None
    seq_len: int = 256
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    holdout: Literal["documents", "tail"] = "documents"
    holdout_fraction: float = 0.1
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.corpus not in OTHER_DATA:
            try:
                find_corpus(self.corpus)
            except ValueError as error:
                problems.append(str(error))
        if self.path is not None and not self.path:
            problems.append("path='' is empty; give a file or a pattern, or leave it out")
        if self.seq_len < 1:
            problems.append(f"seq_len={self.seq_len} is too small; a row needs at least 1 token")
        if not self.tokenizer:
            problems.append("tokenizer='' is empty; choose bpe, char, gpt2, auto or a path")
        if self.tokenizer_kind == "bpe" and self.vocab_size < 257:
            problems.append(
                f"vocab_size={self.vocab_size} is too small; bpe needs at least 257 (256 bytes and "
                "the end of a document)"
            )
        if self.holdout not in ("documents", "tail"):
            problems.append(f"holdout={self.holdout!r} is unknown; choose documents or tail")
        if not 0 < self.holdout_fraction < 1:
            problems.append(
                f"holdout_fraction={self.holdout_fraction} is not a share; choose a number "
                "between 0 and 1, such as 0.1"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def tokenizer_kind(self) -> str:
        """The tokenizer with ``auto`` resolved: bpe, char, gpt2, or a path."""
        if self.tokenizer != "auto":
            return self.tokenizer
        if self.path is not None or self.corpus not in CORPORA:
            return "bpe"
        return CORPORA[self.corpus].tokenizer
