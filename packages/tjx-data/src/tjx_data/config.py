"""The choices that turn text into batches of tokens."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_data.corpora.documents import Holdout
from tjx_data.corpora.registry import CORPORA, OTHER_DATA, find_corpus, held_out_splits, is_corpus
from tjx_data.images.augmentation import NO_AUGMENTATION, Augmentation


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text to train on, and how it becomes batches of tokens.

    Attributes
    ----------
    corpus : str
        Name of a corpus (python-docs needs no network), or of one of its official splits, such as
        wikitext-103:test; text in path is taken in its place. Data for other models than of text:
        mnist and images (path says where), byte-reversal.
    path : str or None
        Files of your own: one, a pattern such as 'books/*.txt', or several with commas between.
        Text (UTF-8), .jsonl, .parquet; each but the last also as .gz or .zst.
    text_field : str
        Where the text is in records of .jsonl and .parquet.
    mixture : str or None
        Several corpora or paths with weights, such as 'fineweb-edu=0.8,books/*.txt=0.2'; taken in
        the place of corpus and path.
    seq_len : int
        Tokens in a row of a batch; with byte-reversal the bytes of the longest string.
    packing : str
        What a row holds: windows (a stretch of the text, wherever documents end) or documents
        (whole ones that see nothing of each other).
    windows : str
        Where windows start: shifted (each epoch reads every token, cut at another place), random
        (each window independently, as in nanoGPT) or aligned (as runs of tjx 0.1, which resume with
        it: at nearly the same places in each epoch).
    whole_words : bool
        Whether a masked language model has words masked as a whole.
    resize : bool
        Whether images are scaled to the model's size; else they must have it.
    augment : Augmentation
        What is done to images that are trained on.
    tokenizer : str
        bpe (learnt from the training text), char, byte, gpt2 (from the hub), a tokenizer.json, a
        folder that holds a tokenizer, or auto: gpt2 for corpora from the hub, bpe for all others.
    vocab_size : int
        Tokens in the vocabulary that bpe learns; other tokenizers bring their own.
    holdout : str
        What is held out for validation: official (the corpus's own validation split), documents
        (chosen by their hash), tail (the end of the text, for a corpus that is one long document),
        or auto: official for corpora that have it, documents for all other text.
    holdout_fraction : float
        Share of the text that is held out, between 0 and 1; without meaning for official.
    strict : bool
        Whether a malformed record ends preparing; else it is counted, listed and left out.
    verify : bool
        Whether all hashes of the prepared data are compared before training, at about 1.5 GB a
        second and core; else sizes and headers alone.
    cache_dir : str or None
        Folder for prepared data; None is tjx/data in the user's cache folder.
    """

    corpus: str = "python-docs"
    path: str | None = None
    text_field: str = "text"
    mixture: str | None = None
    seq_len: int = 256
    packing: Literal["windows", "documents"] = "windows"
    windows: Literal["shifted", "random", "aligned"] = "shifted"
    whole_words: bool = False
    resize: bool = False
    augment: Augmentation = NO_AUGMENTATION
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    holdout: Literal["auto", "documents", "tail", "official"] = "auto"
    holdout_fraction: float = 0.1
    strict: bool = False
    verify: bool = True
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
        if self.mixture is not None:
            problems += _mixture_problems(self.mixture)
        if self.packing not in ("windows", "documents"):
            problems.append(f"packing={self.packing!r} is unknown; choose windows or documents")
        if self.windows not in ("shifted", "random", "aligned"):
            problems.append(f"windows={self.windows!r} is unknown; choose shifted, random, aligned")
        if self.packing == "documents" and self.windows == "random":
            problems.append(
                "windows='random' is for packing='windows'; leave it out to pack whole documents"
            )
        if not self.text_field:
            problems.append("text_field='' is empty; give the name of the field with the text")
        if self.seq_len < 1:
            problems.append(f"seq_len={self.seq_len} is too small; a row needs at least 1 token")
        if not self.tokenizer:
            problems.append("tokenizer='' is empty; choose bpe, char, byte, gpt2, auto or a path")
        if self.tokenizer_kind == "bpe" and self.vocab_size < 257:
            problems.append(
                f"vocab_size={self.vocab_size} is too small; bpe needs at least 257 (256 bytes and "
                "the end of a document)"
            )
        if self.holdout not in ("auto", *get_args(Holdout)):
            problems.append(
                f"holdout={self.holdout!r} is unknown; choose auto, documents, tail or official"
            )
        elif self.holdout == "official" and not problems:
            problems += [
                f"holdout='official': {name!r} has no official validation split; choose auto, "
                "documents or tail"
                for name in self.weights
                if not self._has_official(name)
            ]
        if not 0 < self.holdout_fraction < 1:
            problems.append(
                f"holdout_fraction={self.holdout_fraction} is not a share; choose a number "
                "between 0 and 1, such as 0.1"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def weights(self) -> dict[str, float]:
        """Corpora and paths to train on, with the weight of each."""
        if self.mixture is None:
            return {self.path or self.corpus: 1.0}
        found, _ = _read_mixture(self.mixture)
        return found

    def is_path(self, name: str) -> bool:
        """Tell whether a name of `weights` is a path, and not a corpus."""
        return not is_corpus(name) if self.mixture is not None else self.path is not None

    def holdout_of(self, name: str) -> Holdout:
        """Return how validation is split off a corpus or path of `weights`, ``auto`` resolved."""
        if self.holdout != "auto":
            return self.holdout
        return "official" if self._has_official(name) else "documents"

    def _has_official(self, name: str) -> bool:
        return not self.is_path(name) and "validation" in held_out_splits(name)

    @property
    def tokenizer_kind(self) -> str:
        """The tokenizer with ``auto`` resolved: bpe, char, byte, gpt2, or a path."""
        if self.tokenizer != "auto":
            return self.tokenizer
        kinds = {
            "bpe"
            if self.is_path(name) or not is_corpus(name)
            else CORPORA[name.partition(":")[0]].tokenizer
            for name in self.weights
        }
        return kinds.pop() if len(kinds) == 1 else "bpe"


def _read_mixture(mixture: str) -> tuple[dict[str, float], list[str]]:
    """Return the weights, and a line for each entry that is none."""
    found: dict[str, float] = {}
    problems = []
    for entry in mixture.split(","):
        name, equals, weight = (piece.strip() for piece in entry.rpartition("="))
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not (equals and name and math.isfinite(number) and number > 0):
            problems.append(
                f"mixture: {entry!r} is not NAME=WEIGHT with a weight above 0; write such as "
                "'fineweb-edu=0.8,books/*.txt=0.2'"
            )
        elif name in found:
            problems.append(f"mixture: {name!r} is there twice; give it one weight")
        else:
            found[name] = number
    return found, problems


def _mixture_problems(mixture: str) -> list[str]:
    found, problems = _read_mixture(mixture)
    for name in found:
        # What looks like a path is one; the files are looked for later.
        if is_corpus(name) or not any(mark in name for mark in "/.*\\"):
            try:
                find_corpus(name)
            except ValueError as error:
                problems.append(f"mixture: {error}")
    return problems
