"""Opening what a training run left: configuration, tokenizer and parameters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

import tjx_ckpt
import tjx_data
import tjx_parallel
from tjx_nn.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.allocator import keep_freed_memory
from tjx_trainer.config import Config
from tjx_trainer.job import make_update_rule
from tjx_trainer.run_dir import RunDirectory
from tjx_trainer.state import abstract_state, params_to_use


class RunError(ValueError):
    """A run directory that cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class TrainedModel:
    """A model from a run directory.

    Attributes
    ----------
    run : RunDirectory
        Where it came from.
    config : Config
        The run's resolved configuration.
    tokenizer : tjx_data.Tokenizer
        The run's tokenizer.
    mesh : jax.sharding.Mesh
        The devices that the parameters lie on.
    params : nested dict of float32 arrays
        The parameters.
    step : int
        Number of updates that made them.
    """

    run: RunDirectory
    config: Config
    tokenizer: tjx_data.Tokenizer
    mesh: jax.sharding.Mesh
    params: dict[str, Any]
    step: int

    @property
    def gpt(self) -> GPTConfig:
        """The model's own configuration."""
        assert isinstance(self.config.model, GPTConfig)  # `open_trained` refuses others
        return self.config.model


def find_run(path: str) -> RunDirectory:
    """Check that a folder is a run directory.

    Raises
    ------
    RunError
        If it is not; runs beside it are named.
    """
    run = RunDirectory(Path(path))
    if not run.path.is_dir():
        near = sorted(str(file.parent) for file in run.path.parent.glob("*/config.yaml"))[-3:]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise RunError(f"{path}: there is no such folder{hint}")
    if not run.config.is_file():
        raise RunError(f"{path}: no config.yaml in it: give a folder that the trainer has made")
    return run


def open_trained(path: str) -> TrainedModel:
    """Open the newest sound checkpoint of a run, spread over all devices.

    Parameters
    ----------
    path : str
        A run directory.

    Raises
    ------
    RunError
        If it is no run directory, or holds no checkpoint yet.
    tjx_ckpt.CheckpointError
        If its checkpoints are damaged.
    """
    run = find_run(path)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    config = replace(run.read_config(), mesh=MeshConfig())
    if config.model.family != "gpt":
        raise RunError(
            f"{path}: the model is of the family {config.model.family}, and only text decoders "
            "(gpt) are evaluated here; what the trainer measured stands in metrics.jsonl"
        )
    place = run.place_of_checkpoints(config)
    if not tjx_ckpt.list_steps(place):
        raise RunError(
            f"{path}: there is no checkpoint yet; the trainer saves the first at step "
            f"{min(config.checkpoint.every, config.train.max_steps)}"
        )
    _, optimizer = make_update_rule(config)
    mesh = tjx_parallel.make_mesh(MeshConfig())
    abstract = abstract_state(config, optimizer, mesh, tjx_parallel.ShardingRules())
    # Where the optimizer keeps no average, its state, twice the parameters, is not read.
    wanted = {"step": abstract.step, "params": abstract.params}
    if config.optimizer.averages:
        wanted["opt_state"] = abstract.opt_state
    found = tjx_ckpt.Checkpointer(place).restore(wanted, partial=True)
    return TrainedModel(
        run=run,
        config=config,
        tokenizer=tjx_data.Tokenizer.load(run.tokenizer),
        mesh=mesh,
        params=params_to_use(config, found["params"], found.get("opt_state")),
        step=int(jax.device_get(found["step"])),
    )
