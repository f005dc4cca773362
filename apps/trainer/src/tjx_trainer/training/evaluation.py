"""Evaluation: exact sums over validation data, independent of the batch size."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tjx_nn
import tjx_optim
from tjx_metrics import Evaluation, EvaluationSums
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import SINGLE_DEVICE, Layout
from tjx_trainer.config.run_config import ModelConfig
from tjx_trainer.training.train_state import Batch


class EvaluationInterruptedError(Exception):
    """A stop request interrupted an evaluation; its partial sums are discarded."""


class EvalStep(NamedTuple):
    """Functions that accumulate evaluation sums over batches.

    Attributes
    ----------
    start
        From params to zero sums, replicated over the devices of the params.
    add
        From (sums, params, batch) to the updated sums, jitted. Nothing is donated: sums are a few
        bytes, and the host waits for those of earlier batches.
    """

    start: Callable[[Any], EvaluationSums]
    add: Callable[[EvaluationSums, Any, Batch], EvaluationSums]


def make_eval_step(
    model: ModelConfig,
    *,
    ks: tuple[int, ...] = (),
    metrics: tuple[str, ...] = (),
    token_byte_lengths: np.ndarray | None = None,
    layout: Layout = SINGLE_DEVICE,
    pipeline_means: Callable[[Any, Batch], tjx_optim.AccumulatedGradients] | None = None,
) -> EvalStep:
    """Make the jitted functions that start and extend the sums of losses and accuracies.

    Accuracies (`ks`) and registered metrics need the logits; the loss does not. A decoder is
    evaluated with teacher forcing, so a row whose argmax predictions are all correct is the row
    that greedy decoding would generate. All sums are computed on the devices, because no process
    holds all rows of a batch.

    Parameters
    ----------
    model : ModelConfig
        The model.
    ks : tuple of int
        Values of k for top-k accuracy.
    metrics : tuple of str
        Names of registered metrics.
    token_byte_lengths : int32 [vocab_size] or None
        Length of each token's text [bytes]; None if labels are not text tokens.
    layout : Layout
        The sharding of the model on the mesh.
    pipeline_means : callable, optional
        Loss means of a batch as a pipeline computes them, so that no stage needs the layers of
        others. Accuracies are not available then.

    Returns
    -------
    EvalStep
        From parameters to sums of zero, and from (sums, parameters, batch) to the next sums.
    """
    of_text = token_byte_lengths is not None

    def start(params: Any) -> EvaluationSums:
        sharding = jax.tree.leaves(params)[0].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            replicated = jax.sharding.PartitionSpec()  # type: ignore[no-untyped-call]
            sharding = jax.sharding.NamedSharding(sharding.mesh, replicated)
        return zeros(sharding)()

    @functools.cache  # one compilation per sharding
    def zeros(sharding: jax.sharding.Sharding) -> Callable[[], EvaluationSums]:
        return jax.jit(
            lambda: EvaluationSums.zero(ks=ks, of_text=of_text, metrics=metrics),
            out_shardings=sharding,
        )

    @jax.jit
    def add(sums: EvaluationSums, params: Any, batch: Batch) -> EvaluationSums:
        network: Any = tjx_nn.bind(model, params, layout=layout)
        labels = batch["labels"]
        if pipeline_means is None:
            losses = network.losses(**batch).tokens
        else:
            losses = pipeline_means(params, batch).means["loss"] * (labels != IGNORE_INDEX).sum()
        logits = None
        if ks or metrics:
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
    """Accumulate the evaluation sums over all batches.

    Parameters
    ----------
    eval_step : EvalStep
        From `make_eval_step`.
    params : nested dict of arrays
        The model's parameters.
    batches : iterable of Batch
        Batches that contain each label once; padding has the label `IGNORE_INDEX`.
    before_batch : callable
        Called before each batch; may raise `EvaluationInterruptedError`.

    Returns
    -------
    Evaluation
        The sums, accurate to about float64.
    """
    sums = eval_step.start(params)
    # Wait for the previous batch: one batch stays queued on the device, and the host still notices
    # stop requests and hangs.
    for batch in batches:
        before_batch()
        previous, sums = sums, eval_step.add(sums, params, batch)
        jax.block_until_ready(previous)  # type: ignore[no-untyped-call]
    return sums.on_host()
