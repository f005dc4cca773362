"""Evaluation: exact sums over held-out text, whatever the batch size."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import tjx_data
import tjx_metrics
import tjx_nn
from tjx_nn.config import GPTConfig
from tjx_trainer.step import IGNORED, Batch, Constrain

Sums = dict[str, jax.Array]
EvalStep = Callable[[dict[str, Any], Batch], Sums]


@dataclass(frozen=True)
class Evaluation:
    """What was counted over an evaluation set.

    Attributes
    ----------
    loss_sum : float
        Sum of the losses of all target tokens, nats.
    tokens : int
        Number of target tokens.
    text_bytes : int
        Bytes of UTF-8 text that the target tokens stand for.
    correct : dict
        k -> number of targets among the model's k likeliest tokens.
    """

    loss_sum: float
    tokens: int
    text_bytes: int
    correct: Mapping[int, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return loss, perplexity, bits per byte and token, and accuracies by name."""
        loss = self.loss_sum / self.tokens
        found = {
            "loss": loss,
            "perplexity": tjx_metrics.perplexity(loss),
            "bits_per_byte": tjx_metrics.bits_per_byte(self.loss_sum, self.text_bytes),
            "bits_per_token": tjx_metrics.bits_per_token(loss),
        }
        for k, count in self.correct.items():
            found[f"top{k}_accuracy"] = count / self.tokens
        return found


def make_eval_step(
    model: GPTConfig, *, ks: tuple[int, ...] = (), constrain: Constrain | None = None
) -> EvalStep:
    """Return the jitted sums of a batch; accuracies (`ks`) need the logits, the loss does not."""

    def eval_step(params: dict[str, Any], batch: Batch) -> Sums:
        gpt = tjx_nn.bind(model, params, constrain=constrain)
        tokens, labels = batch["tokens"], batch["labels"]
        sums = {"loss_sum": gpt.token_losses(tokens, labels).sum()}
        if ks:
            sums["correct"] = tjx_metrics.top_k_correct(gpt(tokens), labels, ks, IGNORED)
        return sums

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep,
    params: dict[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    put: Callable[[Mapping[str, np.ndarray]], Batch],
    token_byte_lengths: np.ndarray,
    ks: tuple[int, ...] = (),
) -> Evaluation:
    """Sum over all batches.

    Parameters
    ----------
    eval_step : callable
        From `make_eval_step`.
    params : nested dict of arrays
        The model's parameters.
    batches : iterable of {"tokens", "labels": int32 [batch, seq_len]}
        Each target once; padding has the label -100.
    put : callable
        Places a batch of NumPy arrays on the devices.
    token_byte_lengths : int32 [vocab_size]
        Bytes of text that each token stands for.
    ks : tuple of int
        As `make_eval_step` was given.

    Returns
    -------
    Evaluation
        The sums, in float64 over batches.
    """
    pending: list[Sums] = []
    tokens = text_bytes = 0
    for batch in batches:
        pending.append(eval_step(params, put(batch)))
        tokens += int((batch["labels"] != IGNORED).sum())
        text_bytes += tjx_data.batch_bytes(batch["labels"], token_byte_lengths)
    # Read at the end: the device never waits for the host between batches.
    sums = jax.device_get(pending)
    return Evaluation(
        loss_sum=math.fsum(float(each["loss_sum"]) for each in sums),
        tokens=tokens,
        text_bytes=text_bytes,
        correct={k: sum(int(each["correct"][i]) for each in sums) for i, k in enumerate(ks)},
    )
