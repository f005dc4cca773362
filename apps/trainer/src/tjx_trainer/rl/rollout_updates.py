"""Several optimizer updates on the responses of one rollout."""

from typing import Any

import jax
import jax.numpy as jnp

import tjx_optim
import tjx_rl
from tjx_trainer.training.train_state import Batch, TrainState
from tjx_trainer.training.train_step import Metrics, TrainStep

_SUMS = ("tokens",)
_LAST = ("skipped", "skipped_in_a_row", "loss_scale", "norms")


def make_rollout_updates(update: TrainStep, rl: tjx_rl.RLConfig) -> TrainStep:
    """Return a train step that makes ``rl.minibatches`` updates in each of ``rl.epochs`` passes.

    The log-probabilities before the first update are part of the batch, so the clipped ratio of
    later updates is relative to the policy that has sampled. The step counts rollouts: a checkpoint
    never falls between two updates, and a resumed run needs no responses of an earlier step.

    Parameters
    ----------
    update : callable
        From (state, minibatch) to the next state and metrics.
    rl : tjx_rl.RLConfig
        `minibatches` and `epochs`. Minibatch j holds the rows j, j + minibatches, ...

    Returns
    -------
    callable
        From (state, batch) to the state after all updates and metrics: means over the updates, the
        sum of "tokens", and the last values of the counters and norms.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        parts = tjx_optim.split_microbatches(dict(batch), rl.minibatches)

        def one(state: TrainState, index: jax.Array) -> tuple[TrainState, Metrics]:
            part = jax.tree.map(lambda leaf: leaf[index], parts)
            after, metrics = update(state, part)
            return after._replace(step=state.step), metrics

        order = jnp.tile(jnp.arange(rl.minibatches), rl.epochs)
        after, stacked = jax.lax.scan(one, state, order)
        return after._replace(step=state.step + 1), {
            name: _reduce(name, values) for name, values in stacked.items()
        }

    return train_step


def _reduce(name: str, values: Any) -> Any:
    if name in _LAST:
        return jax.tree.map(lambda leaf: leaf[-1], values)
    return values.sum(0) if name in _SUMS else values.mean(0)
