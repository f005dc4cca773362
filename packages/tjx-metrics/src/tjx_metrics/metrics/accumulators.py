"""Accumulate evaluation sums on the device and compute float64 metrics on the host.

The loss of a corpus is the sum over all labels divided by the number of labels. Batches therefore
add sums and counts, and padding counts as nothing. The result is independent of how the corpus is
split into batches, rows or processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tjx_metrics.metrics.compensated_sum import FloatSum, IntSum
from tjx_metrics.metrics.cross_entropy import IGNORE_INDEX
from tjx_metrics.metrics.perplexity import bits_per_byte, bits_per_token, perplexity
from tjx_metrics.metrics.registration import registered_metrics
from tjx_metrics.metrics.top_k import top_k_correct


class EvaluationSums(NamedTuple):
    """Evaluation sums over batches: a pytree carried from one jitted call to the next.

    The pytree structure determines which sums exist, so a jitted step compiles once. On a mesh,
    each sum is global and replicated on every device.

    Attributes
    ----------
    losses : FloatSum
        Sum of the losses of all counted labels, nats.
    labels : IntSum
        Number of counted labels.
    correct : dict
        k -> `IntSum` of labels among the k highest logits.
    text_bytes : IntSum or None
        UTF-8 bytes of the text that the labels encode.
    rows, exact_rows : IntSum
        Rows with at least one label, and rows whose every label has the highest logit. Counted only
        if `correct` is not empty and labels have a row axis.
    registered : dict
        Name -> `FloatSum` of the values of a registered metric.

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
    >>> metrics = sums.on_host().metrics()
    >>> round(metrics["loss"], 4), metrics["top1_accuracy"], metrics["exact_match"]
    (0.9242, 0.6666666666666666, 0.5)
    """

    losses: FloatSum
    labels: IntSum
    correct: dict[int, IntSum]
    text_bytes: IntSum | None
    rows: IntSum
    exact_rows: IntSum
    registered: dict[str, FloatSum]

    @staticmethod
    def zero(
        *, ks: tuple[int, ...] = (), of_text: bool = False, metrics: tuple[str, ...] = ()
    ) -> "EvaluationSums":
        """Return zero sums. Call it under ``jax.jit`` if a transfer guard is active.

        Parameters
        ----------
        ks : tuple of int
            Values of k for which top-k accuracy is counted.
        of_text : bool
            Whether to count bytes of text.
        metrics : tuple of str
            Names given to `register_metric`.

        Returns
        -------
        EvaluationSums
            Sums on the device.
        """
        return EvaluationSums(
            losses=FloatSum.zero(),
            labels=IntSum.zero(),
            correct={k: IntSum.zero() for k in ks},
            text_bytes=IntSum.zero() if of_text else None,
            rows=IntSum.zero(),
            exact_rows=IntSum.zero(),
            registered={name: FloatSum.zero() for name in metrics},
        )

    def plus(
        self,
        losses: jax.Array,
        labels: jax.Array,
        *,
        logits: jax.Array | None = None,
        token_byte_lengths: jax.Array | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> "EvaluationSums":
        """Add one batch.

        Parameters
        ----------
        losses : float32 array of any shape
            Loss of each label in nats (0 at ignored labels), or partial sums of these losses.
        labels : int array [...] or [rows, labels]
            Targets; positions equal to `ignore_index` are not counted.
        logits : float array [..., vocab], optional
            Required if `correct` or `registered` is not empty.
        token_byte_lengths : int array [vocab], optional
            Bytes of each token; required if `text_bytes` is counted. One batch must hold fewer
            than 2**31 bytes.
        ignore_index : int
            Label of positions that are not counted.

        Returns
        -------
        EvaluationSums
            The sums including the batch.

        Raises
        ------
        ValueError
            If `logits` or `token_byte_lengths` is required and missing, or a registered metric
            returns another shape than that of the labels.
        """
        if self.correct and logits is None:
            raise ValueError(
                f"logits: got None; expected logits for accuracies with k of {sorted(self.correct)}"
            )
        if self.registered and logits is None:
            raise ValueError(f"logits: got None; expected logits for {', '.join(self.registered)}")
        if self.text_bytes is not None and token_byte_lengths is None:
            raise ValueError(
                "token_byte_lengths: got None; expected the bytes of each token, for text_bytes"
            )
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
            counts = top_k_correct(logits, labels, ks, ignore_index)
            new = new._replace(
                correct={k: self.correct[k].plus(counts[i]) for i, k in enumerate(ks)}
            )
            if labels.ndim > 1:
                missed = counted & (logits.argmax(-1) != labels)
                has_label = counted.any(-1)
                new = new._replace(
                    rows=self.rows.plus(has_label.sum()),
                    exact_rows=self.exact_rows.plus((has_label & ~missed.any(-1)).sum()),
                )
        for name, total in self.registered.items():
            values = registered_metrics[name](logits, labels)
            if values.shape != labels.shape:
                raise ValueError(
                    f"{name}: got values of shape {values.shape}; expected {labels.shape}, one for "
                    "each label; change the function given to register_metric"
                )
            added = total.plus(jnp.where(counted, values, 0))
            new = new._replace(registered={**new.registered, name: added})
        return new

    def on_host(self) -> "Evaluation":
        """Transfer the sums to the host. Blocks until the device has computed them."""
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
            registered={name: total.on_host() for name, total in sums.registered.items()},
        )


@dataclass(frozen=True)
class Evaluation:
    """Evaluation sums on the host.

    Attributes
    ----------
    loss_sum : float
        Sum of the losses of all labels, nats.
    tokens : int
        Number of labels.
    text_bytes : int or None
        UTF-8 bytes of the text that the labels encode; None if labels are not text.
    correct : dict
        k -> number of labels among the k highest logits.
    exact_rows, rows : int
        Rows whose every label has the highest logit, and rows with at least one label; 0 if
        accuracies were not counted or labels have no row axis.
    registered : dict
        Name -> sum of the values of a registered metric.
    """

    loss_sum: float
    tokens: int
    text_bytes: int | None
    correct: Mapping[int, int] = field(default_factory=dict)
    exact_rows: int = 0
    rows: int = 0
    registered: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Compute mean loss, perplexity, bits per token and byte, and accuracies.

        Returns
        -------
        dict
            "loss" [nats per label]; for text also "perplexity", "bits_per_token" and, if
            `text_bytes` is positive, "bits_per_byte"; "top{k}_accuracy" [fraction of labels];
            "exact_match" [fraction of rows]; the mean of each registered metric by its name.

        Raises
        ------
        ValueError
            If there are no labels.
        """
        if self.tokens == 0:
            raise ValueError("labels: got none to evaluate; expected at least one; give other data")
        loss = self.loss_sum / self.tokens
        metrics = {"loss": loss}
        if self.text_bytes is not None:
            metrics |= {"perplexity": perplexity(loss), "bits_per_token": bits_per_token(loss)}
            if self.text_bytes:
                metrics["bits_per_byte"] = bits_per_byte(self.loss_sum, self.text_bytes)
        for k, count in self.correct.items():
            metrics[f"top{k}_accuracy"] = count / self.tokens
        if self.rows:
            metrics["exact_match"] = self.exact_rows / self.rows
        return metrics | {name: total / self.tokens for name, total in self.registered.items()}
