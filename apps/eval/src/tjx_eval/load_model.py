"""Load a trained model: a run of the trainer, or a Hugging Face Transformers model directory."""

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import tjx_data
import tjx_nn
import tjx_parallel
from tjx_data.conversations.template import has_template
from tjx_eval.convert_attention import AttentionOptions, convert_attention
from tjx_eval.errors import EvalError
from tjx_eval.resolve import resolve_model
from tjx_nn import hf
from tjx_nn.config import KVCacheDtype
from tjx_nn.models.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.run_reader import Config, ModelConfig, SavedRun, retain_freed_memory

DECODERS = ("gpt",)


@dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters, sharded over all devices.

    Attributes
    ----------
    path : Path
        Model directory.
    architecture : GPTConfig, BertConfig, ViTConfig or EncoderDecoderConfig
        Model config.
    params : nested dict of arrays
        Parameters, float32; int8 or int4 kernels if they were quantized.
    mesh : jax.sharding.Mesh
        Devices of the parameters.
    text_tokenizer : tjx_data.Tokenizer or None
        Tokenizer; None if the model's inputs are not text.
    step : int or None
        Training step of the checkpoint; None if unknown.
    run : SavedRun or None
        The run; None for a Transformers model.
    averaged_steps : tuple of int
        Steps of the checkpoints whose mean the parameters are; empty for one checkpoint.
    """

    path: Path
    architecture: ModelConfig
    params: dict[str, Any]
    mesh: jax.sharding.Mesh
    text_tokenizer: tjx_data.Tokenizer | None
    step: int | None = None
    run: SavedRun | None = None
    averaged_steps: tuple[int, ...] = ()

    @property
    def config(self) -> Config | None:
        """Resolved config of the run; None for a Transformers model."""
        return None if self.run is None else self.run.config

    @property
    def name(self) -> str:
        """Name of the directory, and the steps."""
        name = self.path.resolve().name
        if self.averaged_steps:
            return f"{name} (mean of steps {', '.join(map(str, self.averaged_steps))})"
        return name if self.step is None else f"{name} (step {self.step})"

    @property
    def gpt(self) -> GPTConfig:
        """Model config of a decoder."""
        assert isinstance(self.architecture, GPTConfig)
        return self.architecture

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's directory has a chat template."""
        return has_template(self.path)

    def chat_template(self, location: str | None = None) -> tjx_data.ChatTemplate:
        """Load the chat template of the model; a template that prints the date prints today's.

        Parameters
        ----------
        location : str, optional
            Another template: a file, a folder, or the name of a built-in one.

        Raises
        ------
        EvalError
            If there is none, or it is malformed.
        """
        today = datetime.date.today().isoformat()
        config = tjx_data.ChatConfig(template=location or str(self.path), date=today)
        try:
            return tjx_data.find_template(config, self.tokenizer)
        except ValueError as error:
            raise EvalError(
                f"{'--chat_template' if location else '--chat'}: {_one_line(error)}; a run of "
                "--task sft has one, as have chat models of Transformers"
            ) from error

    @property
    def tokenizer(self) -> tjx_data.Tokenizer:
        """Tokenizer of a text model."""
        assert self.text_tokenizer is not None
        return self.text_tokenizer


def join_processes() -> None:
    """Initialize `jax.distributed` if the environment names several processes.

    Call it before the first use of a device.

    Raises
    ------
    EvalError
        If the environment variables are incomplete.
    """
    try:
        tjx_parallel.initialize()
    except ValueError as error:
        raise EvalError(str(error)) from error


def load_model(
    path: str | Path,
    *,
    step: int | None = None,
    average: int | None = None,
    tokenizer: str | None = None,
    families: tuple[str, ...] | None = DECODERS,
    attention: AttentionOptions | None = None,
    quantization: str | None = None,
    kv_cache: KVCacheDtype = "model",
) -> TrainedModel:
    """Load a model, sharded over all devices.

    Parameters
    ----------
    path : str or Path
        A run directory of the trainer, or a Transformers model directory: config.json, safetensors,
        and tokenizer.json.
    step : int, optional
        Checkpoint step of a run; by default the newest valid one.
    average : int, optional
        The parameters are the mean of this many last checkpoints of a run, up to `step`.
    tokenizer : str, optional
        File, directory or hub name of another tokenizer.
    families : tuple of str or None
        Accepted model families; None accepts all.
    attention : AttentionOptions, optional
        Changes of a decoder's attention, before `quantization`.
    quantization : str, optional
        "int8" or "int4" rounds the kernels of the blocks (`tjx_nn.quantize`).
    kv_cache : str
        "int8" rounds cached keys and values (`GPTConfig.kv_cache_dtype`).

    Raises
    ------
    EvalError
        If there is no such model, or its attention has no int8 cache.
    tjx_ckpt.CheckpointError
        If its checkpoints are damaged.
    """
    resolved = resolve_model(Path(path))
    if jax.default_backend() == "cpu":
        retain_freed_memory()
    if resolved.is_run:
        model = _load_run(resolved.path, step, average, tokenizer, families)
    elif step is not None or average is not None:
        flag, value = ("--step", step) if step is not None else ("--average", average)
        raise EvalError(f"{flag}: got {value}; {path} is a Transformers model without steps")
    else:
        model = _load_transformers(resolved.path, tokenizer, families)
    if attention is not None:
        model = convert_attention(model, attention)
    if quantization is not None:
        quantize = jax.jit(tjx_nn.quantize, static_argnums=(0, 2))
        params = quantize(model.architecture, model.params, quantization)
        model = dataclasses.replace(model, params=params)
    if kv_cache == "model":
        return model
    try:
        architecture = dataclasses.replace(model.architecture, kv_cache_dtype=kv_cache)
    except ValueError as error:
        raise EvalError(f"--kv_cache: {error}") from error
    return dataclasses.replace(model, architecture=architecture)


def _load_run(
    path: Path,
    step: int | None,
    average: int | None,
    tokenizer: str | None,
    families: tuple[str, ...] | None,
) -> TrainedModel:
    run = SavedRun(path)
    config = run.config
    _check_family(path, config.model.family, families)
    steps = run.steps()
    if not steps:
        raise EvalError(
            f"{path}: there is no checkpoint yet; the trainer saves the first at step "
            f"{min(config.checkpoint.every, config.train.max_steps)}"
        )
    if step is not None and step not in steps:
        raise EvalError(
            f"{path}: there is no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    averaged: list[int] = []
    if average is not None:
        averaged = [each for each in steps if step is None or each <= step][-average:]
        if len(averaged) < average:
            raise EvalError(
                f"--average: got {average}; expected at most {len(averaged)}, the number of "
                f"checkpoints of {path} up to the step; give fewer, or train with "
                f"--checkpoint.keep {average}"
            )
    # The task of another package may have no tokenizer.
    of_text = config.model.family in DECODERS and (families is not None or config.task is None)
    text_tokenizer = _run_tokenizer(run, tokenizer, required=of_text)
    mesh = tjx_parallel.make_mesh(MeshConfig())
    if averaged:
        params, restored_step = run.load_average(mesh, averaged), averaged[-1]
    else:
        params, restored_step = run.load_params(mesh, step)
    return TrainedModel(
        path=path,
        architecture=_with_default_attention(config.model),
        params=params,
        mesh=mesh,
        text_tokenizer=text_tokenizer,
        step=restored_step,
        run=run,
        averaged_steps=tuple(averaged),
    )


def _run_tokenizer(
    run: SavedRun, given: str | None, *, required: bool
) -> tjx_data.Tokenizer | None:
    """Load the tokenizer of a run; raises EvalError if it is not the one used in training."""
    if given is None and not run.tokenizer_file.is_file():
        if not required:
            return None
        raise EvalError(
            f"{run.path}: tokenizer.json is missing; give --tokenizer with the "
            "tokenizer of the training"
        )
    location = given or str(run.tokenizer_file)
    tokenizer = _load_tokenizer(location)
    trained_with = run.tokenizer_fingerprint
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise EvalError(
            f"{location} ({tokenizer.vocab_size:,} tokens, fingerprint "
            f"{tokenizer.fingerprint[:8]}) is not the tokenizer that {run.path} was trained with "
            f"({trained_with[:8]}); "
            + ("leave out --tokenizer" if given else "restore the run's own tokenizer.json")
        )
    _check_vocabulary(run.path, run.config.model, tokenizer, location)
    return tokenizer


def _load_transformers(
    path: Path, tokenizer: str | None, families: tuple[str, ...] | None
) -> TrainedModel:
    try:
        architecture = hf.load_config(path)
    except ValueError as error:
        raise EvalError(_one_line(error)) from error
    assert isinstance(architecture, ModelConfig)
    _check_family(path, architecture.family, families)
    text_tokenizer = None
    if architecture.family != "vit":
        if tokenizer is None and not _has_tokenizer(path):
            raise EvalError(
                f"{path}: tokenizer.json is missing; put the model's tokenizer there, or give "
                "--tokenizer FILE_OR_DIR"
            )
        text_tokenizer = _load_tokenizer(tokenizer or str(path))
        _check_vocabulary(path, architecture, text_tokenizer, tokenizer or str(path))
    mesh = tjx_parallel.make_mesh(MeshConfig())
    shardings = tjx_parallel.param_shardings(
        mesh,
        tjx_parallel.ShardingRules(),
        tjx_nn.logical_axes(architecture),
        jax.eval_shape(lambda: tjx_nn.init(architecture, jax.random.key(0))),
    )
    try:
        _, params = hf.load(path, shardings=lambda _: shardings)
    except ValueError as error:
        raise EvalError(_one_line(error)) from error
    return TrainedModel(
        path=path,
        architecture=_with_default_attention(architecture),
        params=params,
        mesh=mesh,
        text_tokenizer=text_tokenizer,
    )


def _with_default_attention(model: ModelConfig) -> ModelConfig:
    """Reset the attention backend: the configured one was for the training hardware."""
    return dataclasses.replace(model, attention_implementation=None)


def _check_family(path: Path, family: str, families: tuple[str, ...] | None) -> None:
    if families is not None and family not in families:
        raise EvalError(
            f"{path}: got a model of the family {family}; expected a decoder "
            f"({', '.join(families)}); `loss RUN_DIR` measures other families on the validation "
            "data of their runs"
        )


def _check_vocabulary(
    path: Path, model: ModelConfig, tokenizer: tjx_data.Tokenizer, location: str
) -> None:
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise EvalError(
            f"{location}: got a tokenizer of {tokenizer.vocab_size:,} tokens; the model in {path} "
            f"has {vocab_size:,}; give the tokenizer of its training"
        )


def _has_tokenizer(folder: Path) -> bool:
    sets = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    return any(all((folder / name).is_file() for name in names) for names in sets)


def _load_tokenizer(location: str) -> tjx_data.Tokenizer:
    try:
        return tjx_data.Tokenizer.load(location)
    except tjx_data.HubError:
        raise
    except ValueError as error:
        raise EvalError(_one_line(error)) from error


def _one_line(error: ValueError) -> str:
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
