"""Completion of batches by the current and the reference parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tjx_nn
import tjx_parallel
import tjx_rl
from tjx_nn.generation.prompt import row_shards
from tjx_nn.layout import Layout
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.train_config import next_multiple
from tjx_trainer.distillation.teacher import Teacher
from tjx_trainer.rl.grpo_task import GRPOTask
from tjx_trainer.rl.objectives import response_log_probs
from tjx_trainer.rl.preference_tasks import DPOTask, KTOTask
from tjx_trainer.runtime.exit_codes import ExactError
from tjx_trainer.tasks.task import HostBatch, Task
from tjx_trainer.training.pretrained import pretrained_params
from tjx_trainer.training.train_state import Batch, TrainState, model_params


class Scorer:
    """Log-probabilities of responses under the policy and under the frozen initial model.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    layout : Layout
        The sharding of the model on the mesh.
    shardings : nested dict of jax.sharding.Sharding
        Sharding of each parameter.

    Attributes
    ----------
    log_probs : callable
        From (params, batch, base) to float32 [rows, ...] log-probabilities of the labels, jitted.
    """

    def __init__(self, config: Config, layout: Layout, shardings: Any) -> None:
        self._config, self._shardings = config, shardings

        @jax.jit
        def log_probs(params: Any, batch: Batch, base: Any = None) -> jax.Array:
            return response_log_probs(config, layout, params, batch, base)[0]

        self.log_probs = log_probs

    def reference(self, state: TrainState) -> Any:
        """Return the initial parameters: the base of adapters, else those of step 0."""
        return self._initial if state.base is None else state.base

    @functools.cached_property
    def _initial(self) -> Any:
        """The initial parameters of the run; a resumed run rebuilds the same bits."""
        if self._config.train.init_from is not None:
            return jax.device_put(pretrained_params(self._config), self._shardings)
        config = self._config
        make = jax.jit(
            lambda: tjx_nn.init(config.model, jax.random.key(config.seed)),
            out_shardings=self._shardings,
        )
        return make()


class BatchCompleter:
    """Makes the batches of a task from the rows of its loader: functions of (seed, step, state).

    All processes make the whole batch on their hosts, and place their own rows on their devices.

    For dpo and kto the batch holds responses with the log-probabilities of the reference model, for
    kto also the reference point of the whole batch. For grpo it samples responses, scores them, and
    adds the log-probabilities of the trainer; with a teacher the advantages are those of
    `DistillConfig`.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    task : GRPOTask, DPOTask or KTOTask
        The task.
    scorer : Scorer
        Log-probabilities under the policy and the reference model.
    mesh : jax.sharding.Mesh
        The mesh of the run.
    teacher : Teacher, optional
        The teacher of on-policy distillation.

    Raises
    ------
    ValueError
        If the mesh does not divide ``rl.slots``.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        scorer: Scorer,
        mesh: jax.sharding.Mesh,
        teacher: Teacher | None = None,
    ) -> None:
        parts, slots = row_shards(tjx_parallel.batch_sharding(mesh)), config.rl.slots
        if slots is not None and slots % parts:
            raise ValueError(
                f"rl.slots: got {slots}; expected a multiple of data x fsdp x expert = {parts}; "
                f"give --rl.slots {next_multiple(slots, parts)}"
            )
        self._config, self._task, self._scorer = config, task, scorer
        self._mesh, self._teacher = mesh, teacher

    def __call__(
        self, step: int, rows: HostBatch, state: TrainState
    ) -> tuple[Batch, Mapping[str, float]]:
        """Return the batch of a step on the devices, and metrics."""
        match self._task:
            case GRPOTask():
                return self._roll_out(self._task, step, rows["example"], state)
            case DPOTask():
                batch = self._place(self._task.pairs(rows["example"]))
                return self._with_reference(batch, state), {}
            case KTOTask():
                batch, unrelated = map(self._place, self._task.responses(rows["example"]))
                points = _reference_points(
                    self._scorer.log_probs(state.params, unrelated, state.base),
                    self._scorer.log_probs(self._scorer.reference(state), unrelated),
                    unrelated["labels"],
                )
                return {**self._with_reference(batch, state), "reference_points": points}, {}
        raise AssertionError(self._task)

    def _roll_out(
        self, task: GRPOTask, step: int, chosen: np.ndarray, state: TrainState
    ) -> tuple[Batch, Mapping[str, float]]:
        """Sample responses, reward them, and add log-probabilities and the teacher's judgement."""
        config, scorer = self._config, self._scorer
        policy = model_params(config, state.params, state.base)
        host, metrics = task.roll_out(step, chosen, policy)
        batch = self._place(host)

        def exact(params: Any) -> jax.Array:
            found = task.score_exactly(params, host["tokens"], host["labels"])
            return self._place({"log_probs": found})["log_probs"]

        if config.rl.exact:
            old = exact(policy)
        else:
            old = scorer.log_probs(state.params, _inputs(batch), state.base)
        completed: Batch = {**batch, "old_log_probs": old}
        if config.rl.kl_coefficient and config.rl.exact:
            completed = {**completed, "reference_log_probs": exact(scorer.reference(state))}
        elif config.rl.kl_coefficient:
            completed = self._with_reference(completed, state)
        if self._teacher is not None:
            given = (batch["advantages"], old, self._teacher.log_probs(batch), batch["labels"])
            advantages, divergence = _compared(*given, weight=config.distill.weight)
            completed = {**completed, "advantages": advantages}
            metrics = {**metrics, "teacher_kl": float(jax.device_get(divergence))}
        return completed, {**metrics, **self._gap(step, host, old)}

    def _gap(self, step: int, host: HostBatch, old: jax.Array) -> dict[str, float]:
        """Return how the log-probabilities of sampler and trainer differ, which exact runs may not.

        Raises
        ------
        ExactError
            If they differ in a run with ``rl.exact``.
        """
        whole = jax.device_get(jax.device_put(old, tjx_parallel.replicated(self._mesh)))
        gap = np.abs(whole - host["sampler_log_probs"])
        if self._config.rl.exact and gap.any():
            raise ExactError(
                f"rl.exact: the log-probabilities of sampler and trainer differ by up to "
                f"{gap.max()} at step {step + 1}: this platform's program does not treat all rows "
                "of a batch alike; leave --rl.exact out, and --rl.importance_cap corrects for it"
            )
        labels = np.sum(host["labels"] >= 0)
        return {"gap_max": float(gap.max()), "gap_mean": gap.sum() / labels}

    def _with_reference(self, batch: Batch, state: TrainState) -> Batch:
        """Add the log-probabilities of the reference model to a batch."""
        reference = self._scorer.log_probs(self._scorer.reference(state), _inputs(batch))
        return {**batch, "reference_log_probs": reference}

    def _place(self, rows: HostBatch) -> Batch:
        """Place the own rows of the whole batch on the devices of this process."""
        index, count = tjx_parallel.batch_process(self._mesh)
        placed: Batch = tjx_parallel.shard_batch(
            self._mesh, {name: np.array_split(each, count)[index] for name, each in rows.items()}
        )
        return placed


@jax.jit
def _reference_points(log_probs: jax.Array, reference: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the reference point of KTO of unrelated responses [B, T], in each row: float32 [B]."""
    sums = (tjx_rl.sequence_log_probs(each, labels >= 0) for each in (log_probs, reference))
    return jnp.broadcast_to(tjx_rl.kto_reference_point(*sums), len(labels))


@functools.partial(jax.jit, static_argnames="weight")
def _compared(
    advantages: jax.Array, log_probs: jax.Array, teacher: jax.Array, labels: jax.Array, *,
    weight: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Return the advantages of tokens with a teacher, and the mean estimate of the reverse KL."""
    difference = jnp.where(labels >= 0, teacher - log_probs, 0)
    mixed = (1 - weight) * advantages + weight * difference
    return mixed, -difference.sum() / (labels >= 0).sum()


def _inputs(batch: Batch) -> dict[str, jax.Array]:
    return {name: batch[name] for name in ("tokens", "labels")}
