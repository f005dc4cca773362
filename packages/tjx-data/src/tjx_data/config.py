"""Configuration of training data: corpus, tokenizer, holdout and rows."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from tjx_core import ConfigError, Problem, problems_of
from tjx_data.corpora.documents import Holdout
from tjx_data.corpora.registry import (
    OTHER_DATA,
    find_corpus,
    held_out_splits,
    is_corpus,
)
from tjx_data.corpora.text_template import record_fields
from tjx_data.images.augmentation import NO_AUGMENTATION, Augmentation
from tjx_data.mixtures.mixture_config import (
    Weights,
    parse_curriculum,
    parse_mixture,
    validate_names,
)

STREAM_SAMPLE_TOKENS = 2_000_000
"""Training tokens at the start of a stream that are prepared, with the held-out text there."""
TOKEN_SUFFIXES = (".bin", ".npy")
"""Suffixes of files of token ids."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings that determine the training and validation data.

    Attributes
    ----------
    corpus : str
        Name of a corpus (python-docs needs no network), or of one of its official splits, such as
        wikitext-103:test; or any dataset of the hub, whose rows are streamed:
        `hub:OWNER/NAME[:CONFIG][:SPLIT][@COMMIT]`. Ignored if path is set. For models without text
        input: mnist and images (path is their location), byte-reversal.
    path : str or None
        Local text files: one, a pattern such as 'books/*.txt', a folder, or several separated by
        commas. UTF-8 text, .jsonl, .tar (WebDataset), also with .gz or .zst; .parquet, .arrow.
        URLs of object stores (s3://bucket/*.jsonl) are downloaded into the cache first. Or token
        ids: a .bin (as of nanoGPT) or .npy file with its val file beside it, or a folder with
        train.bin.
    id_dtype : str
        Dtype of the ids in a .bin file: uint16, uint32, or auto (uint16, or uint32 for a vocabulary
        of more than 65,536 ids).
    text_field : str
        Field of the text in records of files and of hub: datasets, or a template of several fields,
        such as '{title}: {text}'.
    mixture : str or None
        Several corpora or paths with weights, such as 'fineweb-edu=0.8,books/*.txt=0.2'; replaces
        corpus and path.
    mixture_temperature : float or None
        Weights from sizes: with T, a corpus of n training tokens has the weight n**(1/T); 1 is
        proportional to the size, and more favors small corpora. The mixture has names only then.
    max_epochs : float or None
        Most times that a run repeats a corpus of the mixture; the others get the rest in proportion
        to their weights. 4 epochs are nearly as good as new text (Muennighoff et al. 2023).
    curriculum : str or None
        Other weights from given steps on, such as '1000:web=0.5,books=0.5;9000:books=1'. Corpora
        that an entry leaves out are not read; validation has the weights of the last.
    seq_len : int
        Tokens per row; with byte-reversal the bytes of the longest string.
    packing : str
        Content of a row: windows (consecutive tokens, across document borders) or documents (whole
        documents that do not attend to each other).
    windows : str
        Start of windows: shifted (each epoch reads every token, cut at a new random offset), random
        (independent windows, as in nanoGPT) or aligned (nearly the same windows in each epoch; to
        resume runs of tjx 0.1).
    whole_words : bool
        For masked language models: mask whole words.
    resize : bool
        Resize images to the size of the model; without it they must have that size.
    augment : Augmentation
        Random changes of training images.
    tokenizer : str
        bpe (trained on the training text), char, byte, gpt2 (from the hub), a tokenizer.json, a
        SentencePiece .model, a folder with a tokenizer, or auto: gpt2 for corpora from the hub, bpe
        for all others. With token ids as data the tokenizer of the ids; bpe and auto mean none.
    vocab_size : int
        Vocabulary size of bpe; ignored with other tokenizers.
    chat_tokens : bool
        Give the tokenizers bpe and char the special tokens of the chat template tjx, for a model
        that is fine-tuned on conversations.
    holdout : str
        Validation split: official (that of the corpus), documents (by the hash of each document),
        tail (the end of the text, for one or a few long documents), or auto: official where the
        corpus has one, tail for a few files of which documents would hold out none (without
        stream and max_tokens), documents for all other text.
    holdout_fraction : float
        Share of the text that is held out, between 0 and 1; ignored with official.
    max_tokens : int or None
        Most training tokens of each corpus, from its start. The rest is not read, except with
        holdout tail.
    max_documents : int or None
        Most documents of each corpus, from its start; held-out ones count, official splits do not.
    subset : float
        Fraction of the documents of each corpus to use, chosen by their hash: 0.01 is part of 0.02.
    stream : bool
        Tokenize the training text while training, without a copy on disk. Only its start is
        prepared, for the tokenizer and the validation split. Batches then depend on the number of
        processes.
    shuffle_buffer : int
        Rows that a stream shuffles together; up to twice as many are in memory.
    strict : bool
        Fail at a malformed record; by default it is counted, listed and left out.
    verify : bool
        Compare all hashes of the prepared data before training, at about 1.5 GB/s per core; without
        it only sizes and headers.
    cache_dir : str or None
        Folder of prepared data; None is tjx/data in the user's cache folder.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    corpus: str = "python-docs"
    path: str | None = None
    id_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    text_field: str = "text"
    mixture: str | None = None
    mixture_temperature: float | None = None
    max_epochs: float | None = None
    curriculum: str | None = None
    seq_len: int = 256
    packing: Literal["windows", "documents"] = "windows"
    windows: Literal["shifted", "random", "aligned"] = "shifted"
    whole_words: bool = False
    resize: bool = False
    augment: Augmentation = NO_AUGMENTATION
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    chat_tokens: bool = False
    holdout: Literal["auto", "documents", "tail", "official"] = "auto"
    holdout_fraction: float = 0.1
    max_tokens: int | None = None
    max_documents: int | None = None
    subset: float = 1.0
    stream: bool = False
    shuffle_buffer: int = 1024
    strict: bool = False
    verify: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        if self.corpus not in OTHER_DATA:
            try:
                find_corpus(self.corpus)
            except ValueError as error:
                problems += problems_of(error)
        if self.path is not None and not self.path:
            problems.append(Problem("path", "got ''; expected a file or a pattern; leave it out"))
        problems += self._mixture_problems()
        for name, allowed in (
            ("packing", ("windows", "documents")),
            ("windows", ("shifted", "random", "aligned")),
            ("id_dtype", ("auto", "uint16", "uint32")),
            ("holdout", ("auto", *get_args(Holdout))),
        ):
            if (value := getattr(self, name)) not in allowed:
                message = f"got {value!r}; expected one of {', '.join(allowed)}"
                problems.append(Problem(name, message))
        if self.packing == "documents" and self.windows == "random":
            message = "got 'random'; expected another order with packing='documents'; leave it out"
            problems.append(Problem("windows", message, ("packing",)))
        if not self.text_field:
            problems.append(Problem("text_field", "got ''; expected the name of a field"))
        try:
            record_fields(self.text_field)
        except ConfigError as error:
            problems += error.problems
        if self.seq_len < 1:
            problems.append(Problem("seq_len", f"got {self.seq_len}; expected at least 1"))
        if not self.tokenizer:
            message = "got ''; expected bpe, char, byte, gpt2, auto or a path"
            problems.append(Problem("tokenizer", message))
        if self.chat_tokens and self.tokenizer_kind not in ("bpe", "char"):
            message = (
                f"got true with tokenizer {self.tokenizer}; expected bpe or char; leave it out"
            )
            problems.append(Problem("chat_tokens", message, ("tokenizer",)))
        if self.tokenizer_kind == "bpe" and self.vocab_size < 257:
            message = (
                f"got {self.vocab_size}; expected at least 257 with tokenizer bpe (256 bytes and "
                "the end-of-text token)"
            )
            problems.append(Problem("vocab_size", message, ("tokenizer",)))
        if self.holdout == "official" and not problems:
            problems += [
                Problem(
                    "holdout",
                    f"got 'official'; {name!r} has no official validation split; choose auto, "
                    "documents or tail",
                )
                for name in self.weights
                if not self._has_official(name)
            ]
        if not 0 < self.holdout_fraction < 1:
            message = f"got {self.holdout_fraction}; expected a number between 0 and 1, such as 0.1"
            problems.append(Problem("holdout_fraction", message))
        for name, least in (("max_tokens", 3), ("max_documents", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                message = f"got {value}; expected at least {least}, or none for no limit"
                problems.append(Problem(name, message))
        if not 0 < self.subset <= 1:
            message = f"got {self.subset}; expected above 0 and at most 1, such as 0.01"
            problems.append(Problem("subset", message))
        if self.shuffle_buffer < 0:
            message = f"got {self.shuffle_buffer}; expected 0 (keeps the order) or more"
            problems.append(Problem("shuffle_buffer", message))
        if self.stream:
            problems += self._stream_problems()
        if problems:
            raise ConfigError(problems)

    def _stream_problems(self) -> list[Problem]:
        """Return the settings that need a prepared set."""
        default = DataConfig()
        needed = {
            "packing": "windows", "windows": "shifted", "max_tokens": "none; give max_documents",
            "mixture_temperature": "weights, as sizes are unknown", "max_epochs": "none",
        }  # fmt: skip
        problems = [
            Problem(name, f"got {value} with stream; expected {rule}; leave it out", ("stream",))
            for name, rule in needed.items()
            if (value := getattr(self, name)) != getattr(default, name)
        ]
        if self.holdout == "tail":
            message = "got 'tail' with stream, whose end is unknown; expected documents or official"
            problems.append(Problem("holdout", message, ("stream",)))
        if self.reads_tokens:
            message = f"got {self.path!r}, token ids, with stream; expected text; leave stream out"
            problems.append(Problem("stream", message, ("path",)))
        return problems

    def _mixture_problems(self) -> list[Problem]:
        """Return the errors in the mixture and in the settings that need one."""
        problems = []
        for name in ("mixture_temperature", "max_epochs"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                message = f"got {value}; expected a number above 0, or none"
                problems.append(Problem(name, message))
        if self.mixture is None:
            message = "got a value without a mixture; expected both; give mixture, or leave it out"
            for name in ("mixture_temperature", "max_epochs", "curriculum"):
                if getattr(self, name) is not None:
                    problems.append(Problem(name, message, ("mixture",)))
            return problems
        if self.mixture_temperature is not None and self.curriculum is not None:
            message = "got weights of steps with mixture_temperature; expected one of them"
            problems.append(Problem("curriculum", message, ("mixture_temperature",)))
        _, wrong = parse_mixture(self.mixture, weighted=self.mixture_temperature is None)
        problems += wrong
        if self.curriculum is not None:
            problems += parse_curriculum(self.curriculum)[1]
        settings = {
            name: "mixture" if step == 0 else "curriculum"
            for step, weights in reversed(self.weights_by_step.items())
            for name in weights
        }
        return problems + validate_names(settings, TOKEN_SUFFIXES)

    @property
    def stream_sample(self) -> "DataConfig":
        """The config of the prepared start of a stream: its tokenizer and validation split."""
        return replace(self, stream=False, max_tokens=STREAM_SAMPLE_TOKENS)

    @property
    def limits_documents(self) -> bool:
        """Whether `subset` or `max_documents` is set."""
        return self.subset < 1 or self.max_documents is not None

    @property
    def budget(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {"max_tokens": self.max_tokens, "max_documents": self.max_documents}
        found: dict[str, float] = {n: value for n, value in values.items() if value is not None}
        return found | ({"subset": self.subset} if self.subset < 1 else {})

    @property
    def weights(self) -> Weights:
        """Weight of each corpus and path at step 0; 0 for sources that a curriculum adds later."""
        by_step = self.weights_by_step
        return {name: by_step[0].get(name, 0.0) for each in by_step.values() for name in each}

    @property
    def weights_by_step(self) -> dict[int, Weights]:
        """Weights by the step from which they hold, in the order of the steps."""
        if self.mixture is None:
            return {0: {self.path or self.corpus: 1.0}}
        weights, _ = parse_mixture(self.mixture, weighted=self.mixture_temperature is None)
        if self.curriculum is None:
            return {0: weights}
        return {0: weights, **parse_curriculum(self.curriculum)[0]}

    @property
    def reads_tokens(self) -> bool:
        """Whether `path` names token ids: a .bin or .npy file, or a folder with train.bin."""
        if self.path is None or self.mixture is not None:
            return False
        path = Path(self.path).expanduser()
        if path.suffix.lower() in TOKEN_SUFFIXES:
            return True
        try:
            return any((path / f"train{suffix}").is_file() for suffix in TOKEN_SUFFIXES)
        except OSError:  # the name is too long, or not readable: opening it reports that
            return False

    def is_path(self, name: str) -> bool:
        """Return whether a name in `weights` is a path; else it is a corpus.

        Parameters
        ----------
        name : str
            A name in `weights`.

        Returns
        -------
        bool
            True for local files.
        """
        return not is_corpus(name) if self.mixture is not None else self.path is not None

    def holdout_of(self, name: str) -> Holdout:
        """Return the holdout of a corpus or path in `weights`, with ``auto`` resolved by its name.

        `open_sets` replaces "documents" by "tail" for a few files of which none would be held out.

        Parameters
        ----------
        name : str
            A name in `weights`.

        Returns
        -------
        Holdout
            "official", "documents" or "tail".
        """
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
            "bpe" if self.is_path(name) or not is_corpus(name) else find_corpus(name).tokenizer
            for name in self.weights
        }
        return kinds.pop() if len(kinds) == 1 else "bpe"
