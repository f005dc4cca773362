"""Nested configurations of a model (RoPE, latent and sparse attention, experts) and field checks.

Importing it needs only the standard library.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tjx_nn.problems import Problem, raise_problems

RopeScaling = Literal["none", "linear", "ntk", "llama3", "yarn", "longrope"]
ExpertScores = Literal["softmax", "sigmoid"]


def check_sizes(config: Any, *names: str, at_least: int = 1) -> list[Problem]:
    """Return an error for each field that is not an integer >= `at_least`; None is valid."""
    return [
        Problem(name, f"got {size!r}; expected an integer of at least {at_least}")
        for name in names
        if (size := getattr(config, name)) is not None
        and (not isinstance(size, int) or isinstance(size, bool) or size < at_least)
    ]


def check_tokenizer_size(given: int | None, vocab_size: int) -> list[Problem]:
    """Return an error if a tokenizer size is not in [1, vocab_size]; None is valid."""
    if given is None or 1 <= given <= vocab_size:
        return []
    return [
        Problem(
            "tokenizer_size",
            f"got {given}; expected 1 to vocab_size {vocab_size}, or None",
            ("vocab_size",),
        )
    ]


def check_choices(config: Any, **allowed: Any) -> list[Problem]:
    """Return an error for each field that is not a value of its Literal type."""
    return [
        Problem(name, f"got {value!r}; expected one of {list(get_args(kind))}")
        for name, kind in allowed.items()
        if (value := getattr(config, name)) not in get_args(kind)
    ]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings (Su et al. 2021, "RoFormer") with context extension.

    Attributes
    ----------
    base
        Base of the frequencies; the longest wavelength is about 2 * pi * base tokens.
    dim
        Number of rotated features of a head, the first ones, even; None is all.
    local_base
        Base in blocks with a window, where positions are never scaled (Gemma 3); None is base, with
        the scaling of the other blocks.
    interleaved
        Whether features 2i and 2i + 1 form a pair (RoFormer), or i and i + dim / 2 (Llama).
    scaling
        Context extension beyond original_seq_len: "linear" (Chen et al. 2023), "ntk" (larger base),
        "llama3" (Llama 3.1: low frequencies only), "yarn" (Peng et al. 2023) or "longrope" (a
        divisor of each frequency, Ding et al. 2024).
    factor
        Factor of the context length; with "longrope" for the default of attention_factor only.
    original_seq_len
        Context length before the extension; required by "llama3", "yarn" and "longrope".
    low_freq_factor
        "llama3": pairs with fewer rotations in original_seq_len are scaled by 1 / factor.
    high_freq_factor
        "llama3": pairs with more rotations are unchanged; between both, interpolated.
    beta_fast
        "yarn": pairs with more rotations in original_seq_len are unchanged.
    beta_slow
        "yarn": pairs with fewer rotations are scaled by 1 / factor; between both, interpolated.
    attention_factor
        "yarn" and "longrope": factor of rotated queries and keys; None is 0.1 * ln(factor) + 1, or
        sqrt(1 + ln(factor) / ln(original_seq_len)).
    truncate
        "yarn": whether the interpolation between both starts and ends at whole pairs.
    short_factors
        "longrope": divisor of the frequency of each pair of a model whose max_seq_len is at most
        original_seq_len.
    long_factors
        The same of a model with a larger max_seq_len, for sequences of any length: keys in a cache
        must not change when a sequence becomes longer.
    """

    base: float = 10000.0
    dim: int | None = None
    local_base: float | None = None
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError with a line for each invalid field."""
        problems = check_sizes(self, "dim", "original_seq_len")
        problems += check_choices(self, scaling=RopeScaling)
        if not problems and self.dim is not None and self.dim % 2:
            problems.append(Problem("dim", f"got {self.dim}; expected an even number"))
        problems += [
            Problem(name, f"got {value!r}; expected a number above 1, such as 10000")
            for name in ("base", "local_base")
            if (value := getattr(self, name)) is not None and not value > 1
        ]
        if not self.factor >= 1:
            problems.append(Problem("factor", f"got {self.factor!r}; expected at least 1"))
        if self.attention_factor is not None and not self.attention_factor > 0:
            problems.append(
                Problem(
                    "attention_factor",
                    f"got {self.attention_factor!r}; expected a positive number, or None",
                )
            )
        if self.scaling in ("llama3", "yarn", "longrope") and self.original_seq_len is None:
            problems.append(
                Problem(
                    "original_seq_len",
                    f"got None; expected a length for scaling {self.scaling!r}; set it",
                    ("scaling",),
                )
            )
        if not self.high_freq_factor > self.low_freq_factor > 0:
            problems.append(
                Problem(
                    "high_freq_factor",
                    f"got {self.high_freq_factor} with low_freq_factor "
                    f"{self.low_freq_factor}; expected high_freq_factor > low_freq_factor > 0",
                    ("low_freq_factor",),
                )
            )
        if not self.beta_fast > self.beta_slow > 0:
            problems.append(
                Problem(
                    "beta_fast",
                    f"got {self.beta_fast} with beta_slow {self.beta_slow}; expected "
                    "beta_fast > beta_slow > 0",
                    ("beta_slow",),
                )
            )
        if self.scaling == "longrope":
            problems += check_sizes(self, "original_seq_len", at_least=2)
            problems += [
                Problem(
                    name, f"got {factors}; expected a positive number for each pair of features"
                )
                for name in ("short_factors", "long_factors")
                if not (factors := getattr(self, name)) or not min(factors) > 0
            ]
        raise_problems(problems)

    def of_length(self, max_seq_len: int) -> "RopeConfig":
        """Return the embeddings of a model for sequences of at most `max_seq_len` tokens.

        Parameters
        ----------
        max_seq_len
            `TransformerConfig.max_seq_len`.

        Returns
        -------
        RopeConfig
            With scaling "longrope" and a length above `original_seq_len`, `long_factors` in place
            of `short_factors`; otherwise unchanged.
        """
        if self.scaling != "longrope" or max_seq_len <= (self.original_seq_len or 0):
            return self
        return replace(self, short_factors=self.long_factors)

    def of_window(self, window: int | None) -> "RopeConfig":
        """Return the embeddings of a block.

        Parameters
        ----------
        window
            Window of the block in tokens; None is attention without a window.

        Returns
        -------
        RopeConfig
            With `local_base` as the base if the block has a window.
        """
        if window is None or self.local_base is None:
            return self
        return replace(self, base=self.local_base, local_base=None, scaling="none", factor=1.0)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (MLA; DeepSeek-AI 2024, "DeepSeek-V2"); enabled by `kv_dim`.

    Attributes
    ----------
    kv_dim
        Features of the cached latent of keys and values; None disables latent attention.
    q_dim
        Features of the latent of queries; None projects queries directly.
    rope_dim
        Features of the rotary part of queries and of the key shared by all heads; even. 0 has no
        rotary part, for other positions than "rope".
    rope_heads
        Number of groups of rope_dim / rope_heads features, each with all frequencies; above 1 in
        converted models (`tjx_nn.to_latent_attention`).
    v_dim
        Features of the values of a head; None is head_dim.
    use_norm
        Whether latents are normalized; False in converted models.
    """

    kv_dim: int | None = None
    q_dim: int | None = None
    rope_dim: int = 64
    rope_heads: int = 1
    v_dim: int | None = None
    use_norm: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError with a line for each invalid field."""
        problems = check_sizes(self, "kv_dim", "q_dim", "rope_heads", "v_dim")
        problems += check_sizes(self, "rope_dim", at_least=0)
        if not problems and self.rope_dim % (2 * self.rope_heads):
            expected = "an even number"
            if self.rope_heads > 1:
                expected = f"a multiple of 2 * rope_heads, {2 * self.rope_heads}"
            problems.append(Problem("rope_dim", f"got {self.rope_dim}; expected {expected}"))
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Sparse attention (DSA; DeepSeek-AI 2025, "DeepSeek-V3.2"); enabled by `top_k`.

    Attributes
    ----------
    top_k
        Number of keys that each query attends to; None is all.
    indexer
        Whether a trained indexer selects the keys of all heads; False selects the keys of each head
        by its attention scores, without parameters (Gupta et al. 2021, "Memory-efficient
        Transformers via Top-k Attention").
    n_head
        Number of indexer heads.
    head_dim
        Features of an indexer head; even.
    loss
        Weight of the indexer loss, which matches its scores to the attention weights.
    """

    top_k: int | None = None
    indexer: bool = True
    n_head: int = 4
    head_dim: int = 64
    loss: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError with a line for each invalid field."""
        problems = check_sizes(self, "top_k", "n_head", "head_dim")
        if not problems and self.head_dim % 2:
            problems.append(Problem("head_dim", f"got {self.head_dim}; expected an even number"))
        if not self.loss >= 0:
            problems.append(Problem("loss", f"got {self.loss!r}; expected a weight of at least 0"))
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Mixture of experts in place of the MLP (Shazeer et al. 2017; Fedus et al. 2021, "Switch").

    Attributes
    ----------
    count
        Number of experts of a block; 0 uses an MLP.
    per_token
        Number of experts of each token.
    shared
        Number of shared experts, which process every token (DeepSeekMoE, Dai et al. 2024).
    d_ff
        Width of the hidden layer of an expert; None is that of the MLP.
    first_layer
        Index of the first block with experts; earlier blocks have an MLP.
    every
        Every every-th block has experts, and the others an MLP (Llama 4 Maverick); such blocks run
        unrolled.
    capacity_factor
        Capacity of an expert in training, as a multiple of its equal share of a sequence's tokens.
        Tokens over capacity skip the expert. None is unlimited.
    use_bias
        Whether the router and the matrices of the experts have biases (gpt-oss); shared experts
        follow the bias of the model.
    scores
        Scores of the router: "softmax" over the experts, or "sigmoid" of each (DeepSeek-AI 2024,
        "DeepSeek-V3", section 2.1.2).
    choice_bias
        Whether each expert has a bias that is added to its score for the choice only. The gradient
        of the load-balancing loss lowers the bias of an overloaded expert (Wang et al. 2024,
        "Auxiliary-Loss-Free Load Balancing").
    groups
        Number of groups of equally many, consecutive experts.
    groups_per_token
        Number of groups with the best scores, among whose experts a token chooses (DeepSeek-V2).
    group_top_k
        Number of best experts of a group whose scores sum to the score of the group: 1 in
        DeepSeek-V2, 2 in DeepSeek-V3.
    normalize
        Whether to normalize the weights of a token's experts to a sum of 1.
    weight_scale
        Factor of the weights of a token's experts, after `normalize`.
    scale_inputs
        Whether the weights multiply the inputs of a token's experts, not their outputs (Llama 4).
    balance_loss
        Weight of the load-balancing loss.
    z_loss
        Weight of the router z-loss (Zoph et al. 2022, "ST-MoE").
    """

    count: int = 0
    per_token: int = 2
    shared: int = 0
    d_ff: int | None = None
    first_layer: int = 0
    every: int = 1
    capacity_factor: float | None = 1.25
    use_bias: bool = False
    scores: ExpertScores = "softmax"
    choice_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_top_k: int = 2
    normalize: bool = True
    weight_scale: float = 1.0
    scale_inputs: bool = False
    balance_loss: float = 0.01
    z_loss: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ValueError with a line for each invalid field."""
        problems = check_sizes(self, "count", "shared", "first_layer", at_least=0)
        problems += check_sizes(self, "per_token", "d_ff", "every", "groups", "groups_per_token")
        problems += check_sizes(self, "group_top_k") + check_choices(self, scores=ExpertScores)
        if not problems and self.count:
            problems += self._bad_groups()
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            problems.append(
                Problem(
                    "capacity_factor",
                    f"got {self.capacity_factor!r}; expected a positive number, or None",
                )
            )
        problems += [
            Problem(name, f"got {getattr(self, name)!r}; expected a weight of at least 0")
            for name in ("balance_loss", "z_loss")
            if not getattr(self, name) >= 0
        ]
        if not self.weight_scale > 0:
            problems.append(
                Problem("weight_scale", f"got {self.weight_scale!r}; expected a positive number")
            )
        raise_problems(problems)

    def _bad_groups(self) -> list[Problem]:
        """Return an error for each number that the groups of experts cannot have."""
        if self.count % self.groups:
            return [
                Problem(
                    "groups",
                    f"got {self.groups}; expected a divisor of count {self.count}",
                    ("count",),
                )
            ]
        size = self.count // self.groups
        most = {"groups_per_token": self.groups, "per_token": self.groups_per_token * size}
        most |= {"group_top_k": size} if self.groups > 1 else {}
        return [
            Problem(
                name,
                f"got {getattr(self, name)} with count {self.count} and groups {self.groups}; "
                f"expected at most {limit}",
                ("count", "groups"),
            )
            for name, limit in most.items()
            if getattr(self, name) > limit
        ]
