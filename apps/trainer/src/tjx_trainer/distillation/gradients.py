"""Gradients of the loss with a teacher's distribution."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import tjx_nn
import tjx_optim
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import Layout
from tjx_trainer.config.distill_config import DistillConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.distillation.teacher import Teacher
from tjx_trainer.training.train_state import Batch, TrainState
from tjx_trainer.training.train_step import Gradients, Metrics, TrainStep, bind_trained


class Frozen(NamedTuple):
    """Parameters that a step of distillation reads and does not train.

    Attributes
    ----------
    base : nested dict of arrays or None
        With low-rank adapters, the parameters of the student's model.
    teacher : nested dict of arrays
        The parameters of the teacher.
    """

    base: Any
    teacher: Any


def with_teacher_input(update: TrainStep) -> TrainStep:
    """Return a train step whose batch also holds the parameters of the "teacher".

    `update` finds them in place of the base of adapters, where `make_distillation_gradients` reads
    them.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = {name: value for name, value in batch.items() if name != "teacher"}
        frozen: Any = Frozen(state.base, batch["teacher"])
        after, metrics = update(state._replace(base=frozen), rows)
        return after._replace(base=state.base), metrics

    return train_step


def make_distillation_gradients(config: Config, layout: Layout, teacher: Teacher) -> Gradients:
    """Return the gradient function of distillation, for `with_teacher_input`.

    Parameters
    ----------
    config, layout
        The run, and the sharding of the student.
    teacher : Teacher
        The teacher.
    """

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, frozen: Frozen
    ) -> tjx_optim.AccumulatedGradients:
        network = tjx_nn.bind(teacher.model, frozen.teacher, layout=teacher.layout)

        def loss_sum(params: Any, microbatch: Batch) -> tuple[jax.Array, Any]:
            student = bind_trained(config, params, frozen.base, layout)
            found = tjx_nn.distillation_losses(
                student, network, temperature=config.distill.temperature, **microbatch
            )
            return _sums(config.distill, found, microbatch["labels"] != IGNORE_INDEX)

        return tjx_optim.accumulate_gradients(loss_sum, params, microbatches, loss_scale=loss_scale)

    return gradients


def _sums(
    distill: DistillConfig, found: tjx_nn.DistillationLosses, mask: jax.Array
) -> tuple[jax.Array, Any]:
    """Return the sum of the losses over the labels of a microbatch, and the sums of metrics."""
    losses, count = found.student, mask.sum()
    cross_entropy = losses.tokens.sum()
    divergence = jnp.where(mask, found.divergences, 0).sum()
    weight = distill.weight
    loss = (1 - weight) * cross_entropy + weight * distill.temperature**2 * divergence
    # Penalties are means over tokens: as sums they weigh the same in microbatches of any size.
    sums = {name: count * value for name, value in losses.aux_losses.items()}
    sums |= {"loss": loss, "cross_entropy": cross_entropy, "teacher_kl": divergence}
    return loss + count * losses.penalty, (count, sums)
