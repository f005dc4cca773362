"""Configuration of a run: the tree of the packages' dataclasses, and checks between sections.

Nothing here imports JAX, so mistakes are reported within a second.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from tjx_ckpt.config import CheckpointConfig
from tjx_core import ConfigError, Problem, problems_of
from tjx_data.config import DataConfig
from tjx_data.conversations.config import ChatConfig
from tjx_metrics.config import LogConfig, ProfileConfig
from tjx_nn.lora_config import LoRAConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_optim.guard_config import GuardConfig
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.schedule_config import ScheduleConfig
from tjx_parallel.config import DistributedConfig, MeshConfig
from tjx_rl.config import RLConfig
from tjx_trainer.config.distill_config import DistillConfig
from tjx_trainer.config.mesh_checks import batch_shards, known_axis_sizes, mesh_problems
from tjx_trainer.config.scale_config import ScaleConfig
from tjx_trainer.config.task_checks import (
    RL_TASKS,
    check_conversations,
    check_data,
    check_data_options,
    check_distill,
    check_layer_rates,
    check_lora,
    check_rl,
    check_task,
    is_byte_reversal,
)
from tjx_trainer.config.train_config import DTYPE_OF_PRECISION, TrainConfig, next_multiple
from tjx_trainer.config.watchdog_config import WatchdogConfig

# The first is the default family.
ModelConfig = GPTConfig | BertConfig | ViTConfig | EncoderDecoderConfig

GPT2_VOCAB_SIZE = 50257


@dataclass(frozen=True, kw_only=True)
class Config:
    """Complete configuration of a run.

    Attributes
    ----------
    run_dir
        Run directory; an existing run in it is resumed; none: a new runs/NAME-DATE-TIME.
    name
        Name of the run, part of a new directory's name; by default the preset's name.
    seed
        Seed of initialization, data order, dropout and sampling.
    task
        sft (supervised fine-tuning on the conversations of data.path), grpo (reinforcement learning
        with verifiable rewards), dpo (preference pairs), kto (single responses, desirable or not),
        or a registered task, whose module is imported if the name has a dot (my_package.my_task);
        none: that of the model family.
    scale
        The dial: one number that sets model, batch, length and optimizer.
    model
        The model; its fields depend on its family (gpt, bert, vit, encoder_decoder).
    data
        The data and how they are read.
    chat
        Reading and rendering of conversations, for the task sft.
    lora
        Low-rank adapters: with lora.rank only they are trained.
    train
        Training length, batch size and precision.
    optimizer
        The optimizer.
    schedule
        The learning-rate schedule.
    distill
        Distillation from a teacher, of decoders on text or conversations.
    rl
        Settings of the tasks grpo, dpo and kto.
    guard
        Handling of non-finite steps, and fp16 loss scaling.
    mesh
        The device mesh.
    distributed
        Multi-process start.
    checkpoint
        Saving and retention of checkpoints.
    log
        Logging during training.
    profile
        Profiling of single steps.
    watchdog
        Hang detection.

    Raises
    ------
    ConfigError
        If sections contradict each other; all contradictions are named.
    """

    run_dir: str | None = None
    name: str = "run"
    seed: int = 0
    task: str | None = None
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    model: ModelConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    rl: RLConfig = field(default_factory=RLConfig)
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
        """Return the configuration with the model's vocabulary fitted to the tokenizer.

        In a larger vocabulary the ids without a token are masked.

        Parameters
        ----------
        tokenizer_size : int
            Number of ids that the model must support.

        Raises
        ------
        ConfigError
            If model.vocab_size was set and is too small.
        """
        model = self.model
        assert isinstance(model, GPTConfig | BertConfig)
        if self.train.vocab_from_tokenizer:
            return replace(self, model=replace(model, vocab_size=tokenizer_size))
        if model.vocab_size < tokenizer_size:
            raise ConfigError([_vocabulary_too_small(model.vocab_size, tokenizer_size)])
        if model.vocab_size > tokenizer_size and model.tokenizer_size is None:
            return replace(self, model=replace(model, tokenizer_size=tokenizer_size))
        return self

    def accumulation_for(self, sizes: Mapping[str, int]) -> int:
        """Return the number of microbatches on a mesh with these axis sizes."""
        return self.train.accumulation_for(
            batch_shards(sizes),
            stages=sizes["stage"],
            whole_rounds=self.mesh.pipeline == "interleaved_1f1b",
        )

    def check_mesh(self, sizes: Mapping[str, int], *, tokens: int | None = None) -> None:
        """Raise if a mesh cannot shard the model, the batch or the rows.

        Parameters
        ----------
        sizes : Mapping[str, int]
            Size of each mesh axis.
        tokens : int or None
            Length of a row; None to derive it from the configuration.

        Raises
        ------
        ConfigError
            With all problems.
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
            raise ConfigError(problems)


# User and password in a URL.
_CREDENTIALS = re.compile(r"://[^/\s]*@")


def check_sections(sections: Mapping[str, Any]) -> list[Problem]:
    """Return the contradictions between sections; absent sections are not checked."""
    problems: list[Problem] = []
    for names, check in _CHECKS:
        if all(name in sections for name in names):
            problems += check(*(sections[name] for name in names))
    return problems + _check_credentials(sections)


def _check_credentials(sections: Mapping[str, Any]) -> list[Problem]:
    """Reject credentials in URLs: the configuration is saved with every checkpoint."""
    return [
        Problem(
            f"{section}.{field.name}",
            "got a URL with a user or a password, which would be written to config.yaml and every "
            "checkpoint; expected none; give them by the environment or a credentials file",
        )
        for section, values in sections.items()
        if is_dataclass(values)
        for field in fields(values)
        if isinstance(value := getattr(values, field.name), str) and _CREDENTIALS.search(value)
    ]


def _check_name(name: str) -> list[Problem]:
    if name and name not in {".", ".."} and not set(name) & set('/\\\0<>:"|?*\n'):
        return []
    return [Problem("name", f"got {name!r}; expected part of a folder name; use letters, digits, "
                    "'-' and '_'")]  # fmt: skip


def _check_seed(seed: int) -> list[Problem]:
    if 0 <= seed < 2**32:
        return []
    return [Problem("seed", f"got {seed}; expected [0, 2**32); give one such as 1")]


def reads_text(config: "Config") -> bool:
    """Return whether a run reads a text corpus with a built-in task."""
    is_image = isinstance(config.model, ViTConfig)
    return config.task is None and not is_image and not is_byte_reversal(config.data, config.model)


def _check_sequence_length(data: DataConfig, model: ModelConfig) -> list[Problem]:
    if isinstance(model, ViTConfig):
        return []
    # Byte reversal adds a start token; span corruption makes rows shorter than seq_len.
    needed = data.seq_len + is_byte_reversal(data, model)
    if needed <= model.max_seq_len:
        return []
    message = (
        f"got {data.seq_len}; expected at most model.max_seq_len={model.max_seq_len}; give "
        f"--model.max_seq_len {needed} or a shorter --data.seq_len"
    )
    return [Problem("data.seq_len", message, ("model.max_seq_len",))]


def _check_vocabulary(data: DataConfig, model: ModelConfig, train: TrainConfig) -> list[Problem]:
    if not isinstance(model, GPTConfig | BertConfig):
        return []
    # Sizes that are known without the tokenizer; `with_vocabulary` checks the actual size.
    known = {"gpt2": GPT2_VOCAB_SIZE, "bpe": data.vocab_size}
    size = 0 if data.reads_tokens else known.get(data.tokenizer_kind, 0)
    if train.vocab_from_tokenizer or model.vocab_size >= size:
        return []
    return [_vocabulary_too_small(model.vocab_size, size)]


def _vocabulary_too_small(given: int, needed: int) -> Problem:
    message = (
        f"got {given}; expected at least the tokenizer's {needed} ids; leave it out, or give "
        f"--model.vocab_size {next_multiple(needed, 64)}"
    )
    return Problem("model.vocab_size", message, ("data.tokenizer",))


def _check_precision(model: ModelConfig, train: TrainConfig) -> list[Problem]:
    implied = {
        "dtype": DTYPE_OF_PRECISION[train.precision],
        "float8": train.precision == "fp8",
    }
    return [
        Problem(
            f"model.{name}",
            f"got {getattr(model, name)}; expected {value}, which follows from train.precision "
            f"{train.precision}; give --train.precision alone",
            ("train.precision",),
        )
        for name, value in implied.items()
        if getattr(model, name) != value
    ]


# muP's learning-rate factors assume updates whose size does not depend on the gradient's, and
# CompleteP's weight decay is decoupled from the gradient.
_MUP_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "mup_base": ("adam", "adamw", "lion", "schedule_free_adamw"),
    "mup_base_depth": ("adamw", "lion", "schedule_free_adamw"),
}


def _check_mup(model: ModelConfig, optimizer: OptimizerConfig) -> list[Problem]:
    return [
        Problem(
            f"model.{name}",
            f"got {getattr(model, name)} with optimizer.name {optimizer.name}; expected one of "
            f"{', '.join(expected)}; change the optimizer or leave model.{name} out",
            ("optimizer.name",),
        )
        for name, expected in _MUP_OPTIMIZERS.items()
        if getattr(model, name) is not None and optimizer.name not in expected
    ]


def _check_scale(scale: ScaleConfig, model: ModelConfig) -> list[Problem]:
    if not scale.is_set or isinstance(model, GPTConfig):
        return []
    name = "depth" if scale.flops is None else "flops"
    message = (
        f"got {getattr(scale, name)} with model.family {model.family}; expected gpt, for which the "
        f"rules are; leave scale.{name} out, or give --model.family gpt"
    )
    return [Problem(f"scale.{name}", message, ("model.family",))]


def _check_schedule(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> list[Problem]:
    if optimizer.name != "schedule_free_adamw" or schedule.name == "constant":
        return []
    message = (
        f"got {schedule.name} with optimizer.name {optimizer.name}, which needs no decay; "
        "expected constant; give --schedule.name constant (with a warm-up)"
    )
    return [Problem("schedule.name", message, ("optimizer.name",))]


def _check_schedule_lengths(schedule: ScheduleConfig, train: TrainConfig) -> list[Problem]:
    try:
        schedule.in_steps(train.max_steps)
    except ValueError as error:
        return [problem.within("schedule") for problem in problems_of(error)]
    return []


def _check_phases(
    task: str | None, scale: ScaleConfig, data: DataConfig, distill: DistillConfig,
    train: TrainConfig,
) -> list[Problem]:  # fmt: skip
    if train.phases is None:
        return []
    refused = {
        f"task {task}": ("task", task in RL_TASKS),
        "the dial (--scale)": ("scale.depth", scale.is_set),
        "distill.teacher, which each phase would load": ("distill.teacher", bool(distill.teacher)),
        "data.curriculum, whose steps count batches of one size": (
            "data.curriculum",
            bool(data.curriculum),
        ),
    }
    return [
        Problem(
            "train.phases", f"got {train.phases} with {other}; expected one of the two", (name,)
        )
        for other, (name, is_given) in refused.items()
        if is_given
    ]


def _check_profile(profile: ProfileConfig, train: TrainConfig) -> list[Problem]:
    if profile.range is None or profile.range[1] <= train.max_steps:
        return []
    message = (
        f"got {profile.steps}; expected steps of the run, at most train.max_steps="
        f"{train.max_steps}; give earlier steps or a larger --train.max_steps"
    )
    return [Problem("profile.steps", message, ("train.max_steps",))]


def _check_mesh(
    data: DataConfig, model: ModelConfig, train: TrainConfig, mesh: MeshConfig
) -> list[Problem]:
    # An axis size of -1 depends on the devices: `Config.check_mesh` checks again.
    return mesh_problems(
        model,
        train,
        mesh,
        known_axis_sizes(mesh),
        tokens=row_length(data, model),
        vocabulary_known=not train.vocab_from_tokenizer,
    )


def row_length(data: DataConfig, model: ModelConfig) -> int | None:
    """Return the number of tokens of a row; None if it depends on the data."""
    if isinstance(model, ViTConfig):
        return model.max_seq_len
    return None if isinstance(model, EncoderDecoderConfig) else data.seq_len


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., list[Problem]]], ...] = (
    (("name",), _check_name),
    (("seed",), _check_seed),
    (("task", "model"), check_task),
    (("task", "data", "model"), check_data),
    (("task", "data", "model"), check_data_options),
    (("task", "data", "chat", "model"), check_conversations),
    (("lora", "model", "train", "mesh"), check_lora),
    (("lora", "model", "train"), check_layer_rates),
    (("task", "distill", "rl", "model", "train", "mesh"), check_distill),
    (("task", "rl", "data", "model", "train", "mesh"), check_rl),
    (("data", "model"), _check_sequence_length),
    (("data", "model", "train"), _check_vocabulary),
    (("model", "train"), _check_precision),
    (("model", "optimizer"), _check_mup),
    (("scale", "model"), _check_scale),
    (("optimizer", "schedule"), _check_schedule),
    (("task", "scale", "data", "distill", "train"), _check_phases),
    (("schedule", "train"), _check_schedule_lengths),
    (("profile", "train"), _check_profile),
    (("data", "model", "train", "mesh"), _check_mesh),
)
