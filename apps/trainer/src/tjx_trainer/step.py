"""The training step: one jitted function from (state, batch) to (state, metrics)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_optim
from tjx_trainer.config import Config
from tjx_trainer.state import TrainState, scales_loss

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Labels of this value are padding: no loss, not counted.
IGNORED = -100


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int,
    constrain: Constrain | None = None,
) -> TrainStep:
    """Return the jitted step. It donates the state: use the one that it returns.

    Parameters
    ----------
    config : Config
        Resolved: the model with its compute dtype, the seed (dropout at step s is a function of
        seed and s), the guard, and what is to be logged.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    schedule : callable
        Learning rate by update, for the metrics.
    accumulation : int
        Microbatches in a batch; the result is that of one large batch.
    constrain : callable, optional
        How activations lie on the mesh, as `tjx_parallel.make_constraint` gives it.

    Returns
    -------
    callable
        From (state, batch) to the next state and the scalars "loss" (nats a label), "grad_norm",
        "learning_rate", "tokens" (labels that count), "skipped" and "skipped_in_a_row" (steps
        whose loss or gradients were not finite, which changed nothing), with fp16 "loss_scale", and
        what experts and indexers report; "norms", where they are logged, by kind and path. The
        batch holds the arguments of the model's `losses`, "labels" among them.
    """
    model, scaled = config.model, scales_loss(config)
    stack_axes = tjx_nn.stack_axes(model)

    def loss_sum(params: Any, microbatch: Batch) -> tuple[jax.Array, Any]:
        arrays = dict(microbatch)
        key = arrays.pop("key", None)
        network: Any = tjx_nn.bind(model, params, constrain=constrain)
        losses = network.losses(**arrays, dropout_key=key)
        count = (arrays["labels"] != IGNORED).sum()
        cross_entropy = losses.tokens.sum()
        # Penalties are means over tokens: as sums they weigh the same in microbatches of any size.
        sums = {name: count * value for name, value in losses.measures.items()}
        sums["loss"] = cross_entropy
        return cross_entropy + count * losses.penalty, (count, sums)

    def gradients_of(state: TrainState, batch: Batch) -> tjx_optim.AccumulatedGradients:
        microbatches = dict(tjx_optim.split_microbatches(batch, accumulation))
        labels = batch["labels"].size // accumulation
        # The scale is that of a mean; what is differentiated is a sum over a microbatch.
        scale = state.guard.loss_scale / 2 ** int(math.log2(labels)) if scaled else None
        if model.drops:
            # The step's own key; the parameters took another branch of the same seed.
            step_key = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
            microbatches["key"] = jax.random.split(step_key, accumulation)
        return tjx_optim.accumulate_gradients(
            loss_sum, state.params, microbatches, loss_scale=scale
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total = gradients_of(state, batch)
        grad_norm = tjx_optim.global_norm(total.gradients)
        updates, opt_state = optimizer.update(total.gradients, state.opt_state, state.params)
        finite = tjx_optim.is_finite((total.loss, grad_norm))
        params, opt_state = tjx_optim.keep_unless(
            finite,
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        guard = tjx_optim.next_guard(state.guard, finite, config.guard, scales_loss=scaled)
        metrics: Metrics = {
            **total.means,
            "grad_norm": grad_norm,
            # The optimizer has made no update at a step that was skipped.
            "learning_rate": jnp.asarray(schedule(state.step - state.guard.skipped), jnp.float32),
            "tokens": total.token_count,
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
        }
        if scaled:
            metrics["loss_scale"] = state.guard.loss_scale
        if config.log.layer_norms:
            trees = {"gradient": total.gradients, "parameter": state.params, "update": updates}
            metrics["norms"] = {
                kind: tjx_optim.layer_norms(tree, stack_axes) for kind, tree in trees.items()
            }
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return jax.jit(train_step, donate_argnums=0)
