"""Construction of a training job: mesh, optimizer, train state, train step and evaluation."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from tjx_trainer.config.task_checks import RL_TASKS
from tjx_trainer.distillation.gradients import make_distillation_gradients, with_teacher_input
from tjx_trainer.distillation.teacher import Teacher
from tjx_trainer.tasks.task import CorpusEvaluator, DataShard, HostBatch, Task
from tjx_trainer.training import reproducible
from tjx_trainer.training.evaluation import EvalStep, evaluate, make_eval_step
from tjx_trainer.training.mesh_layout import make_layout
from tjx_trainer.training.pretrained import check_pretrained
from tjx_trainer.training.train_state import (
    Batch,
    TrainState,
    abstract_state,
    eval_params,
    initial_state,
    shardings_of,
    trained_stack_axes,
)
from tjx_trainer.training.train_step import Gradients, TrainStep, make_gradients, make_train_step

# (step, rows of `Task.train_data`, state) -> batch of the train step, and its metrics.
CompleteBatch = Callable[[int, HostBatch, TrainState], tuple[Batch, Mapping[str, float]]]


@dataclass(frozen=True)
class Job:
    """A built training job: everything that is constant from the first step to the last.

    Attributes
    ----------
    config : Config
        The resolved configuration; ``model.vocab_size`` is the tokenizer's.
    task : Task
        The data loaders and the final report.
    mesh : jax.sharding.Mesh
        The device mesh.
    complete_batch : callable or None
        From (step, rows of the task, state) to the batch of the train step and more metrics, for
        tasks whose batches depend on parameters; None for others, whose rows are the batch.
    put : callable
        Shards this process's rows of a batch over its devices.
    accumulation : int
        Microbatches per step.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    abstract : TrainState
        Shapes, dtypes and shardings of the state.
    train_step : callable
        From (state, batch) to (state, metrics), jitted.
    weight_histograms : callable
        From params to a histogram per parameter, jitted.
    eval_step : EvalStep
        Accumulates evaluation sums over batches, jitted.
    teacher : Teacher or None
        With distillation, the teacher, whose parameters are part of each batch.
    first_step : int
        Of a phase, its first step.
    batch_offset : int
        Number of the task's batch of a step, less the step.
    phases : dict from int to Job
        Jobs of the phases of ``train.phases`` by their first step, from `add_phases`; their batches
        and train steps replace those of this job.
    """

    config: Config
    task: Task
    mesh: jax.sharding.Mesh
    put: Callable[[Mapping[str, np.ndarray]], Batch]
    accumulation: int
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: TrainStep
    weight_histograms: Callable[[dict[str, Any]], dict[str, Any]]
    eval_step: EvalStep
    complete_batch: CompleteBatch | None = None
    teacher: Teacher | None = None
    first_step: int = 0
    batch_offset: int = 0
    phases: Mapping[int, "Job"] = field(default_factory=dict)

    def at(self, step: int) -> "Job":
        """Return the job whose batch and train step a step uses: this one without phases."""
        first = max((first for first in self.phases if first <= step), default=None)
        return self if first is None else self.phases[first]

    def segments(self) -> list[tuple[int, "Job"]]:
        """Return the number of consecutive steps of each job, and the job, in order."""
        starts = sorted({0, *self.phases})
        ends = [*starts[1:], self.config.train.max_steps]
        return [(b - a, self.at(a)) for a, b in zip(starts, ends, strict=True)]

    def rows(self, step: int) -> HostBatch:
        """Return this process's rows of the batch of a step, from 0."""
        return self.task.train_data.batch(step + self.batch_offset)

    def initial_state(self) -> TrainState:
        """Initialize the state of step 0, sharded over the mesh."""
        return initial_state(self.config, self.optimizer, self.abstract)

    def eval_params(self, state: TrainState) -> dict[str, Any]:
        """Return the parameters to evaluate: the optimizer's average if it keeps one."""
        return eval_params(self.config, state.params, state.opt_state, state.base)

    def evaluate(
        self, params: dict[str, Any], before_batch: Callable[[], None] = lambda: None
    ) -> tjx_metrics.Evaluation:
        """Evaluate on the validation data, up to ``train.eval_tokens``.

        Parameters
        ----------
        params : nested dict of arrays
            The model's parameters.
        before_batch : callable
            Called before each batch; may raise `EvaluationInterruptedError`.
        """
        batches = self.task.evaluation_batches(self.put)
        return evaluate(self.eval_step, params, batches, before_batch=before_batch)

    def evaluate_corpora(
        self, params: dict[str, Any], before_batch: Callable[[], None] = lambda: None
    ) -> dict[str, tjx_metrics.Evaluation]:
        """Evaluate on each corpus of a mixture, up to an equal part of ``train.eval_tokens``.

        Parameters
        ----------
        params, before_batch
            As of `evaluate`.

        Returns
        -------
        dict
            Evaluations by corpus; empty if the data are no mixture.
        """
        if not isinstance(self.task, CorpusEvaluator):
            return {}
        batches = itertools.groupby(
            self.task.evaluation_batches_by_corpus(self.put), key=lambda item: item[0]
        )
        return {
            name: evaluate(
                self.eval_step, params, (batch for _, batch in group), before_batch=before_batch
            )
            for name, group in batches
        }


def make_update_rule(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Return the learning-rate schedule and the optimizer of a configuration."""
    schedule = tjx_optim.make_schedule(
        config.schedule,
        learning_rate=config.optimizer.learning_rate,
        max_steps=config.train.max_steps,
    )
    model, train = config.model, config.train
    scales: dict[str, Any] = {}
    if model.mup_base is not None or train.layer_decay != 1 or train.freeze_layers:
        scales["learning_rate_scales"] = tjx_nn.learning_rate_scales(
            model, layer_decay=train.layer_decay, freeze_layers=train.freeze_layers
        )
    if model.mup_base_depth is not None:
        scales["weight_decay_scales"] = tjx_nn.weight_decay_scales(model)
        scales["eps_scales"] = tjx_nn.eps_scales(model)
    # The updates of a rollout share the learning rate of their step.
    updates = config.rl.updates_per_rollout
    optimizer = tjx_optim.make_optimizer(
        config.optimizer,
        schedule if updates == 1 else lambda count: schedule(count // updates),
        stack_axes=trained_stack_axes(config),
        **scales,
    )
    return schedule, optimizer


def build_job(config: Config, make_task: Callable[[DataShard], Task]) -> Job:
    """Build the components of a run. Nothing is computed on the devices.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    make_task : callable
        From a `DataShard` to the task, as `open_task` returns it.

    Raises
    ------
    ValueError
        If the configuration does not fit the devices or the data.
    """
    check_pretrained(config)
    _check_offload(config)
    parts = build_step_components(config, jax.devices())
    process_index, process_count = tjx_parallel.batch_process(parts.mesh)
    # An evaluation batch has the size of one microbatch, so evaluation needs no more memory than
    # training; a pipeline processes all microbatches of a batch.
    batch_size, evaluated = config.train.batch_size, config.train.batch_size // parts.accumulation
    pipeline_means = None
    if parts.mesh.shape["stage"] > 1:
        evaluated = batch_size

        def pipeline_means(params: Any, batch: Batch) -> tjx_optim.AccumulatedGradients:
            microbatches = tjx_optim.split_microbatches(batch, parts.accumulation)
            return parts.gradients(params, microbatches, None, None)

    task = make_task(DataShard(batch_size, evaluated, process_index, process_count))
    _check_row_lengths(config, parts.mesh, task)
    return Job(
        config=config,
        task=task,
        mesh=parts.mesh,
        put=partial(tjx_parallel.shard_batch, parts.mesh),
        accumulation=parts.accumulation,
        optimizer=parts.optimizer,
        abstract=parts.abstract,
        train_step=parts.train_step,
        weight_histograms=jax.jit(
            partial(tjx_metrics.weight_histograms, stack_axes=trained_stack_axes(config))
        ),
        eval_step=make_eval_step(
            config.model,
            ks=task.accuracies,
            metrics=config.log.metrics,
            token_byte_lengths=task.token_byte_lengths,
            layout=parts.layout,
            pipeline_means=pipeline_means,
        ),
        complete_batch=_make_complete_batch(config, task, parts),
        teacher=parts.teacher,
    )


def add_phases(job: Job, phases: Mapping[int, Job]) -> Job:
    """Return a job with phases, whose data continue where those of the phase before end.

    A phase begins with the first whole batch of its own size after the tokens (for encoder-decoders
    rows) of the steps before. Rows of one length are not repeated within an epoch; with another
    length the epoch has other rows in another order.

    Parameters
    ----------
    job : Job
        The job of the run.
    phases : mapping from int to Job
        Job of each phase by its first step, ascending, with the state of `job`.
    """
    found: dict[int, Job] = {}
    used, before, start = 0, job, 0
    for first, phase in phases.items():
        assert jax.tree.leaves(phase.abstract) == jax.tree.leaves(job.abstract)
        used += (first - start) * _batch_tokens(before.config)
        offset = -(-used // _batch_tokens(phase.config)) - first
        found[first] = replace(phase, first_step=first, batch_offset=offset)
        before, start = phase, first
    return replace(job, phases=found)


def _batch_tokens(config: Config) -> int:
    return config.train.batch_size * (row_length(config.data, config.model) or 1)


def _make_complete_batch(
    config: Config, task: Task, parts: "StepComponents"
) -> CompleteBatch | None:
    """Return the function that adds to the rows of a batch; None if they are the batch."""
    if config.task not in RL_TASKS:
        return None if parts.teacher is None else parts.teacher.complete
    from tjx_trainer.rl.scoring import BatchCompleter, Scorer

    shardings = shardings_of(parts.abstract).params
    scorer = Scorer(config, parts.layout, shardings)
    return BatchCompleter(config, task, scorer, parts.mesh, parts.teacher)


def _check_offload(config: Config) -> None:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.mesh.offload != "none" and "pinned_host" not in kinds:
        raise ValueError(
            f"mesh.offload: got {config.mesh.offload}; expected a device with pinned host memory, "
            f"and {device.device_kind} has {', '.join(kinds)}; give --mesh.offload none"
        )


def _check_row_lengths(config: Config, mesh: jax.sharding.Mesh, task: Task) -> None:
    """Raise ValueError if the mesh does not divide the row lengths of the data.

    Only the data of an encoder-decoder determine its source and target lengths.
    """
    if row_length(config.data, config.model) is None:
        rows = task.train_data.batch(0).values()
        for length in sorted({row.shape[1] for row in rows if row.ndim > 1}):
            config.check_mesh(mesh.shape, tokens=length)


class StepComponents(NamedTuple):
    """The components of a `Job` that do not depend on its data; `Job` documents the fields."""

    mesh: jax.sharding.Mesh
    layout: Layout
    accumulation: int
    optimizer: optax.GradientTransformation
    abstract: TrainState
    gradients: Gradients
    train_step: TrainStep
    teacher: Teacher | None


def build_step_components(config: Config, devices: Sequence[jax.Device]) -> StepComponents:
    """Build the components of a job that do not depend on its data.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    devices : sequence of jax.Device
        Devices of the mesh; may be compile-only devices of a topology description.

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
    teacher = None if config.distill.teacher is None else Teacher(config, mesh)
    choices: dict[str, Any] = {}
    if config.train.reproducible == "mesh":
        gradients = reproducible.make_gradients(config, mesh)
        choices["wrap"] = partial(reproducible.on_each_device, mesh=mesh)
    elif teacher is not None and config.task not in RL_TASKS:
        gradients = make_distillation_gradients(config, layout, teacher)
        choices["wrap"] = with_teacher_input
    else:
        gradients = make_gradients(config, mesh, layout, accumulation=accumulation)
    if config.rl.updates_per_rollout > 1:
        from tjx_trainer.rl.rollout_updates import make_rollout_updates

        choices["wrap"] = partial(make_rollout_updates, rl=config.rl)
    train_step = make_train_step(
        config,
        optimizer,
        schedule,
        gradients=gradients,
        accumulation=accumulation,
        shardings=shardings_of(abstract),
        **choices,
    )
    return StepComponents(
        mesh, layout, accumulation, optimizer, abstract, gradients, train_step, teacher
    )


def format_mesh(job: Job) -> str:
    """Format the axes of a mesh: ``data 2 x fsdp 4``."""
    sizes = [f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1]
    return " x ".join(sizes) or "of 1"
