"""Compare the losses of two models on the same documents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.scoring.bootstrap import Estimate, estimate_mean
from tjx_eval.scoring.text_loss import TextLoss
from tjx_metrics import bits_per_byte

_CONTEXT = 12  # tokens of context in the token table
_BLOCK = 128  # tokens per bootstrap block, if there is only one document


@dataclass(frozen=True)
class Comparison:
    """Losses of two models on the same documents.

    Attributes
    ----------
    a, b : TextLoss
        Losses of each model.
    unit : str
        Unit of losses: "nats per token" if both use the same tokenizer, else "bits per byte".
    sizes : int64 [documents]
        Tokens or bytes of each document.
    losses_a, losses_b : float64 [documents]
        Sum of losses of each document, nats or bits.
    difference : Estimate or None
        Difference of the mean losses, B - A; None if there is too little text.
    over : str
        Units that the error is computed over: documents, or blocks of a single document.
    """

    a: TextLoss
    b: TextLoss
    unit: str
    sizes: NDArray[np.int64]
    losses_a: NDArray[np.float64]
    losses_b: NDArray[np.float64]
    difference: Estimate | None
    over: str

    @property
    def same_tokens(self) -> bool:
        """Whether both models use the same tokenizer."""
        return self.unit == "nats per token"

    def documents(self) -> list[dict[str, Any]]:
        """Return one row per document, sorted by the absolute difference of mean losses."""
        sizes = np.maximum(self.sizes, 1)
        means_a, means_b = self.losses_a / sizes, self.losses_b / sizes
        order = np.argsort(-np.abs(means_b - means_a), kind="stable")
        return [
            {
                "document": self.a.documents[i].document.name,
                "begins": self.a.documents[i].document.preview,
                "size": int(self.sizes[i]),
                "a": float(means_a[i]),
                "b": float(means_b[i]),
                "difference": float(means_b[i] - means_a[i]),
            }
            for i in order.tolist()
            if self.sizes[i]
        ]

    def tokens(self, tokenizer: tjx_data.Tokenizer, count: int = 20) -> list[dict[str, Any]]:
        """Return the tokens with the largest differences, each with its context."""
        found: list[tuple[float, int, int]] = []
        pairs = zip(self.a.tokens.losses, self.b.tokens.losses, strict=True)
        for sequence, (a, b) in enumerate(pairs):
            differences = np.abs(b - a)
            for index in np.argsort(-differences, kind="stable")[:count].tolist():
                found.append((float(differences[index]), sequence, index))
        found.sort(key=lambda each: (-each[0], each[1:]))
        return [self._token(tokenizer, sequence, index) for _, sequence, index in found[:count]]

    def _token(self, tokenizer: tjx_data.Tokenizer, sequence: int, index: int) -> dict[str, Any]:
        encoded = self.a.documents[self.a.first_documents[sequence]]
        a, b = (float(each.tokens.losses[sequence][index]) for each in (self.a, self.b))
        # Without an end-of-text token, the first token of a document is not scored.
        index += len(encoded.tokens) - len(self.a.tokens.losses[sequence])
        return {
            "document": encoded.document.name,
            "context": tokenizer.decode(encoded.tokens[max(index - _CONTEXT, 0) : index]),
            "token": tokenizer.decode(encoded.tokens[index : index + 1]),
            "a": a,
            "b": b,
            "difference": b - a,
        }


def compare(a: TextLoss, b: TextLoss, *, same_tokenizer: bool) -> Comparison:
    """Compare the losses of two models on the same documents.

    Raises
    ------
    EvalError
        If the tokenizers differ and bytes per token are unknown, or the models scored different
        bytes.
    """
    if same_tokenizer:
        unit, sizes = "nats per token", a.sums.tokens
        losses_a, losses_b = a.sums.loss_sums, b.sums.loss_sums
    else:
        if not (a.has_bytes and b.has_bytes):
            raise EvalError(
                "the models have different tokenizers, and tokens of one have no fixed number of "
                "bytes: losses per byte, which would be comparable, are unknown"
            )
        if (a.sums.text_bytes != b.sums.text_bytes).any():
            raise EvalError(
                "the models have different tokenizers, and only one has an end-of-text token that "
                "a text's first token is predicted from: they did not score the same bytes"
            )
        unit, sizes = "bits per byte", a.sums.text_bytes
        losses_a, losses_b = (each.sums.loss_sums / np.log(2) for each in (a, b))
    over, differences, weights = "documents", losses_b - losses_a, sizes
    if len(sizes) == 1 and same_tokenizer:
        over, differences, weights = _blocks(a, b)
    return Comparison(
        a, b, unit, sizes, losses_a, losses_b, estimate_mean(differences, weights), over
    )


def _blocks(a: TextLoss, b: TextLoss) -> tuple[str, NDArray[np.float64], NDArray[np.int64]]:
    """Split a single document into blocks; return their differences and sizes."""
    differences = b.tokens.losses[0].astype(np.float64) - a.tokens.losses[0]
    starts = np.arange(0, len(differences), _BLOCK)
    sizes = np.diff(np.append(starts, len(differences))).astype(np.int64)
    return f"blocks of {_BLOCK} tokens", np.add.reduceat(differences, starts), sizes


def mean_losses(losses: TextLoss) -> dict[str, float]:
    """Return the loss over all documents in nats per token and, if known, bits per byte."""
    sums = losses.sums.total()
    means = {"loss": sums.loss_sum / sums.tokens}
    if losses.has_bytes:
        means["bits_per_byte"] = bits_per_byte(sums.loss_sum, sums.text_bytes or 0)
    return means
