"""Parts of a model's configuration: positions, attention and experts of a kind; and its checks.

Only the standard library is needed to read it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

RopeScaling = Literal["none", "linear", "ntk", "llama3", "yarn"]


# A file of somebody else's may have thousands; more are told when these are mended.
_MOST_TOLD = 50


def raise_problems(problems: list[str]) -> None:
    """Raise ValueError with a line for each problem, if there are any; for the first, if many."""
    more = len(problems) - _MOST_TOLD
    if problems:
        told = [*problems[:_MOST_TOLD], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError("\n".join(told))


def check_sizes(config: Any, *names: str, at_least: int = 1) -> list[str]:
    """Name the fields that are no whole number of at least this size; None passes."""
    return [
        f"{name} is {size!r}: give a whole number of at least {at_least}"
        for name in names
        if (size := getattr(config, name)) is not None
        and (not isinstance(size, int) or isinstance(size, bool) or size < at_least)
    ]


def check_tokenizer_size(given: int | None, vocab_size: int) -> list[str]:
    """Name a number of ids that is not from 1 to the vocabulary's; None passes."""
    if given is None or 1 <= given <= vocab_size:
        return []
    return [
        f"tokenizer_size is {given} and vocab_size is {vocab_size}: give 1 to {vocab_size}, or None"
    ]


def check_choices(config: Any, **allowed: Any) -> list[str]:
    """Name the fields that are not one of their literal type's values."""
    return [
        f"{name} is {value!r}: give one of {list(get_args(kind))}"
        for name, kind in allowed.items()
        if (value := getattr(config, name)) not in get_args(kind)
    ]


def preset_fields(name: str, presets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a preset; ValueError names all presets, and the nearest."""
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no model preset is named {name!r}: give one of {list(presets)}{hint}")
    return presets[name]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, "RoFormer"), and how to stretch them to longer contexts.

    Attributes
    ----------
    base
        The slowest pair of features turns once in about 2 * pi * base tokens.
    dim
        Features of a head that are turned, the first ones; None is all of them. Even.
    interleaved
        Whether features 2i and 2i + 1 are a pair (RoFormer), or i and i + dim / 2 (Llama).
    scaling
        How turning is slowed for contexts beyond original_seq_len: "linear" (Chen et al. 2023),
        "ntk" (a larger base), "llama3" (Llama 3.1: only slow pairs), "yarn" (Peng et al. 2023).
    factor
        Longer by how much.
    original_seq_len
        Tokens that the model was trained with before; "llama3" and "yarn" need it.
    low_freq_factor
        "llama3": pairs that turn fewer times than this in original_seq_len are slowed by factor.
    high_freq_factor
        "llama3": pairs that turn more often than this are not slowed; those between, partly.
    beta_fast
        "yarn": pairs that turn more often than this in original_seq_len are not slowed.
    beta_slow
        "yarn": pairs that turn fewer times than this are slowed by factor; those between, partly.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        problems = check_sizes(self, "dim", "original_seq_len")
        problems += check_choices(self, scaling=RopeScaling)
        if not problems and self.dim is not None and self.dim % 2:
            problems.append(f"dim is {self.dim}: features turn in pairs, give an even number")
        if not self.base > 1:
            problems.append(f"base is {self.base!r}: give a number above 1, such as 10000")
        if not self.factor >= 1:
            problems.append(f"factor is {self.factor!r}: give 1 or more")
        if self.scaling in ("llama3", "yarn") and self.original_seq_len is None:
            problems.append(f"scaling is {self.scaling!r}: it needs original_seq_len")
        if not self.high_freq_factor > self.low_freq_factor > 0:
            problems.append("high_freq_factor must be above low_freq_factor, and that above 0")
        if not self.beta_fast > self.beta_slow > 0:
            problems.append("beta_fast must be above beta_slow, and that above 0")
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent attention (MLA; DeepSeek-AI 2024, "DeepSeek-V2", section 2.1); off without kv_dim.

    Attributes
    ----------
    kv_dim
        Width of the latent that keys and values of all heads are made of, and that is cached; None
        is ordinary attention.
    q_dim
        Width of the latent that queries are made of; None makes them of the residual stream.
    rope_dim
        Features of the rotary part of queries and of the one key that all heads share. Even.
    v_dim
        Features of a head's values; None is head_dim.
    """

    kv_dim: int | None = None
    q_dim: int | None = None
    rope_dim: int = 64
    v_dim: int | None = None

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        problems = check_sizes(self, "kv_dim", "q_dim", "rope_dim", "v_dim")
        if not problems and self.rope_dim % 2:
            problems.append(f"rope_dim is {self.rope_dim}: features turn in pairs, give it even")
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Sparse attention (DSA; DeepSeek-AI 2025, "DeepSeek-V3.2"); off without top_k.

    Attributes
    ----------
    top_k
        Keys that each query attends to, chosen by the indexer; None is all of them.
    n_head
        Heads of the indexer.
    head_dim
        Features of an indexer's head. Even.
    loss
        Weight of the loss that teaches the indexer the distribution of attention.
    """

    top_k: int | None = None
    n_head: int = 4
    head_dim: int = 64
    loss: float = 1.0

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        problems = check_sizes(self, "top_k", "n_head", "head_dim")
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}: features turn in pairs, give it even")
        if not self.loss >= 0:
            problems.append(f"loss is {self.loss!r}: give a weight of at least 0")
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Mixture of experts in place of the MLP (Shazeer et al. 2017; Fedus et al. 2021, "Switch").

    Attributes
    ----------
    count
        Experts of a block; 0 is one MLP for all tokens.
    per_token
        Experts that each token goes to.
    shared
        Experts that every token goes to besides (DeepSeekMoE, Dai et al. 2024).
    d_ff
        Width of an expert's hidden layer in features; None is the model's d_ff.
    first_layer
        Blocks before this one have an MLP.
    capacity_factor
        An expert takes at most this many times its equal share of a sequence's tokens; what comes
        later is dropped (the residual stream passes it on) and counted, in training alone. None
        takes all.
    normalize
        Whether the weights of a token's experts are scaled to sum to 1.
    balance_loss
        Weight of the loss that spreads tokens over experts.
    z_loss
        Weight of the loss that keeps the router's logits small (Zoph et al. 2022, "ST-MoE").
    """

    count: int = 0
    per_token: int = 2
    shared: int = 0
    d_ff: int | None = None
    first_layer: int = 0
    capacity_factor: float | None = 1.25
    normalize: bool = True
    balance_loss: float = 0.01
    z_loss: float = 1e-3

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        problems = check_sizes(self, "count", "shared", "first_layer", at_least=0)
        problems += check_sizes(self, "per_token", "d_ff")
        if not problems and 0 < self.count < self.per_token:
            problems.append(
                f"per_token is {self.per_token} and count is {self.count}: "
                f"give at most {self.count}"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            problems.append(
                f"capacity_factor is {self.capacity_factor!r}: give more than 0, or none"
            )
        problems += [
            f"{name} is {getattr(self, name)!r}: give a weight of at least 0"
            for name in ("balance_loss", "z_loss")
            if not getattr(self, name) >= 0
        ]
        raise_problems(problems)
