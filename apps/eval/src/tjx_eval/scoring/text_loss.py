"""Loss of a text, in total and per document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.encoding import EncodedDocument, byte_lengths, make_sequences
from tjx_eval.scoring.score import (
    Metric,
    ProgressCallback,
    TokenLosses,
    no_progress,
    score_tokens,
)
from tjx_metrics import DocumentSums, Evaluation, perplexity
from tjx_trainer.run_reader import reads_text

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class WindowConfig:
    """Length of the sliding windows, and distance of their starts, in tokens."""

    length: int
    stride: int


@dataclass(frozen=True)
class TextLoss:
    """Losses of documents.

    Attributes
    ----------
    documents : list of EncodedDocument
        The documents.
    sums : DocumentSums
        Losses, tokens and bytes of each document.
    tokens : TokenLosses
        Loss of each token, by sequence.
    first_documents : list of int
        Number of the first document of each sequence.
    has_bytes : bool
        Whether the number of bytes of each token is known.
    """

    documents: list[EncodedDocument]
    sums: DocumentSums
    tokens: TokenLosses
    first_documents: list[int]
    has_bytes: bool

    def metrics(self) -> dict[str, Metric]:
        """Return losses, accuracies and sizes over all documents."""
        sums = self.sums.total()
        words = sum(document.n_words for document in self.documents)
        total = Evaluation(
            sums.loss_sum,
            sums.tokens,
            sums.text_bytes if self.has_bytes else 0,
            self.tokens.correct,
        )
        return {
            **total.metrics(),
            "word_perplexity": perplexity(sums.loss_sum / max(words, 1)),
            "tokens": sums.tokens,
            **({"text_bytes": int(total.text_bytes or 0)} if self.has_bytes else {}),
            "words": words,
            "documents": len(self.documents),
            "tokens_per_sec": self.tokens.tokens_per_sec,
        }

    def table(self) -> list[dict[str, Metric]]:
        """Return one row of metrics per document."""
        rows: list[dict[str, Metric]] = []
        for number, each in enumerate(self.documents):
            evaluation = self.sums.evaluation(number)
            metrics = evaluation.metrics() if evaluation.tokens else {}
            columns = ("loss", "perplexity", "bits_per_byte")
            rows.append({
                "document": each.document.name,
                "begins": each.document.preview,
                "tokens": evaluation.tokens,
                "text_bytes": evaluation.text_bytes or 0,
                **{name: metrics[name] for name in columns if name in metrics},
            })  # fmt: skip
        return rows


def make_window_config(model: TrainedModel, window: int | None, stride: int | None) -> WindowConfig:
    """Return the windows for a model: by default disjoint, of the sequence length in training.

    Raises
    ------
    EvalError
        If the window exceeds `max_seq_len`, or the stride exceeds the window.
    """
    longest = model.gpt.max_seq_len
    if window is None:
        trained = model.config is not None and reads_text(model.config)
        window = model.config.data.seq_len if model.config is not None and trained else longest
    stride = window if stride is None else stride
    if window > longest:
        raise EvalError(f"--window: got {window}; expected at most max_seq_len, {longest}")
    if stride > window:
        raise EvalError(
            f"--stride: got {stride}; expected at most the window, {window}: tokens between two "
            "windows would not be scored"
        )
    return WindowConfig(window, stride)


def measure_text_loss(
    model: TrainedModel,
    documents: Sequence[EncodedDocument],
    windows: WindowConfig,
    *,
    per_document: bool,
    batch_size: int | None = None,
    on_progress: ProgressCallback = no_progress,
) -> TextLoss:
    """Score encoded documents.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    documents : sequence of EncodedDocument
        Encoded with the model's tokenizer.
    windows : WindowConfig
        Sliding windows.
    per_document : bool
        Whether each document is scored separately; see `make_sequences`.
    batch_size : int, optional
        Windows per batch; does not change results.
    on_progress : callable
        Called after each batch.
    """
    tokenizer = model.tokenizer
    scored = make_sequences(list(documents), tokenizer.eot_id, per_document=per_document)
    tokens = score_tokens(
        model,
        scored.sequences,
        window=windows.length,
        stride=windows.stride,
        batch_size=batch_size or DEFAULT_BATCH,
        on_progress=on_progress,
    )
    lengths = byte_lengths(tokenizer)
    sums = DocumentSums(len(documents))
    sums.add(
        np.concatenate(scored.documents),
        np.concatenate(tokens.losses),
        (np.zeros(tokenizer.vocab_size, np.int32) if lengths is None else lengths)[scored.labels],
    )
    first_documents = [int(owners[0]) for owners in scored.documents]
    return TextLoss(list(documents), sums, tokens, first_documents, lengths is not None)
