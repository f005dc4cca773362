"""Configuration of training length, batch size and precision. Imports no JAX."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_core import ConfigError, Problem, unknown_name
from tjx_trainer.config.phases import parse_phases

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Reproducible = Literal["none", "mesh"]
NewTokens = Literal["error", "mean", "random"]

DTYPE_OF_PRECISION: Mapping[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "bfloat16",  # except in the matrix products of model.float8
}


MAX_COUNT = 2**31 - 1

ORBAX_PREFIX = "orbax:"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training length, batch size, precision and evaluation.

    Attributes
    ----------
    max_steps
        Optimizer steps of the run.
    batch_size
        Sequences per optimizer step, over all devices and microbatches.
    accumulation
        Microbatches per step; none: as few as device_batch_size allows.
    device_batch_size
        Largest number of sequences per device and microbatch, without accumulation; none: all.
    init_from
        Pretrained weights: a run directory, a folder in the format of Hugging Face transformers, or
        a name on its hub such as openai-community/gpt2; its tokenizer is the default of
        data.tokenizer. Or orbax:PATH, an Orbax checkpoint with parameters of this model. none:
        random initialization.
    new_head
        Whether the head of a ViT starts anew, for other classes than those of init_from; its
        pooling may differ too.
    new_tokens
        Rows of token ids that init_from lacks: "mean" of its rows, or "random" as without
        init_from; "error" refuses a larger vocabulary.
    freeze_layers
        Number of first blocks of a decoder that are not trained.
    layer_decay
        Factor of the learning rate from each block of a decoder to the one before; 1: equal rates.
    phases
        Other batch sizes, lengths, windows or logit caps from given steps on, such as
        "0:data.seq_len=256;4000:data.seq_len=512"; none: the values of the run at all steps.
    precision
        Floating-point type of the computation; parameters stay fp32. fp16 scales the loss (guard).
        fp8 is bf16 with 8-bit floats in the matrix products of attention projections and MLP.
    deterministic
        Bit-identical runs on a GPU, by XLA's --xla_gpu_deterministic_ops: slower. CPUs and TPUs
        need no flag.
    reproducible
        mesh: bit-identical parameters on every mesh of data and fsdp devices, in any number of
        processes; each device needs the memory of data parallelism. none: equal up to rounding.
    virtual_shards
        Equal parts of each microbatch whose gradients are added in a fixed order, in reproducible
        mesh; a power of 2 that data x fsdp divides.
    eval_every
        Steps between two evaluations; the last step is always evaluated.
    eval_tokens
        Largest number of validation tokens per evaluation; none: all of them.
    sample_tokens
        Length of the text sample printed at the end; 0 prints none.
    sample_prompt
        Prompt of the sample; none: the start of a document.
    sample_temperature
        Temperature of the sample; 0 is greedy.
    sample_top_k
        The sample draws from this many most probable tokens; none: from all.
    vocab_from_tokenizer
        Whether model.vocab_size follows the tokenizer; setting model.vocab_size makes it false.
    """

    max_steps: int = 1000
    batch_size: int = 12
    accumulation: int | None = None
    device_batch_size: int | None = None
    init_from: str | None = None
    new_head: bool = False
    new_tokens: NewTokens = "error"
    freeze_layers: int = 0
    layer_decay: float = 1.0
    phases: str | None = None
    precision: Precision = "fp32"
    deterministic: bool = False
    reproducible: Reproducible = "none"
    virtual_shards: int = 8
    eval_every: int = 250
    eval_tokens: int | None = None
    sample_tokens: int = 200
    sample_prompt: str | None = None
    sample_temperature: float = 0.8
    sample_top_k: int | None = 50
    vocab_from_tokenizer: bool = True

    def __post_init__(self) -> None:
        problems = [*self._check_counts(), *self._check_choices(), *self._check_phases()]
        microbatches = self.accumulation or 1
        if not problems and self.batch_size % microbatches:
            problems.append(
                Problem(
                    "batch_size",
                    f"got {self.batch_size}; expected a multiple of accumulation={microbatches}; "
                    f"give batch_size {next_multiple(self.batch_size, microbatches)} or "
                    f"accumulation {math.gcd(self.batch_size, microbatches)}",
                    ("accumulation",),
                )
            )
        if problems:
            raise ConfigError(problems)

    def _check_counts(self) -> Iterator[Problem]:
        required = ("max_steps", "batch_size", "eval_every")
        optional = ("accumulation", "device_batch_size", "eval_tokens", "sample_top_k")
        zero = ("sample_tokens", "freeze_layers")
        for name in (*required, *optional, *zero):
            value, least = getattr(self, name), 0 if name in zero else 1
            if value is not None and not least <= value <= MAX_COUNT:
                rule = f"at least {least}" if value < least else f"at most {MAX_COUNT}"
                yield Problem(
                    name, f"got {value}; expected {rule}{' or none' if name in optional else ''}"
                )

    def _check_choices(self) -> Iterator[Problem]:
        if self.new_tokens in ("mean", "random") and self.init_from is None:
            message = f"got {self.new_tokens} without init_from; expected both; give init_from"
            yield Problem("new_tokens", message, ("init_from",))
        if not 0 < self.layer_decay <= 1:
            yield Problem("layer_decay", f"got {self.layer_decay}; expected (0, 1], such as 0.9")
        temperature = self.sample_temperature
        if not (math.isfinite(temperature) and temperature >= 0):
            yield Problem(
                "sample_temperature", f"got {temperature}; expected at least 0; 0 is greedy"
            )
        choices = (
            ("precision", Precision), ("reproducible", Reproducible), ("new_tokens", NewTokens),
        )  # fmt: skip
        for name, kind in choices:
            if getattr(self, name) not in get_args(kind):
                yield unknown_name(name, getattr(self, name), get_args(kind))
        if self.new_head and (self.init_from is None or self.orbax_path is not None):
            message = (
                f"got true with init_from {self.init_from}; expected a folder in the format of "
                "Hugging Face transformers, or a run; leave it out"
            )
            yield Problem("new_head", message, ("init_from",))
        shards = self.virtual_shards
        if shards < 1 or shards & (shards - 1):
            yield Problem("virtual_shards", f"got {shards}; expected a power of 2; give 8")

    def _check_phases(self) -> Iterator[Problem]:
        if self.phases is None:
            return
        found, problems = parse_phases(self.phases)
        yield from problems
        if late := [step for step in found if step >= self.max_steps]:
            message = f"got step {late[0]}; expected less than max_steps={self.max_steps}"
            yield Problem("phases", message, ("max_steps",))

    @property
    def orbax_path(self) -> str | None:
        """Path in ``init_from`` of the form orbax:PATH, else None."""
        if self.init_from is None or not self.init_from.startswith(ORBAX_PREFIX):
            return None
        return self.init_from.removeprefix(ORBAX_PREFIX)

    def accumulation_for(self, shards: int, *, stages: int = 1, whole_rounds: bool = False) -> int:
        """Return the number of microbatches per step.

        In a pipeline the default is four per stage, or as many as the batch allows. In reproducible
        mesh the number does not depend on the mesh: virtual shards take the place of its shards.

        Parameters
        ----------
        shards : int
            Shards of the batch: the product of the mesh axes data, fsdp and expert.
        stages : int
            Pipeline stages; at least one microbatch each is required.
        whole_rounds : bool
            Whether the number must be a multiple of the stages.

        Raises
        ------
        ConfigError
            If the batch cannot be split equally.

        Examples
        --------
        >>> TrainConfig(batch_size=480, device_batch_size=12).accumulation_for(shards=8)
        5
        >>> TrainConfig(batch_size=1, device_batch_size=12).accumulation_for(shards=1)
        1
        """
        source, advice = "mesh data x fsdp x expert", "smaller mesh sizes"
        if self.reproducible == "mesh":
            shards, source = self.virtual_shards, "train.virtual_shards"
            advice = "fewer --train.virtual_shards"
        unit = shards * (self.accumulation or 1)
        if self.batch_size % unit:
            factor = f" x accumulation {self.accumulation}" if self.accumulation else ""
            message = (
                f"got {self.batch_size}; expected a multiple of {unit} ({source} "
                f"{shards}{factor}); give {advice} or --train.batch_size "
                f"{next_multiple(self.batch_size, unit)}"
            )
            raise ConfigError([Problem("train.batch_size", message, ("train.accumulation",))])
        sequences = self.batch_size // shards
        limit = self.device_batch_size or sequences
        small = [n for n in range(1, math.isqrt(sequences) + 1) if sequences % n == 0]
        divisors = sorted({n for d in small for n in (d, sequences // d)})
        fitting = (
            [self.accumulation]
            if self.accumulation
            else [n for n in divisors if sequences // n <= limit]
        )
        if stages == 1:
            return fitting[0]
        unit = stages if whole_rounds else 1
        fitting = [n for n in fitting if n >= stages and n % unit == 0]
        if not fitting:
            multiple = f", a multiple of {stages}," if whole_rounds else ""
            message = (
                f"got {self.accumulation or 'none'} with {sequences} sequences per device; "
                f"expected at least mesh.stage={stages} microbatches{multiple} per step; give "
                f"--train.accumulation {4 * stages} and a batch that it divides"
            )
            raise ConfigError([Problem("train.accumulation", message, ("mesh.stage",))])
        return next((n for n in fitting if n >= 4 * stages), fitting[-1])


def next_multiple(size: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `size`."""
    return math.ceil(size / unit) * unit
