"""The training step: one jitted function from (state, batch) to (state, metrics)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_optim
from tjx_trainer.config import ModelConfig
from tjx_trainer.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Labels of this value are padding: no loss, not counted.
IGNORED = -100


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int,
    seed: int,
    constrain: Constrain | None = None,
) -> TrainStep:
    """Return the jitted step. It donates the state: use the one that it returns.

    Parameters
    ----------
    model : ModelConfig
        The model, compute dtype included.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    schedule : callable
        Learning rate by step, for the metrics.
    accumulation : int
        Microbatches in a batch; the result is that of one large batch.
    seed : int
        Dropout at step s is a function of (seed, s).
    constrain : callable, optional
        How activations lie on the mesh, as `tjx_parallel.make_constraint` gives it.

    Returns
    -------
    callable
        From (state, batch) to the next state and the scalars "loss" (nats a label), "grad_norm",
        "learning_rate", "tokens" (labels that count), and what experts and indexers report. The
        batch holds the arguments of the model's `losses`, "labels" among them.
    """

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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        microbatches = dict(tjx_optim.split_microbatches(batch, accumulation))
        if model.drops:
            # The step's own key; the parameters took another branch of the same seed.
            step_key = jax.random.fold_in(jax.random.key(seed), state.step + 1)
            microbatches["key"] = jax.random.split(step_key, accumulation)
        total = tjx_optim.accumulate_gradients(loss_sum, state.params, microbatches)
        updates, opt_state = optimizer.update(total.gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {
            **total.means,
            "grad_norm": tjx_optim.global_norm(total.gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": total.token_count,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
