"""The parts of a run, made from its configuration and put together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import tjx_metrics
import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_nn.layout import Layout
from tjx_trainer.config.run_config import Config, row_length
from tjx_trainer.tasks.task import DataShard, Task
from tjx_trainer.training.evaluation import EvalStep, evaluate, make_eval_step
from tjx_trainer.training.gradients import Batch, Gradients, make_gradients
from tjx_trainer.training.mesh_layout import make_layout
from tjx_trainer.training.pretrained import check_pretrained
from tjx_trainer.training.train_state import (
    TrainState,
    abstract_state,
    eval_params,
    initial_state,
    shardings_of,
)
from tjx_trainer.training.train_step import TrainStep, make_train_step


@dataclass(frozen=True)
class Job:
    """What stays the same from the first step of a run to its last.

    Attributes
    ----------
    config : Config
        The resolved configuration: the vocabulary's size is the tokenizer's.
    task : Task
        The data, and how the model is judged by them.
    mesh : jax.sharding.Mesh
        The devices.
    accumulation : int
        Pieces that a step is computed in.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    abstract : TrainState
        Shapes, dtypes and shardings of the state.
    train_step : callable
        From (state, batch) to (state, metrics), jitted.
    weight_spreads : callable
        From params to how the numbers of each are spread, jitted.
    eval_step : EvalStep
        How to count over batches, jitted.
    """

    config: Config
    task: Task
    mesh: jax.sharding.Mesh
    accumulation: int
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: TrainStep
    weight_histograms: Callable[[dict[str, Any]], dict[str, Any]]
    eval_step: EvalStep

    def initial_state(self) -> TrainState:
        """Make the state of step 0."""
        return initial_state(self.config, self.optimizer, self.abstract)

    def eval_params(self, state: TrainState) -> dict[str, Any]:
        """Return the parameters to evaluate and to use: averages of them where it keeps any."""
        return eval_params(self.config, state.params, state.opt_state)

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Spread this process's rows of a batch over its devices."""
        placed: Batch = tjx_parallel.shard_batch(self.mesh, batch)
        return placed

    def evaluate(
        self, params: dict[str, Any], before_batch: Callable[[], None] = lambda: None
    ) -> tjx_metrics.Evaluation:
        """Sum over the held-out data, or as much of them as the configuration says.

        Parameters
        ----------
        params : nested dict of arrays
            The model's parameters.
        before_batch : callable
            Called before each batch; raises `EvaluationLeftError` to leave.
        """
        batches = self.task.evaluation_batches(self.put)
        return evaluate(self.eval_step, params, batches, before_batch=before_batch)


def make_update_rule(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Return the learning rate by step, and the optimizer that follows it."""
    schedule = tjx_optim.make_schedule(
        config.schedule,
        learning_rate=config.optimizer.learning_rate,
        max_steps=config.train.max_steps,
    )
    scales = None
    if config.model.mup_base is not None:
        scales = tjx_nn.learning_rate_scales(config.model)
    optimizer = tjx_optim.make_optimizer(
        config.optimizer,
        schedule,
        learning_rate_scales=scales,
        stack_axes=tjx_nn.stack_axes(config.model),
    )
    return schedule, optimizer


def build_job(config: Config, make_task: Callable[[DataShard], Task]) -> Job:
    """Make the parts of a run. Nothing is computed yet.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    make_task : callable
        As `open_task` gives it, beside the configuration.

    Raises
    ------
    ValueError
        If the configuration does not fit the devices or the data.
    """
    check_pretrained(config)
    _refuse_offload(config)
    parts = build_step_components(config, jax.devices())
    process_index, process_count = tjx_parallel.batch_process(parts.mesh)
    # Evaluation needs the memory of one microbatch, as training does; a pipeline takes them all.
    batch_size, evaluated = config.train.batch_size, config.train.batch_size // parts.accumulation
    pipeline_means = None
    if parts.mesh.shape["stage"] > 1:
        evaluated = batch_size

        def pipeline_means(params: Any, batch: Batch) -> tjx_optim.AccumulatedGradients:
            microbatches = tjx_optim.split_microbatches(batch, parts.accumulation)
            return parts.gradients(params, microbatches, None)

    task = make_task(DataShard(batch_size, evaluated, process_index, process_count))
    _refuse_rows(config, parts.mesh, task)
    return Job(
        config=config,
        task=task,
        mesh=parts.mesh,
        accumulation=parts.accumulation,
        optimizer=parts.optimizer,
        abstract=parts.abstract,
        train_step=tjx_metrics.watch_recompiles(parts.train_step, "the training step"),
        weight_histograms=jax.jit(
            partial(tjx_metrics.weight_histograms, stack_axes=tjx_nn.stack_axes(config.model))
        ),
        eval_step=make_eval_step(
            config.model,
            ks=task.accuracies,
            token_byte_lengths=task.token_byte_lengths,
            layout=parts.layout,
            pipeline_means=pipeline_means,
        ),
    )


def _refuse_offload(config: Config) -> None:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.mesh.offload != "none" and "pinned_host" not in kinds:
        raise ValueError(
            f"mesh.offload {config.mesh.offload}: {device.device_kind} reaches no memory of the "
            f"host (it has {', '.join(kinds)}); give --mesh.offload none"
        )


def _refuse_rows(config: Config, mesh: jax.sharding.Mesh, task: Task) -> None:
    """Raise ValueError where a mesh divides tokens, and rows have another number than it can.

    Only the data of an encoder-decoder know how long its sources and targets are.
    """
    if row_length(config.data, config.model) is None:
        rows = task.train_data.batch(0).values()
        for length in sorted({row.shape[1] for row in rows if row.ndim > 1}):
            config.check_mesh(mesh.shape, tokens=length)


class StepComponents(NamedTuple):
    """What of a job does not need its data; `Job` says what each is."""

    mesh: jax.sharding.Mesh
    layout: Layout
    accumulation: int
    optimizer: optax.GradientTransformation
    abstract: TrainState
    gradients: Gradients
    train_step: TrainStep


def build_step_components(config: Config, devices: Sequence[jax.Device]) -> StepComponents:
    """Make the parts of a job that do not need its data; `devices` need not be there to run it.

    Raises
    ------
    ValueError
        If the configuration does not fit the devices.
    """
    mesh = tjx_parallel.make_mesh(config.mesh, devices)
    config.check_mesh(mesh.shape)
    accumulation = config.accumulation_for(mesh.shape)
    schedule, optimizer = make_update_rule(config)
    rules = tjx_parallel.ShardingRules.of(config.mesh)
    layout = make_layout(config.model, mesh, rules, config.mesh)
    abstract = abstract_state(config, optimizer, mesh, rules)
    gradients = make_gradients(config, mesh, layout, accumulation=accumulation)
    train_step = make_train_step(
        config,
        optimizer,
        schedule,
        gradients=gradients,
        accumulation=accumulation,
        shardings=shardings_of(abstract),
    )
    return StepComponents(mesh, layout, accumulation, optimizer, abstract, gradients, train_step)
