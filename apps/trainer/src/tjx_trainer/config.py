"""The trainer's configuration: the tree of the packages' dataclasses, and its checks.

Nothing here imports JAX: a wrong configuration is refused before a second has passed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from tjx_ckpt.config import CheckpointConfig
from tjx_data.config import DataConfig
from tjx_data.corpora.table import OTHER_DATA
from tjx_metrics.config import LogConfig
from tjx_nn.bert_config import BertConfig
from tjx_nn.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.gpt_config import GPTConfig
from tjx_nn.vit_config import ViTConfig
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.schedule_config import ScheduleConfig
from tjx_parallel.config import MeshConfig

# The first is what a model is where nothing is said of its family.
ModelConfig = GPTConfig | BertConfig | ViTConfig | EncoderDecoderConfig

Precision = Literal["fp32", "bf16"]

DTYPE_OF_PRECISION: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}

GPT2_VOCAB_SIZE = 50257


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, at once.

    Attributes
    ----------
    problems : list of str
        One line each: what was given, what is allowed, what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, how much at once, and how often to look.

    Attributes
    ----------
    max_steps
        Optimizer steps in the whole run.
    batch_size
        Sequences of one optimizer step, over all devices and accumulated pieces.
    accumulation
        Pieces a step is computed in, one after another; none: as few as device_batch_size allows.
    device_batch_size
        Most sequences that one device takes at once, where accumulation is not given; none: all.
    precision
        Floating-point type of the computation; parameters and optimizer state stay fp32.
    eval_every
        Steps between two evaluations; the last step is always evaluated.
    eval_tokens
        Most validation tokens that one evaluation reads; none: all of them.
    sample_tokens
        Tokens of the sample that is printed at the end; 0 prints none.
    sample_prompt
        Text that the sample goes on from; none: the start of a document.
    sample_temperature
        Temperature of the sample; 0 always takes the likeliest token.
    sample_top_k
        The sample draws from this many likeliest tokens; none: from all.
    vocab_from_tokenizer
        Whether model.vocab_size follows the tokenizer; giving model.vocab_size makes it false.
    """

    max_steps: int = 1000
    batch_size: int = 12
    accumulation: int | None = None
    device_batch_size: int | None = None
    precision: Precision = "fp32"
    eval_every: int = 250
    eval_tokens: int | None = None
    sample_tokens: int = 200
    sample_prompt: str | None = None
    sample_temperature: float = 0.8
    sample_top_k: int | None = 50
    vocab_from_tokenizer: bool = True

    def __post_init__(self) -> None:
        at_least_one = ("max_steps", "batch_size", "eval_every")
        or_none = ("accumulation", "device_batch_size", "eval_tokens", "sample_top_k")
        problems = [
            f"{name}={value}: must be at least 1{' or none' if name in or_none else ''}"
            for name in (*at_least_one, *or_none)
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.sample_tokens < 0:
            problems.append(
                f"sample_tokens={self.sample_tokens}: must be at least 0; 0 prints none"
            )
        if not (math.isfinite(self.sample_temperature) and self.sample_temperature >= 0):
            problems.append(
                f"sample_temperature={self.sample_temperature}: must be at least 0; 0 is greedy"
            )
        if self.precision not in get_args(Precision):
            problems.append(
                f"precision={self.precision!r}: must be one of {', '.join(get_args(Precision))}"
            )
        pieces = self.accumulation or 1
        if not problems and self.batch_size % pieces:
            problems.append(
                f"batch_size={self.batch_size} cannot be cut into accumulation={pieces} equal "
                f"pieces; try batch_size {_next_multiple(self.batch_size, pieces)} or accumulation "
                f"{math.gcd(self.batch_size, pieces)}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def accumulation_for(self, shards: int) -> int:
        """Return the number of pieces that a step is computed in.

        Parameters
        ----------
        shards : int
            Parts that every piece is split into: the sizes of the mesh's data and fsdp axes,
            multiplied.

        Raises
        ------
        ValueError
            If the batch cannot be split equally.

        Examples
        --------
        >>> TrainConfig(batch_size=480, device_batch_size=12).accumulation_for(shards=8)
        5
        >>> TrainConfig(batch_size=1, device_batch_size=12).accumulation_for(shards=1)
        1
        """
        unit = shards * (self.accumulation or 1)
        if self.batch_size % unit:
            pieces = f" x accumulation {self.accumulation}" if self.accumulation else ""
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of {unit} (mesh data x fsdp "
                f"{shards}{pieces}): give smaller mesh sizes or --train.batch_size "
                f"{_next_multiple(self.batch_size, unit)}"
            )
        if self.accumulation is not None:
            return self.accumulation
        sequences = self.batch_size // shards
        limit = self.device_batch_size or sequences
        return next(
            n for n in range(1, sequences + 1) if sequences % n == 0 and sequences // n <= limit
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run.

    Attributes
    ----------
    run_dir
        Folder of the run; the same folder again resumes it; none: a new runs/NAME-DATE-TIME.
    name
        Name of the run, in the name of a new folder; the preset's name where not given.
    seed
        Seed of everything random: parameters, order of the data, dropout, the sample.
    model
        The model: what its family (gpt, bert, vit, encoder_decoder) can be told.
    data
        The text and how it is read.
    train
        The run.
    optimizer
        The optimizer.
    schedule
        The learning rate over the steps.
    mesh
        How devices share the work.
    checkpoint
        What is kept to go on from.
    log
        What is written while training.

    Raises
    ------
    ConfigError
        If sections contradict each other; every contradiction is named.
    """

    run_dir: str | None = None
    name: str = "run"
    seed: int = 0
    model: ModelConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        problems = contradictions({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise ConfigError(problems)

    def with_vocabulary(self, tokenizer_size: int) -> "Config":
        """Return this configuration with the model's vocabulary fitted to the tokenizer.

        Parameters
        ----------
        tokenizer_size : int
            Number of ids that the model must know.

        Raises
        ------
        ValueError
            If model.vocab_size was given and is too small.
        """
        model = self.model
        assert isinstance(model, GPTConfig | BertConfig)
        if self.train.vocab_from_tokenizer:
            return replace(self, model=replace(model, vocab_size=tokenizer_size))
        if model.vocab_size < tokenizer_size:
            raise ValueError(_vocabulary_too_small(model.vocab_size, tokenizer_size))
        return self

    @property
    def learning_rate_ends(self) -> int | None:
        """Step at which the learning rate has reached its end; None where it stays constant."""
        if self.schedule.name == "constant":
            return None
        return self.schedule.decay_steps or self.train.max_steps


def contradictions(sections: Mapping[str, Any]) -> list[str]:
    """Check what must hold between sections; those that are absent are not looked at."""
    problems: list[str] = []
    for names, check in _CHECKS:
        if all(name in sections for name in names):
            problems += check(*(sections[name] for name in names))
    return problems


def _check_name(name: str) -> list[str]:
    if name and name not in {".", ".."} and not set(name) & set('/\\\0<>:"|?*\n'):
        return []
    return [f"name {name!r} is part of a folder's name: use letters, digits, '-' and '_'"]


def _check_seed(seed: int) -> list[str]:
    return [] if 0 <= seed < 2**32 else [f"seed {seed} must lie in [0, 2**32): give one such as 1"]


def _check_data(data: DataConfig, model: ModelConfig) -> list[str]:
    """Check that the data are of the kind that the model is of."""
    if is_reversal(data, model):
        return []
    wanted = "images" if model.family == "vit" else None
    if wanted is None and data.corpus in OTHER_DATA and data.path is None:
        return [
            f"data.corpus {data.corpus} holds no text ({OTHER_DATA[data.corpus]}), and a model of "
            f"the family {model.family} reads text: give a corpus of text"
        ]
    if wanted is not None and data.corpus not in ("images", "mnist"):
        return [
            f"data.corpus {data.corpus} is nothing for a model of the family {model.family}: give "
            f"--data.corpus {wanted} ({OTHER_DATA[wanted]})"
        ]
    if wanted is not None and data.path is None:
        return [f"data.path is none: give --data.path FOLDER ({OTHER_DATA[data.corpus]})"]
    return []


_TEXT_FAMILIES = ("gpt", "bert", "encoder_decoder")
# Choices of data that only some families heed.
_HEEDED_BY = {
    "whole_words": ("bert",), "resize": ("vit",), "augment": ("vit",),
    "mixture": _TEXT_FAMILIES, "packing": _TEXT_FAMILIES,
}  # fmt: skip


def _check_data_choices(data: DataConfig, model: ModelConfig) -> list[str]:
    default = DataConfig()
    return [
        f"data.{name} is for models of the family {' or '.join(families)}, and this one is of "
        f"{model.family}: leave it out"
        for name, families in _HEEDED_BY.items()
        if getattr(data, name) != getattr(default, name) and model.family not in families
    ]


def is_reversal(data: DataConfig, model: ModelConfig) -> bool:
    """Tell whether a run learns to write made-up strings backwards."""
    return (
        isinstance(model, EncoderDecoderConfig)
        and data.corpus == "byte-reversal"
        and data.path is None
        and data.mixture is None
    )


def reads_text(config: "Config") -> bool:
    """Tell whether a run reads a corpus of text."""
    is_image = isinstance(config.model, ViTConfig)
    return not is_image and not is_reversal(config.data, config.model)


def _check_sequence_length(data: DataConfig, model: ModelConfig) -> list[str]:
    if isinstance(model, ViTConfig):
        return []
    # The start stands before what is written of such a string; of text an encoder-decoder reads
    # less than a row, and writes a fraction.
    needed = data.seq_len + is_reversal(data, model)
    if needed <= model.max_seq_len:
        return []
    return [
        f"data.seq_len {data.seq_len} is longer than model.max_seq_len {model.max_seq_len}: "
        f"give --model.max_seq_len {needed} or a shorter --data.seq_len"
    ]


def _check_vocabulary(data: DataConfig, model: ModelConfig, train: TrainConfig) -> list[str]:
    if not isinstance(model, GPTConfig | BertConfig):
        return []
    # The sizes that are known before the tokenizer is; `with_vocabulary` checks the real one.
    known = {"gpt2": GPT2_VOCAB_SIZE, "bpe": data.vocab_size}
    size = known.get(data.tokenizer_kind, 0)
    if train.vocab_from_tokenizer or model.vocab_size >= size:
        return []
    return [_vocabulary_too_small(model.vocab_size, size)]


def _vocabulary_too_small(given: int, needed: int) -> str:
    return (
        f"model.vocab_size {given} is smaller than the tokenizer's {needed} tokens: leave it out "
        f"to take the tokenizer's, or give --model.vocab_size {_next_multiple(needed, 64)}"
    )


def _check_precision(model: ModelConfig, train: TrainConfig) -> list[str]:
    if model.dtype == DTYPE_OF_PRECISION[train.precision]:
        return []
    return [
        f"model.dtype {model.dtype} contradicts train.precision {train.precision}: "
        "give --train.precision alone, model.dtype follows it"
    ]


def _check_batch(train: TrainConfig, mesh: MeshConfig) -> list[str]:
    # A size of -1 is known only when the devices are: the trainer asks `accumulation_for` again.
    shards = math.prod(size for size in (mesh.data, mesh.fsdp) if size > 0)
    try:
        train.accumulation_for(shards)
    except ValueError as error:
        return [str(error)]
    return []


def _check_tensor_axis(model: ModelConfig, mesh: MeshConfig) -> list[str]:
    if mesh.tensor < 1:
        return []
    sizes = {"n_head": model.n_head, "d_ff": model.ff_dim}
    if model.n_kv_head is not None:
        sizes["n_kv_head"] = model.n_kv_head
    return [
        f"mesh.tensor {mesh.tensor} does not divide model.{name} {size}: give --mesh.tensor "
        f"{math.gcd(mesh.tensor, size)} or another --model.{name}"
        for name, size in sizes.items()
        if size % mesh.tensor
    ]


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., list[str]]], ...] = (
    (("name",), _check_name),
    (("seed",), _check_seed),
    (("data", "model"), _check_data),
    (("data", "model"), _check_data_choices),
    (("data", "model"), _check_sequence_length),
    (("data", "model", "train"), _check_vocabulary),
    (("model", "train"), _check_precision),
    (("train", "mesh"), _check_batch),
    (("model", "mesh"), _check_tensor_axis),
)


def _next_multiple(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
