"""Opening a model to be asked: a run directory of the trainer, or a folder of transformers."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import tjx_ckpt
import tjx_data
import tjx_nn
import tjx_parallel
from tjx_eval.errors import EvalError
from tjx_eval.resolve import resolve_model
from tjx_nn import hf
from tjx_nn.models.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.config.run_config import Config, ModelConfig
from tjx_trainer.runtime.allocator import retain_freed_memory
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.build import make_update_rule
from tjx_trainer.training.train_state import abstract_state, eval_params

DECODERS = ("gpt",)


@dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters, spread over all devices.

    Attributes
    ----------
    path : Path
        The folder that it came from.
    architecture : GPTConfig, BertConfig, ViTConfig or EncoderDecoderConfig
        What the model is.
    params : nested dict of float32 arrays
        The parameters.
    mesh : jax.sharding.Mesh
        The devices that they lie on.
    text_tokenizer : tjx_data.Tokenizer or None
        The model's tokenizer; None where it reads no text.
    step : int or None
        Number of updates that made the parameters; None where nobody recorded it.
    config : Config or None
        The resolved configuration of the run; None of a folder of transformers.
    """

    path: Path
    architecture: ModelConfig
    params: dict[str, Any]
    mesh: jax.sharding.Mesh
    text_tokenizer: tjx_data.Tokenizer | None
    step: int | None = None
    config: Config | None = None

    @property
    def name(self) -> str:
        """The folder's name, and the step."""
        name = self.path.resolve().name
        return name if self.step is None else f"{name} (step {self.step})"

    @property
    def gpt(self) -> GPTConfig:
        """What the model is, for whom `open_model` opens decoders alone."""
        assert isinstance(self.architecture, GPTConfig)
        return self.architecture

    @property
    def tokenizer(self) -> tjx_data.Tokenizer:
        """The tokenizer of a model that reads text."""
        assert self.text_tokenizer is not None
        return self.text_tokenizer

    @property
    def run(self) -> RunDirectory:
        """The run directory, of a run."""
        assert self.config is not None
        return RunDirectory(self.path)


def load_model(
    path: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    families: tuple[str, ...] = DECODERS,
) -> TrainedModel:
    """Open a model, spread over all devices.

    Parameters
    ----------
    path : str or Path
        A run directory of the trainer, or a folder of transformers: config.json, safetensors, and
        tokenizer.json.
    step : int, optional
        A run's checkpoint of this step; the newest sound one by default.
    tokenizer : str, optional
        Another place of the tokenizer: a file, folder or name on the hub.
    families : tuple of str
        What may be opened.

    Raises
    ------
    RunError
        If there is no such model at this place, with what to do.
    tjx_ckpt.CheckpointError
        If its checkpoints are damaged.
    """
    found = resolve_model(Path(path))
    if jax.default_backend() == "cpu":
        retain_freed_memory()
    if found.is_run:
        return _open_run(found.path, step, tokenizer, families)
    if step is not None:
        raise EvalError(f"{path}: a folder of transformers has no steps; leave out --step {step}")
    return _open_transformers(found.path, tokenizer, families)


def _open_run(
    path: Path, step: int | None, tokenizer: str | None, families: tuple[str, ...]
) -> TrainedModel:
    run = RunDirectory(path)
    config = dataclasses.replace(run.read_config(), mesh=MeshConfig())
    _refuse_family(path, config.model.family, families)
    place = run.checkpoint_location(config)
    steps = tjx_ckpt.list_steps(place)
    if not steps:
        raise EvalError(
            f"{path}: there is no checkpoint yet; the trainer saves the first at step "
            f"{min(config.checkpoint.every, config.train.max_steps)}"
        )
    if step is not None and step not in steps:
        raise EvalError(
            f"{path}: there is no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    text_tokenizer = _run_tokenizer(run, config, tokenizer)
    _, optimizer = make_update_rule(config)
    mesh = tjx_parallel.make_mesh(MeshConfig())
    abstract = abstract_state(config, optimizer, mesh, tjx_parallel.ShardingRules())
    # Where the optimizer keeps no average, its state, twice the parameters, is not read.
    wanted = {"step": abstract.step, "params": abstract.params}
    if config.optimizer.averages:
        wanted["opt_state"] = abstract.opt_state
    found = tjx_ckpt.Checkpointer(place).restore(wanted, step, partial=True)
    return TrainedModel(
        path=path,
        architecture=_as_it_runs_here(config.model),
        params=eval_params(config, found["params"], found.get("opt_state")),
        mesh=mesh,
        text_tokenizer=text_tokenizer,
        step=int(jax.device_get(found["step"])),
        config=config,
    )


def _run_tokenizer(
    run: RunDirectory, config: Config, given: str | None
) -> tjx_data.Tokenizer | None:
    """Return the tokenizer of a run, and refuse any that is not the one that it trained with."""
    if given is None and not run.tokenizer.is_file():
        if config.model.family not in DECODERS:
            return None
        raise EvalError(
            f"{run.path}: its tokenizer.json is gone; give --tokenizer with the one that it was "
            "trained with"
        )
    place = given or str(run.tokenizer)
    tokenizer = _load_tokenizer(place)
    pointer = run.read_data_pointer()
    trained_with = None if pointer is None else pointer.identity.get("tokenizer")
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise EvalError(
            f"{place} ({tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:8]}) "
            f"is not the tokenizer that {run.path} was trained with ({trained_with[:8]}): its "
            "figures would mean nothing; "
            + ("leave out --tokenizer" if given else "put back the run's own tokenizer.json")
        )
    _refuse_larger(run.path, config.model, tokenizer, place)
    return tokenizer


def _open_transformers(
    path: Path, tokenizer: str | None, families: tuple[str, ...]
) -> TrainedModel:
    try:
        architecture, params = hf.load(path)
    except ValueError as error:
        raise EvalError(_one_line(error)) from error
    assert isinstance(architecture, ModelConfig)
    _refuse_family(path, architecture.family, families)
    text_tokenizer = None
    if architecture.family != "vit":
        if tokenizer is None and not _has_tokenizer(path):
            raise EvalError(
                f"{path}: there is no tokenizer.json in it; put the model's there, or give "
                "--tokenizer FILE_OR_FOLDER"
            )
        text_tokenizer = _load_tokenizer(tokenizer or str(path))
        _refuse_larger(path, architecture, text_tokenizer, tokenizer or str(path))
    mesh = tjx_parallel.make_mesh(MeshConfig())
    shardings = tjx_parallel.param_shardings(
        mesh,
        tjx_parallel.ShardingRules(),
        tjx_nn.logical_axes(architecture),
        jax.eval_shape(lambda: tjx_nn.init(architecture, jax.random.key(0))),
    )
    return TrainedModel(
        path=path,
        architecture=_as_it_runs_here(architecture),
        params=jax.device_put(params, shardings),
        mesh=mesh,
        text_tokenizer=text_tokenizer,
    )


def _as_it_runs_here(model: ModelConfig) -> ModelConfig:
    """Return the model without the choice of a kernel: that was for where it was trained."""
    return dataclasses.replace(model, attention_implementation=None)


def _refuse_family(path: Path, family: str, families: tuple[str, ...]) -> None:
    if family not in families:
        raise EvalError(
            f"{path}: the model is of the family {family}, and this is for decoders "
            f"({', '.join(families)}) alone; `loss RUN_DIR` measures other families on what their "
            "runs held out"
        )


def _refuse_larger(
    path: Path, model: ModelConfig, tokenizer: tjx_data.Tokenizer, place: str
) -> None:
    known = getattr(model, "vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise EvalError(
            f"{place}: this tokenizer has {tokenizer.vocab_size:,} tokens and the model in {path} "
            f"knows {known:,}: give the one that it was trained with"
        )


def _has_tokenizer(folder: Path) -> bool:
    sets = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    return any(all((folder / name).is_file() for name in names) for names in sets)


def _load_tokenizer(place: str) -> tjx_data.Tokenizer:
    try:
        return tjx_data.Tokenizer.load(place)
    except tjx_data.HubError:
        raise
    except ValueError as error:
        raise EvalError(_one_line(error)) from error


def _one_line(error: ValueError) -> str:
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
