"""The parts of a run, made from its configuration and put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax

import tjx_data
import tjx_optim
import tjx_parallel
from tjx_trainer.config import Config
from tjx_trainer.evaluation import EvalStep, Evaluation, evaluate, make_eval_step
from tjx_trainer.state import TrainState, abstract_state, initial_state
from tjx_trainer.step import Batch, TrainStep, make_train_step


@dataclass(frozen=True)
class Job:
    """What stays the same from the first step of a run to its last.

    Attributes
    ----------
    config : Config
        The resolved configuration: the vocabulary's size is the tokenizer's.
    tokenizer : tjx_data.Tokenizer
        From text to tokens and back.
    train_data, validation_data : tjx_data.TokenLoader
        This process's rows of each batch.
    mesh : jax.sharding.Mesh
        The devices.
    optimizer : optax.GradientTransformation
        From gradients to updates.
    abstract : TrainState
        Shapes, dtypes and shardings of the state.
    train_step : callable
        From (state, batch) to (state, metrics), jitted.
    eval_step : callable
        From (params, batch) to sums, jitted.
    """

    config: Config
    tokenizer: tjx_data.Tokenizer
    train_data: tjx_data.TokenLoader
    validation_data: tjx_data.TokenLoader
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: TrainStep
    eval_step: EvalStep

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint of this run goes with."""
        return {"data": self.train_data.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    def initial_state(self) -> TrainState:
        """Make the state of step 0."""
        config = self.config
        return initial_state(config.model, self.optimizer, self.abstract, seed=config.seed)

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Spread this process's rows of a batch over its devices."""
        placed: Batch = tjx_parallel.shard_batch(self.mesh, batch)
        return placed

    def evaluate(self, params: dict[str, Any]) -> Evaluation:
        """Sum over the validation text, or as much of it as the configuration says."""
        return evaluate(
            self.eval_step,
            params,
            self.validation_data.evaluation_batches(self.config.train.eval_tokens),
            put=self.put,
            token_byte_lengths=self.tokenizer.token_byte_lengths,
        )


def open_data(
    config: Config, progress: tjx_data.Progress | None = None
) -> tuple[str, tjx_data.Tokenizer]:
    """Return the folder of the prepared data, made if need be, and its tokenizer.

    Raises
    ------
    tjx_data.HubError
        If the corpus or tokenizer is neither in the cache nor within reach.
    ValueError
        If the text cannot be used.
    """
    folder = tjx_data.open_or_prepare(config.data, progress=progress)
    return str(folder), tjx_data.Tokenizer.load(folder)


def make_update_rule(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Return the learning rate by step, and the optimizer that follows it."""
    schedule = tjx_optim.make_schedule(
        config.schedule,
        learning_rate=config.optimizer.learning_rate,
        max_steps=config.train.max_steps,
    )
    return schedule, tjx_optim.make_optimizer(config.optimizer, schedule)


def build_job(config: Config, data: str, tokenizer: tjx_data.Tokenizer) -> Job:
    """Make the parts of a run. Nothing is computed yet.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    data : str
        Folder of the prepared data.
    tokenizer : tjx_data.Tokenizer
        The tokenizer that made it.

    Raises
    ------
    ValueError
        If the configuration does not fit the devices or the data.
    """
    mesh = tjx_parallel.make_mesh(config.mesh)
    accumulation = config.train.accumulation_for(mesh.shape["data"] * mesh.shape["fsdp"])
    schedule, optimizer = make_update_rule(config)
    rules = tjx_parallel.ShardingRules()
    constrain = tjx_parallel.make_constraint(mesh, rules)
    process_index, process_count = tjx_parallel.batch_process(mesh)

    def loader(split: Literal["train", "validation"], batch_size: int) -> tjx_data.TokenLoader:
        return tjx_data.TokenLoader(
            data,
            split=split,
            seq_len=config.data.seq_len,
            batch_size=batch_size,
            seed=config.seed,
            process_index=process_index,
            process_count=process_count,
            tokenizer=tokenizer,
        )

    return Job(
        config=config,
        tokenizer=tokenizer,
        train_data=loader("train", config.train.batch_size),
        # Evaluation needs the memory of one microbatch, as training does.
        validation_data=loader("validation", config.train.batch_size // accumulation),
        mesh=mesh,
        optimizer=optimizer,
        abstract=abstract_state(config.model, optimizer, mesh, rules),
        train_step=make_train_step(
            config.model,
            optimizer,
            schedule,
            accumulation=accumulation,
            seed=config.seed,
            constrain=constrain,
        ),
        eval_step=make_eval_step(config.model, constrain=constrain),
    )
