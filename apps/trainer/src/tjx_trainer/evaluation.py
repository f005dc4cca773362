"""Evaluation: exact sums over held-out text, whatever the batch size."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tjx_metrics
import tjx_nn
import tjx_optim
from tjx_nn.layout import ONE_DEVICE, Layout
from tjx_trainer.config import ModelConfig
from tjx_trainer.gradients import IGNORED, Batch


class EvaluationLeftError(Exception):
    """An evaluation was left before its end: nothing is known of it."""


Sums = dict[str, jax.Array]
EvalStep = Callable[[dict[str, Any], Batch], Sums]


@dataclass(frozen=True)
class Evaluation:
    """What was counted over an evaluation set.

    Attributes
    ----------
    loss_sum : float
        Sum of the losses of all targets, nats.
    tokens : int
        Number of targets.
    text_bytes : int or None
        Bytes of UTF-8 text that the targets stand for; None where they are no text.
    correct : dict
        k -> number of targets among the model's k likeliest answers.
    exact_rows, rows : int
        Rows of which every target was the likeliest answer, and rows with a target; 0 where
        accuracies were not asked for, or a row has one target.
    """

    loss_sum: float
    tokens: int
    text_bytes: int | None
    correct: Mapping[int, int] = field(default_factory=dict)
    exact_rows: int = 0
    rows: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the loss, of text perplexity and bits per byte and token, and accuracies."""
        loss = self.loss_sum / self.tokens
        found = {"loss": loss}
        if self.text_bytes is not None:
            found |= {
                "perplexity": tjx_metrics.perplexity(loss),
                "bits_per_byte": tjx_metrics.bits_per_byte(self.loss_sum, self.text_bytes),
                "bits_per_token": tjx_metrics.bits_per_token(loss),
            }
        for k, count in self.correct.items():
            found[f"top{k}_accuracy"] = count / self.tokens
        if self.rows:
            found["exact_match"] = self.exact_rows / self.rows
        return found


def make_eval_step(
    model: ModelConfig,
    *,
    ks: tuple[int, ...] = (),
    token_byte_lengths: np.ndarray | None = None,
    layout: Layout = ONE_DEVICE,
    through_stages: Callable[[Any, Batch], tjx_optim.AccumulatedGradients] | None = None,
) -> EvalStep:
    """Return the jitted sums of a batch; accuracies (`ks`) need the logits, the loss does not.

    Fed with the right answers so far, a decoder that gives each next one would have written all of
    them by itself: rows that are exact here are those of greedy generation.

    Everything is counted on the devices, as no process has all rows of a batch.

    Parameters
    ----------
    model : ModelConfig
        The model.
    ks : tuple of int
        Count how often the right answer is among so many likeliest.
    token_byte_lengths : int32 [vocab_size] or None
        Bytes of text that each token stands for; None where labels are no text.
    layout : Layout
        How the model lies on the mesh.
    through_stages : callable, optional
        The means of a batch as a pipeline computes them, of which only the loss is looked at: no
        stage then needs the layers of others. Accuracies do.

    Returns
    -------
    callable
        From (params, batch) to scalars, and "correct" [len(ks)].
    """

    def eval_step(params: dict[str, Any], batch: Batch) -> Sums:
        network: Any = tjx_nn.bind(model, params, layout=layout)
        labels = batch["labels"]
        counts = labels != IGNORED
        if through_stages is None:
            loss_sum = network.losses(**batch).tokens.sum()
        else:
            loss_sum = through_stages(params, batch).means["loss"] * counts.sum()
        sums = {"loss_sum": loss_sum, "tokens": counts.sum()}
        if token_byte_lengths is not None:
            lengths = jnp.asarray(token_byte_lengths)[jnp.where(counts, labels, 0)]
            sums["text_bytes"] = jnp.where(counts, lengths, 0).sum()
        if ks:
            inputs = dict(batch)
            del inputs["labels"]
            logits = network(**inputs)
            sums["correct"] = tjx_metrics.top_k_correct(logits, labels, ks, IGNORED)
            if labels.ndim > 1:
                missed = counts & (logits.argmax(-1) != labels)
                sums["rows"] = counts.any(-1).sum()
                sums["exact_rows"] = (counts.any(-1) & ~missed.any(-1)).sum()
        return sums

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep,
    params: dict[str, Any],
    batches: Iterable[Batch],
    *,
    ks: tuple[int, ...] = (),
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sum over all batches.

    Parameters
    ----------
    eval_step : callable
        From `make_eval_step`.
    params : nested dict of arrays
        The model's parameters.
    batches : iterable of Batch
        Each target once; padding has the label -100.
    ks : tuple of int
        As `make_eval_step` was given.
    before_batch : callable
        Called before each batch; raises `EvaluationLeftError` to leave.

    Returns
    -------
    Evaluation
        The sums, in float64 over batches.
    """
    sums: list[dict[str, np.ndarray]] = []
    pending: Sums | None = None
    # Read a batch late: the device does not wait for the host, and the host does not run ahead, so
    # that whoever asks to stop is heard and a device that hangs is noticed.
    for batch in batches:
        before_batch()
        begun = eval_step(params, batch)
        if pending is not None:
            sums.append(jax.device_get(pending))
        pending = begun
    if pending is not None:
        sums.append(jax.device_get(pending))

    def total(name: str) -> int:
        return sum(int(each.get(name, 0)) for each in sums)

    return Evaluation(
        loss_sum=math.fsum(float(each["loss_sum"]) for each in sums),
        tokens=total("tokens"),
        text_bytes=total("text_bytes") if sums and "text_bytes" in sums[0] else None,
        correct={k: sum(int(each["correct"][i]) for each in sums) for i, k in enumerate(ks)},
        exact_rows=total("exact_rows"),
        rows=total("rows"),
    )
