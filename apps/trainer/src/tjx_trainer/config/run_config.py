"""The trainer's configuration: the tree of the packages' dataclasses, and its checks.

Nothing here imports JAX: a wrong configuration is refused before a second has passed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from tjx_ckpt.config import CheckpointConfig
from tjx_data.config import DataConfig
from tjx_data.corpora.registry import OTHER_DATA
from tjx_metrics.config import LogConfig
from tjx_metrics.profiling.config import ProfileConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_optim.guard_config import GuardConfig
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.schedule_config import ScheduleConfig
from tjx_parallel.config import DistributedConfig, MeshConfig
from tjx_trainer.config.mesh_checks import batch_shards, known_axis_sizes, mesh_problems
from tjx_trainer.config.train_config import DTYPE_OF_PRECISION, TrainConfig, next_multiple
from tjx_trainer.config.watchdog_config import WatchdogConfig

# The first is what a model is where nothing is said of its family.
ModelConfig = GPTConfig | BertConfig | ViTConfig | EncoderDecoderConfig

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
    guard
        Steps that are not finite, and the loss scale of fp16.
    mesh
        How devices share the work.
    distributed
        How processes find each other.
    checkpoint
        What is kept to go on from.
    log
        What is written while training.
    profile
        Which steps are looked at closely.
    watchdog
        When a run that makes no progress is ended.

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
    guard: GuardConfig = field(default_factory=GuardConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        problems = check_sections({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise ConfigError(problems)

    def with_vocabulary(self, tokenizer_size: int) -> "Config":
        """Return this configuration with the model's vocabulary fitted to the tokenizer.

        Of a larger vocabulary, the ids that the tokenizer lacks get no probability.

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
        if model.vocab_size > tokenizer_size and model.tokenizer_size is None:
            return replace(self, model=replace(model, tokenizer_size=tokenizer_size))
        return self

    def accumulation_for(self, sizes: Mapping[str, int]) -> int:
        """Return the number of microbatches on a mesh whose axes have these sizes."""
        return self.train.accumulation_for(
            batch_shards(sizes),
            stages=sizes["stage"],
            whole_rounds=self.mesh.pipeline == "interleaved_1f1b",
        )

    def check_mesh(self, sizes: Mapping[str, int], *, tokens: int | None = None) -> None:
        """Raise ValueError if a mesh whose axes have these sizes does not fit, with all reasons.

        Parameters
        ----------
        sizes : Mapping[str, int]
            Of each axis.
        tokens : int or None
            Of a row of the data; None where only they know.
        """
        problems = mesh_problems(
            self.model,
            self.train,
            self.mesh,
            sizes,
            tokens=tokens or row_length(self.data, self.model),
            vocabulary_known=True,
        )
        if problems:
            raise ValueError("\n".join(problems))


# The user and password of a URL.
_CREDENTIALS = re.compile(r"://[^/\s]*@")


def check_sections(sections: Mapping[str, Any]) -> list[str]:
    """Check what must hold between sections; those that are absent are not looked at."""
    problems: list[str] = []
    for names, check in _CHECKS:
        if all(name in sections for name in names):
            problems += check(*(sections[name] for name in names))
    return problems + _check_credentials(sections)


def _check_credentials(sections: Mapping[str, Any]) -> list[str]:
    """Refuse users and passwords in URLs: a configuration is written beside every checkpoint."""
    return [
        f"{section}.{field.name}: a user or a password in a URL would be written into config.yaml "
        "and every checkpoint; give it by the environment or a file of the storage's own"
        for section, values in sections.items()
        if is_dataclass(values)
        for field in fields(values)
        if isinstance(value := getattr(values, field.name), str) and _CREDENTIALS.search(value)
    ]


def _check_name(name: str) -> list[str]:
    if name and name not in {".", ".."} and not set(name) & set('/\\\0<>:"|?*\n'):
        return []
    return [f"name {name!r} is part of a folder's name: use letters, digits, '-' and '_'"]


def _check_seed(seed: int) -> list[str]:
    return [] if 0 <= seed < 2**32 else [f"seed {seed} must lie in [0, 2**32): give one such as 1"]


def _check_data(data: DataConfig, model: ModelConfig) -> list[str]:
    """Check that the data are of the kind that the model is of."""
    if is_byte_reversal(data, model):
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


def is_byte_reversal(data: DataConfig, model: ModelConfig) -> bool:
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
    return not is_image and not is_byte_reversal(config.data, config.model)


def _check_sequence_length(data: DataConfig, model: ModelConfig) -> list[str]:
    if isinstance(model, ViTConfig):
        return []
    # The start stands before what is written of such a string; of text an encoder-decoder reads
    # less than a row, and writes a fraction.
    needed = data.seq_len + is_byte_reversal(data, model)
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
        f"to take the tokenizer's, or give --model.vocab_size {next_multiple(needed, 64)}"
    )


def _check_precision(model: ModelConfig, train: TrainConfig) -> list[str]:
    followed = {
        "dtype": DTYPE_OF_PRECISION[train.precision],
        "float8": train.precision == "fp8",
    }
    return [
        f"model.{name} {getattr(model, name)} contradicts train.precision {train.precision}: "
        f"give --train.precision alone, model.{name} follows it"
        for name, value in followed.items()
        if getattr(model, name) != value
    ]


# muP's factors of the learning rate are for steps whose size does not follow the gradient's.
_MUP_OPTIMIZERS = ("adam", "adamw", "lion", "schedule_free_adamw")


def _check_mup(model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
    if model.mup_base is None or optimizer.name in _MUP_OPTIMIZERS:
        return []
    return [
        f"model.mup_base {model.mup_base} scales learning rates as Adam and what is like it needs "
        f"them, and optimizer.name is {optimizer.name}: give one of {', '.join(_MUP_OPTIMIZERS)}, "
        "or leave model.mup_base out"
    ]


def _check_schedule(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> list[str]:
    if optimizer.name != "schedule_free_adamw" or schedule.name == "constant":
        return []
    return [
        f"optimizer.name {optimizer.name} averages instead of lowering the learning rate, and "
        f"schedule.name is {schedule.name}: give --schedule.name constant (with a warm-up)"
    ]


def _check_schedule_lengths(schedule: ScheduleConfig, train: TrainConfig) -> list[str]:
    try:
        schedule.in_steps(train.max_steps)
    except ValueError as error:
        return [f"schedule: {line}" for line in str(error).splitlines()]
    return []


def _check_mesh(
    data: DataConfig, model: ModelConfig, train: TrainConfig, mesh: MeshConfig
) -> list[str]:
    # A size of -1 is known only when the devices are: `Config.mesh_problems` is asked again.
    return mesh_problems(
        model,
        train,
        mesh,
        known_axis_sizes(mesh),
        tokens=row_length(data, model),
        vocabulary_known=not train.vocab_from_tokenizer,
    )


def row_length(data: DataConfig, model: ModelConfig) -> int | None:
    """Return how many tokens a model reads of a row, None where the data decide that."""
    if isinstance(model, ViTConfig):
        return model.max_seq_len
    return None if isinstance(model, EncoderDecoderConfig) else data.seq_len


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., list[str]]], ...] = (
    (("name",), _check_name),
    (("seed",), _check_seed),
    (("data", "model"), _check_data),
    (("data", "model"), _check_data_choices),
    (("data", "model"), _check_sequence_length),
    (("data", "model", "train"), _check_vocabulary),
    (("model", "train"), _check_precision),
    (("model", "optimizer"), _check_mup),
    (("optimizer", "schedule"), _check_schedule),
    (("schedule", "train"), _check_schedule_lengths),
    (("data", "model", "train", "mesh"), _check_mesh),
)
