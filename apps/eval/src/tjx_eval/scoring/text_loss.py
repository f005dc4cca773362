"""The loss on a text, as a whole and of each document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import tjx_data
from tjx_eval.commands.tables import Figure
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.encoding import Encoded, byte_lengths, encode, label
from tjx_eval.scoring.eval_data import Texts
from tjx_eval.scoring.score import ProgressCallback, Scores, nobody, score
from tjx_metrics import DocumentSums, Evaluation, perplexity
from tjx_trainer.config.run_config import reads_text

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Windows:
    """How texts are cut: the tokens of a window, and from one's begin to the next."""

    window: int
    stride: int


@dataclass(frozen=True)
class TextLoss:
    """What was measured on some texts.

    Attributes
    ----------
    documents : list of Encoded
        The texts.
    sums : DocumentSums
        Losses, tokens and bytes of each.
    scores : Scores
        The loss of each token, by stretch.
    numbers : list of int
        The number of each stretch's first document; its own, where each was scored by itself.
    has_bytes : bool
        Whether it is known how many bytes a token stands for.
    """

    documents: list[Encoded]
    sums: DocumentSums
    scores: Scores
    numbers: list[int]
    has_bytes: bool

    def figures(self) -> dict[str, Figure]:
        """Return the losses, accuracies and sizes of all texts together."""
        sums = self.sums.total()
        words = sum(document.words for document in self.documents)
        total = Evaluation(
            sums.loss_sum,
            sums.tokens,
            sums.text_bytes if self.has_bytes else 0,
            self.scores.correct,
        )
        return {
            **total.metrics(),
            "word_perplexity": perplexity(sums.loss_sum / max(words, 1)),
            "tokens": sums.tokens,
            **({"text_bytes": int(total.text_bytes or 0)} if self.has_bytes else {}),
            "words": words,
            "documents": len(self.documents),
            "tokens_per_sec": self.scores.tokens_per_sec,
        }

    def table(self) -> list[dict[str, Figure]]:
        """Return a row of figures for each document."""
        rows: list[dict[str, Figure]] = []
        for number, document in enumerate(self.documents):
            own = self.sums.evaluation(number)
            rows.append({
                "document": document.name,
                "begins": document.beginning,
                "tokens": own.tokens,
                "text_bytes": own.text_bytes or 0,
                **({} if own.tokens == 0 else _of_document(own)),
            })  # fmt: skip
        return rows


def _of_document(own: Evaluation) -> dict[str, float]:
    found = own.metrics()
    return {name: found[name] for name in ("loss", "perplexity", "bits_per_byte") if name in found}


def choose_windows(model: TrainedModel, window: int | None, stride: int | None) -> Windows:
    """Return how to cut texts: by default disjoint windows of the length of training.

    Raises
    ------
    RunError
        If the window is longer than the model's longest sequence, or the stride than the window.
    """
    longest = model.gpt.max_seq_len
    if window is None:
        trained = model.config is not None and reads_text(model.config)
        window = model.config.data.seq_len if model.config is not None and trained else longest
    stride = window if stride is None else stride
    if window > longest:
        raise EvalError(f"--window {window}: the model's longest sequence is {longest}: give less")
    if stride > window:
        raise EvalError(
            f"--stride {stride}: tokens between two windows of {window} would not be scored: "
            f"give at most {window}"
        )
    return Windows(window, stride)


def measure_text(
    model: TrainedModel,
    documents: Sequence[Encoded],
    windows: Windows,
    *,
    per_document: bool,
    batch_size: int | None = None,
    told: ProgressCallback = nobody,
) -> TextLoss:
    """Score some encoded documents.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    documents : sequence of Encoded
        From `encode` with the model's tokenizer.
    windows : Windows
        How they are cut.
    per_document : bool
        Whether each is scored by itself, as `label` says.
    batch_size : int, optional
        Rows at once; changes no result.
    told : callable
        Told how far it is.
    """
    tokenizer = model.tokenizer
    labelled = label(list(documents), tokenizer.eot_id, per_document=per_document)
    scores = score(
        model,
        labelled.stretches,
        window=windows.window,
        stride=windows.stride,
        batch_size=batch_size or DEFAULT_BATCH,
        told=told,
    )
    lengths = byte_lengths(tokenizer)
    sums = DocumentSums(len(documents))
    sums.add(
        np.concatenate(labelled.documents),
        np.concatenate(scores.losses),
        (np.zeros(tokenizer.vocab_size, np.int32) if lengths is None else lengths)[labelled.labels],
    )
    numbers = [int(owners[0]) for owners in labelled.documents]
    return TextLoss(list(documents), sums, scores, numbers, lengths is not None)


def encode_texts(
    texts: Texts, tokenizer: tjx_data.Tokenizer, max_tokens: int | None
) -> list[Encoded]:
    """Encode the documents of texts; see `encode`."""
    return encode(texts.documents, tokenizer, max_tokens)


def as_csv(rows: Sequence[Mapping[str, Figure]]) -> str:
    """Write a table of documents as CSV."""
    import csv
    import io

    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
