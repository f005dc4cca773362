"""Evaluation: exact sums over held-out text, whatever the batch size."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tjx_nn
import tjx_optim
from tjx_metrics import Evaluation, EvaluationSums
from tjx_nn.layout import SINGLE_DEVICE, Layout
from tjx_trainer.config.run_config import ModelConfig
from tjx_trainer.training.gradients import IGNORE_INDEX, Batch


class EvaluationInterruptedError(Exception):
    """An evaluation was left before its end: nothing is known of it."""


class EvalStep(NamedTuple):
    """How to count over batches.

    Attributes
    ----------
    start
        From params to the sums of nothing, lying where the params do.
    add
        From (sums, params, batch) to the sums with the batch, jitted. It donates nothing: sums are
        a few bytes, and those of an earlier batch can be waited for.
    """

    start: Callable[[Any], EvaluationSums]
    add: Callable[[EvaluationSums, Any, Batch], EvaluationSums]


def make_eval_step(
    model: ModelConfig,
    *,
    ks: tuple[int, ...] = (),
    token_byte_lengths: np.ndarray | None = None,
    layout: Layout = SINGLE_DEVICE,
    pipeline_means: Callable[[Any, Batch], tjx_optim.AccumulatedGradients] | None = None,
) -> EvalStep:
    """Return how to count; accuracies (`ks`) need the logits, the loss does not.

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
    """
    of_text = token_byte_lengths is not None

    def start(params: Any) -> EvaluationSums:
        lies = jax.tree.leaves(params)[0].sharding
        if isinstance(lies, jax.sharding.NamedSharding):
            whole = jax.sharding.PartitionSpec()  # type: ignore[no-untyped-call]  # as jax is
            lies = jax.sharding.NamedSharding(lies.mesh, whole)
        return zero_on(lies)()

    @functools.cache  # a new function at each evaluation would be compiled at each
    def zero_on(sharding: jax.sharding.Sharding) -> Callable[[], EvaluationSums]:
        return jax.jit(lambda: EvaluationSums.zero(ks=ks, of_text=of_text), out_shardings=sharding)

    @jax.jit
    def add(sums: EvaluationSums, params: Any, batch: Batch) -> EvaluationSums:
        network: Any = tjx_nn.bind(model, params, layout=layout)
        labels = batch["labels"]
        if pipeline_means is None:
            losses = network.losses(**batch).tokens
        else:
            losses = pipeline_means(params, batch).means["loss"] * (labels != IGNORE_INDEX).sum()
        logits = None
        if ks:
            logits = network(**{name: x for name, x in batch.items() if name != "labels"})
        return sums.plus(
            losses,
            labels,
            logits=logits,
            token_byte_lengths=None
            if token_byte_lengths is None
            else jnp.asarray(token_byte_lengths),
            ignore_index=IGNORE_INDEX,
        )

    return EvalStep(start, add)


def evaluate(
    eval_step: EvalStep,
    params: Any,
    batches: Iterable[Batch],
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sum over all batches.

    Parameters
    ----------
    eval_step : EvalStep
        From `make_eval_step`.
    params : nested dict of arrays
        The model's parameters.
    batches : iterable of Batch
        Each target once; padding has the label -100.
    before_batch : callable
        Called before each batch; raises `EvaluationLeftError` to leave.

    Returns
    -------
    Evaluation
        The sums, as of float64.
    """
    sums = eval_step.start(params)
    # Wait for the batch before: the device does not wait for the host, and the host does not run
    # ahead, so that whoever asks to stop is heard and a device that hangs is noticed.
    for batch in batches:
        before_batch()
        before, sums = sums, eval_step.add(sums, params, batch)
        jax.block_until_ready(before)  # type: ignore[no-untyped-call]  # as jax is
    return sums.on_host()
