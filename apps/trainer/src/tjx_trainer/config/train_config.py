"""How long a run trains, how much at once, and in which precision. Standard library only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp16", "fp8"]

DTYPE_OF_PRECISION: Mapping[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "bfloat16",  # of all but the products that model.float8 is about
}


MAX_COUNT = 2**31 - 1


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
    init_from
        Weights to begin with: a folder in the format of Hugging Face transformers, or a name on its
        hub such as openai-community/gpt2; its tokenizer is the default of data.tokenizer. none:
        random ones.
    precision
        Floating-point type of the computation; parameters stay fp32. fp16 scales the loss (guard).
        fp8 is bf16 with 8-bit floats in the products of attention's projections and of the MLP.
    deterministic
        Same bits in every run on a GPU, through XLA's --xla_gpu_deterministic_ops: slower. CPUs and
        TPUs need no flag.
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
    init_from: str | None = None
    precision: Precision = "fp32"
    deterministic: bool = False
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
        problems += [
            f"{name}={value}: must be at most {MAX_COUNT}"
            for name in (*at_least_one, *or_none, "sample_tokens")
            if (value := getattr(self, name)) is not None and value > MAX_COUNT
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
                f"pieces; try batch_size {next_multiple(self.batch_size, pieces)} or accumulation "
                f"{math.gcd(self.batch_size, pieces)}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def accumulation_for(self, shards: int, *, stages: int = 1, whole_rounds: bool = False) -> int:
        """Return the number of pieces that a step is computed in.

        In a pipeline these are its microbatches: where their number is not given, four for each
        stage, or as many as there can be.

        Parameters
        ----------
        shards : int
            Parts that every piece is split into: the sizes of the mesh's axes data, fsdp and
            expert, multiplied.
        stages : int
            Stages of the pipeline; each wants a piece of its own.
        whole_rounds : bool
            Whether the pieces must be a multiple of the stages.

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
                f"x expert {shards}{pieces}): give smaller mesh sizes or --train.batch_size "
                f"{next_multiple(self.batch_size, unit)}"
            )
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
            raise ValueError(
                f"mesh.stage {stages} wants at least {stages} microbatches"
                f"{f', a multiple of {stages},' if whole_rounds else ''} and train.accumulation is "
                f"{self.accumulation or 'none'} with {sequences} sequences on each device: "
                f"give --train.accumulation {4 * stages} and a batch that it divides"
            )
        return next((n for n in fitting if n >= 4 * stages), fitting[-1])


def next_multiple(size: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `size`."""
    return math.ceil(size / unit) * unit
