"""Two models on the same documents: where they differ, and by how much."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.scoring.bootstrap import Difference, paired_difference
from tjx_eval.scoring.text_loss import TextLoss
from tjx_metrics import bits_per_byte

_CONTEXT = 12  # tokens shown before one that models differ on
_BLOCK = 128  # tokens of a block, where there is one document


@dataclass(frozen=True)
class Comparison:
    """What two models made of the same documents.

    Attributes
    ----------
    a, b : TextLoss
        Of each.
    unit : str
        Of losses: "nats a token" where both have one tokenizer, else "bits a byte".
    sizes : int64 [documents]
        Tokens or bytes of each document.
    losses_a, losses_b : float64 [documents]
        Sum of losses of each, nats or bits.
    difference : Difference or None
        Of the mean losses; None where there is too little text to tell.
    over : str
        What the difference's error is taken over: documents, or blocks of a single one.
    """

    a: TextLoss
    b: TextLoss
    unit: str
    sizes: NDArray[np.int64]
    losses_a: NDArray[np.float64]
    losses_b: NDArray[np.float64]
    difference: Difference | None
    over: str

    @property
    def same_tokens(self) -> bool:
        """Whether both models have one tokenizer."""
        return self.unit == "nats a token"

    def documents(self) -> list[dict[str, Any]]:
        """Return a row for each document, where they differ most first."""
        sizes = np.maximum(self.sizes, 1)
        means_a, means_b = self.losses_a / sizes, self.losses_b / sizes
        order = np.argsort(-np.abs(means_b - means_a), kind="stable")
        return [
            {
                "document": self.a.documents[i].name,
                "begins": self.a.documents[i].beginning,
                "size": int(self.sizes[i]),
                "a": float(means_a[i]),
                "b": float(means_b[i]),
                "difference": float(means_b[i] - means_a[i]),
            }
            for i in order.tolist()
            if self.sizes[i]
        ]

    def tokens(self, tokenizer: tjx_data.Tokenizer, count: int = 20) -> list[dict[str, Any]]:
        """Return the tokens that the models differ most on, with what stands before each."""
        found: list[tuple[float, int, int]] = []
        pairs = zip(self.a.scores.losses, self.b.scores.losses, strict=True)
        for number, (a, b) in enumerate(pairs):
            apart = np.abs(b - a)
            for place in np.argsort(-apart, kind="stable")[:count].tolist():
                found.append((float(apart[place]), number, place))
        found.sort(key=lambda each: (-each[0], each[1:]))
        return [self._token(tokenizer, number, place) for _, number, place in found[:count]]

    def _token(self, tokenizer: tjx_data.Tokenizer, number: int, place: int) -> dict[str, Any]:
        document = self.a.documents[self.a.numbers[number]]
        a, b = (float(each.scores.losses[number][place]) for each in (self.a, self.b))
        # Without an end-of-text token before it, a document's first token is not scored.
        place += len(document.tokens) - len(self.a.scores.losses[number])
        before = document.tokens[max(place - _CONTEXT, 0) : place]
        return {
            "document": document.name,
            "context": tokenizer.decode(before),
            "token": tokenizer.decode(document.tokens[place : place + 1]),
            "a": a,
            "b": b,
            "difference": b - a,
        }


def compare(a: TextLoss, b: TextLoss, *, same_tokenizer: bool) -> Comparison:
    """Put two measurements of the same documents side by side.

    Raises
    ------
    RunError
        If the tokenizers differ, and it is not known how many bytes a token of one stands for; or
        differ in what they leave unscored.
    """
    if same_tokenizer:
        unit, sizes = "nats a token", a.sums.tokens
        losses_a, losses_b = a.sums.loss_sums, b.sums.loss_sums
    else:
        if not (a.has_bytes and b.has_bytes):
            raise EvalError(
                "the models have different tokenizers, and tokens of one stand for no fixed number "
                "of bytes: losses a byte, which could be compared, are not known"
            )
        if (a.sums.text_bytes != b.sums.text_bytes).any():
            raise EvalError(
                "the models have different tokenizers, and only one has an end-of-text token that "
                "a text's first token is predicted from: they did not score the same bytes"
            )
        unit, sizes = "bits a byte", a.sums.text_bytes
        losses_a, losses_b = (each.sums.loss_sums / np.log(2) for each in (a, b))
    over, differences, weights = "documents", losses_b - losses_a, sizes
    if len(sizes) == 1 and same_tokenizer:
        over, differences, weights = _blocks(a, b)
    return Comparison(
        a, b, unit, sizes, losses_a, losses_b, paired_difference(differences, weights), over
    )


def _blocks(a: TextLoss, b: TextLoss) -> tuple[str, NDArray[np.float64], NDArray[np.int64]]:
    """Return the differences of stretches of a single document, and their sizes."""
    apart = b.scores.losses[0].astype(np.float64) - a.scores.losses[0]
    starts = np.arange(0, len(apart), _BLOCK)
    sizes = np.diff(np.append(starts, len(apart))).astype(np.int64)
    return f"blocks of {_BLOCK} tokens", np.add.reduceat(apart, starts), sizes


def totals(found: TextLoss) -> dict[str, float]:
    """Return a model's loss on all documents, in nats a token and bits a byte."""
    sums = found.sums.total()
    figures = {"loss": sums.loss_sum / sums.tokens}
    if found.has_bytes:
        figures["bits_per_byte"] = bits_per_byte(sums.loss_sum, sums.text_bytes or 0)
    return figures
