"""How well a model predicts: counted on the device batch by batch, told by the host in float64.

A corpus has one loss: the sum over all labels by the number of labels. So batches add sums and
counts, ragged ones with padding that counts nowhere, and nothing depends on how the corpus was cut
into batches, rows or processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tjx_metrics.metrics.compensated_sum import FloatSum, IntSum
from tjx_metrics.metrics.perplexity import bits_per_byte, bits_per_token, perplexity
from tjx_metrics.metrics.top_k import top_k_correct


class EvaluationSums(NamedTuple):
    """Sums over batches, on the device: a pytree to be carried from one jitted call to the next.

    Which sums there are is part of its structure, so that a jitted step compiles once. On a mesh
    they are sums over all devices of all processes, and lie on every one.

    Attributes
    ----------
    losses : FloatSum
        Of the losses of all labels, nats.
    labels : IntSum
        Labels that count.
    correct : dict
        k -> `IntSum` of the labels that were among the k highest logits.
    text_bytes : IntSum or None
        Bytes of the text that the labels stand for.
    rows, exact_rows : IntSum
        Rows with a label, and rows of which every label had the highest logit; where `correct` is
        not empty and labels have rows.

    Examples
    --------
    >>> import jax, numpy as np
    >>> from tjx_metrics import cross_entropy
    >>> @jax.jit
    ... def eval_step(sums, logits, labels):
    ...     return sums.plus(cross_entropy(logits, labels), labels, logits=logits)
    >>> logits = np.log([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]).astype(np.float32)
    >>> sums = jax.jit(lambda: EvaluationSums.zero(ks=(1, 2)))()
    >>> for labels in ([[0, 1]], [[2, -100]]):
    ...     sums = eval_step(sums, *jax.device_put((logits, np.array(labels))))
    >>> found = sums.on_host().metrics()
    >>> round(found["loss"], 4), found["top1_accuracy"], found["exact_match"]
    (0.9242, 0.6666666666666666, 0.5)
    """

    losses: FloatSum
    labels: IntSum
    correct: dict[int, IntSum]
    text_bytes: IntSum | None
    rows: IntSum
    exact_rows: IntSum

    @staticmethod
    def zero(*, ks: tuple[int, ...] = (), of_text: bool = False) -> "EvaluationSums":
        """Return the sums of nothing; under ``jax.jit`` where transfers are guarded.

        Parameters
        ----------
        ks : tuple of int
            Count the labels among so many highest logits.
        of_text : bool
            Whether bytes of text are counted.
        """
        return EvaluationSums(
            losses=FloatSum.zero(),
            labels=IntSum.zero(),
            correct={k: IntSum.zero() for k in ks},
            text_bytes=IntSum.zero() if of_text else None,
            rows=IntSum.zero(),
            exact_rows=IntSum.zero(),
        )

    def plus(
        self,
        losses: jax.Array,
        labels: jax.Array,
        *,
        logits: jax.Array | None = None,
        token_byte_lengths: jax.Array | None = None,
        ignore_index: int = -100,
    ) -> "EvaluationSums":
        """Add a batch.

        Parameters
        ----------
        losses : float32 array of any shape
            Loss of each label in nats, 0 where it does not count, or sums of them.
        labels : int array [...] or [rows, labels]
            The right answers; `ignore_index` counts nowhere.
        logits : float array [..., vocab], optional
            Scores; needed where `correct` is not empty.
        token_byte_lengths : int array [vocab], optional
            Bytes of each token; needed where `text_bytes` is counted. A batch stands for less than
            2**31 of them.
        ignore_index : int
            Label of a position that counts nowhere.

        Returns
        -------
        EvaluationSums
            The sums with the batch.

        Raises
        ------
        ValueError
            If what is to be counted was not given.
        """
        if self.correct and logits is None:
            raise ValueError(f"logits=None: accuracies for k of {sorted(self.correct)} need them")
        if self.text_bytes is not None and token_byte_lengths is None:
            raise ValueError("token_byte_lengths=None: bytes of text are to be counted")
        counted = labels != ignore_index
        new = self._replace(losses=self.losses.plus(losses), labels=self.labels.plus(counted.sum()))
        if self.text_bytes is not None:
            assert token_byte_lengths is not None
            lengths = token_byte_lengths[jnp.where(counted, labels, 0)]
            new = new._replace(
                text_bytes=self.text_bytes.plus(jnp.where(counted, lengths, 0).sum())
            )
        if self.correct:
            assert logits is not None
            ks = tuple(self.correct)
            found = top_k_correct(logits, labels, ks, ignore_index)
            new = new._replace(
                correct={k: self.correct[k].plus(found[i]) for i, k in enumerate(ks)}
            )
            if labels.ndim > 1:
                missed = counted & (logits.argmax(-1) != labels)
                has_label = counted.any(-1)
                new = new._replace(
                    rows=self.rows.plus(has_label.sum()),
                    exact_rows=self.exact_rows.plus((has_label & ~missed.any(-1)).sum()),
                )
        return new

    def on_host(self) -> "Evaluation":
        """Read the sums; waits for the device."""
        sums = jax.device_get(self)
        (labels,), (rows,), (exact_rows,) = (
            each.on_host() for each in (sums.labels, sums.rows, sums.exact_rows)
        )
        return Evaluation(
            loss_sum=sums.losses.on_host(),
            tokens=labels,
            text_bytes=None if sums.text_bytes is None else sums.text_bytes.on_host()[0],
            correct={k: count.on_host()[0] for k, count in sorted(sums.correct.items())},
            exact_rows=exact_rows,
            rows=rows,
        )


@dataclass(frozen=True)
class Evaluation:
    """What was counted over an evaluation set.

    Attributes
    ----------
    loss_sum : float
        Sum of the losses of all labels, nats.
    tokens : int
        Number of labels.
    text_bytes : int or None
        Bytes of UTF-8 text that the labels stand for; None where they are no text.
    correct : dict
        k -> number of labels among the model's k likeliest answers.
    exact_rows, rows : int
        Rows of which every label was the likeliest answer, and rows with a label; 0 where
        accuracies were not asked for, or a row has one label.
    """

    loss_sum: float
    tokens: int
    text_bytes: int | None
    correct: Mapping[int, int] = field(default_factory=dict)
    exact_rows: int = 0
    rows: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the loss, of text perplexity and bits per byte and token, and accuracies.

        Returns
        -------
        dict
            "loss" [nats a label]; of text "perplexity", "bits_per_token" and, where the labels
            have bytes, "bits_per_byte"; "top1_accuracy" and the like [share of labels];
            "exact_match" [share of rows].

        Raises
        ------
        ValueError
            If there was no label.
        """
        if self.tokens == 0:
            raise ValueError("tokens=0: there was no label to evaluate; give data that has some")
        loss = self.loss_sum / self.tokens
        found = {"loss": loss}
        if self.text_bytes is not None:
            found |= {"perplexity": perplexity(loss), "bits_per_token": bits_per_token(loss)}
            if self.text_bytes:
                found["bits_per_byte"] = bits_per_byte(self.loss_sum, self.text_bytes)
        for k, count in self.correct.items():
            found[f"top{k}_accuracy"] = count / self.tokens
        if self.rows:
            found["exact_match"] = self.exact_rows / self.rows
        return found
