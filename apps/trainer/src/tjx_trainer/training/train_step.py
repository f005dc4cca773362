"""Train step: a jitted function from (state, batch) to (state, metrics), and its gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_optim
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import Layout
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.task_checks import RL_TASKS
from tjx_trainer.training.train_state import Batch, TrainState, scales_loss, trained_stack_axes

Metrics = dict[str, Any]
# (params, microbatches [k, ...], loss scale, base or None) -> means over the batch and their
# gradients. With low-rank adapters, params are the adapters and base the model's parameters.
Gradients = Callable[[Any, Any, jax.Array | None, Any], tjx_optim.AccumulatedGradients]
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


def make_gradients(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, *, accumulation: int
) -> Gradients:
    """Return the function that computes the mean loss of a batch and its gradients.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : jax.sharding.Mesh
        The device mesh; with several stages the microbatches are pipelined.
    layout : Layout
        The sharding of the model on the mesh.
    accumulation : int
        Microbatches in a batch.
    """
    if mesh.shape["stage"] > 1:
        from tjx_trainer.training.pipeline_gradients import make_pipeline_gradients

        return make_pipeline_gradients(config, mesh, layout, accumulation)
    if config.task in RL_TASKS:
        from tjx_trainer.rl.objectives import make_response_loss_sum as make_sum
    else:
        make_sum = make_loss_sum

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        loss_sum = make_sum(config, layout, base)
        return tjx_optim.accumulate_gradients(loss_sum, params, microbatches, loss_scale=loss_scale)

    return gradients


def bind_trained(config: Config, params: Any, base: Any, layout: Layout) -> Any:
    """Make the model of the trained parameters: all of them, or adapters of `base`."""
    if base is None:
        return tjx_nn.bind(config.model, params, layout=layout)
    return tjx_nn.lora.bind(config.model, config.lora, base, params, layout=layout)


def make_loss_sum(config: Config, layout: Layout, base: Any = None) -> tjx_optim.LossSum:
    """Return the differentiated function: from (params, microbatch) to sums over its labels."""

    def loss_sum(params: Any, microbatch: Batch) -> tuple[jax.Array, Any]:
        network = bind_trained(config, params, base, layout)
        losses = network.losses(**microbatch)
        count = (microbatch["labels"] != IGNORE_INDEX).sum()
        cross_entropy = losses.tokens.sum()
        # Penalties are means over tokens: as sums they weigh the same in microbatches of any size.
        sums = {name: count * value for name, value in losses.aux_losses.items()}
        sums["loss"] = cross_entropy
        return cross_entropy + count * losses.penalty, (count, sums)

    return loss_sum
