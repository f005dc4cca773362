"""Train step: a jitted function from (state, batch) to (state, metrics)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tjx_optim
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.gradients import Batch, Gradients
from tjx_trainer.training.train_state import TrainState, scales_loss, trained_stack_axes

Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    gradients: Gradients,
    accumulation: int,
    shardings: TrainState,
    wrap: Callable[[TrainStep], TrainStep] = lambda update: update,
) -> TrainStep:
    """Return the jitted train step. It donates the input state.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    schedule : callable
        Learning rate by update, for the metrics.
    gradients : callable
        From `make_gradients`.
    accumulation : int
        Microbatches per batch; the result equals that of one large batch.
    shardings : TrainState
        Sharding of each leaf of the state between two steps.
    wrap : callable
        From the function to jit to the same function, for example `reproducible.on_each_device`.

    Returns
    -------
    callable
        From (state, batch) to the next state and scalar metrics: "loss" [nats/label], "grad_norm",
        "param_norm" (before the update), "learning_rate", "tokens" (counted labels), "skipped" and
        "skipped_in_a_row" (non-finite steps, which leave parameters and optimizer state unchanged),
        "loss_scale" in fp16, and the auxiliary losses of experts and indexers. With
        ``log.layer_norms_every``, "norms" holds norms by kind and parameter path. The batch holds
        the arguments of the model's `losses` method, among them "labels".
    """
    drops, scaled = config.model.drops, scales_loss(config)
    stack_axes = trained_stack_axes(config)
    on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings)

    def gradients_of(state: TrainState, batch: Batch) -> tjx_optim.AccumulatedGradients:
        microbatches = dict(tjx_optim.split_microbatches(batch, accumulation))
        labels = config.train.batch_size // accumulation * math.prod(batch["labels"].shape[1:])
        # The loss scale applies to the mean; the differentiated loss is a sum over a microbatch.
        scale = state.guard.loss_scale / 2 ** int(math.log2(labels)) if scaled else None
        if drops:
            # Dropout key: a function of (seed, step). The parameters used another branch of the
            # seed.
            step_key = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
            microbatches["dropout_key"] = jax.random.split(step_key, accumulation)
        return gradients(state.params, microbatches, scale, state.base)

    @wrap
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total = gradients_of(state, batch)
        with jax.named_scope("optimizer"):
            grad_norm = tjx_optim.global_norm(total.gradients)
            updates, opt_state = optimizer.update(total.gradients, state.opt_state, state.params)
            finite = tjx_optim.is_finite((total.loss, grad_norm))
            params, opt_state = tjx_optim.select_finite(
                finite,
                (optax.apply_updates(state.params, updates), opt_state),
                (state.params, state.opt_state),
            )
        guard = tjx_optim.update_guard(state.guard, finite, config.guard, scales_loss=scaled)
        metrics: Metrics = {
            **total.means,
            "grad_norm": grad_norm,
            "param_norm": tjx_optim.global_norm(state.params),
            # Skipped steps do not advance the schedule.
            "learning_rate": jnp.asarray(schedule(state.step - state.guard.skipped), jnp.float32),
            "tokens": total.token_count,
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
        }
        if scaled:
            metrics["loss_scale"] = state.guard.loss_scale
        if config.log.layer_norms_every is not None:
            trees = {"gradient": total.gradients, "parameter": state.params, "update": updates}
            metrics["norms"] = {
                kind: tjx_optim.layer_norms(tree, stack_axes) for kind, tree in trees.items()
            }
        return TrainState(state.step + 1, params, opt_state, guard, state.base), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if config.mesh.offload != "none":
            state = jax.device_put(state, on_device)
        return update(state, batch)

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),  # metrics are replicated, as is the step
    )
