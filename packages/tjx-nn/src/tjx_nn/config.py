"""The configuration of the models; only the standard library is needed to read it."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

Gelu = Literal["tanh", "erf"]
Remat = Literal["none", "full"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and choices of a decoder-only transformer; the defaults are GPT-2 small.

    Attributes
    ----------
    vocab_size
        Number of token ids.
    max_seq_len
        Longest sequence in tokens (rows of the position table).
    n_layer
        Number of blocks.
    n_head
        Number of query heads in a block; must divide d_model.
    n_kv_head
        Number of key and value heads; None is n_head (MHA), 1 is MQA, between them GQA.
    d_model
        Width of the residual stream in features.
    d_ff
        Width of the MLP's hidden layer in features; None is 4 * d_model.
    dropout
        Probability of dropping a feature of an embedding or of a sublayer's output while training.
    bias
        Whether linear layers and norms have biases.
    gelu
        "tanh" is GPT-2's approximation of GELU, "erf" is the exact function.
    layer_norm_eps
        Added to the variance in LayerNorm.
    scan_layers
        Whether blocks run as a compiled loop, which compiles fast, or unrolled; same parameters.
    remat
        What the backward pass computes again to save memory: "none" or "full" (every block).
    dtype
        Floating-point type of the computation; parameters, norms, softmax and logits are float32.
    attention
        Name of an attention implementation of tjx_kernels; None picks by platform.

    Raises
    ------
    ValueError
        Naming every field that is wrong, one a line.

    Examples
    --------
    >>> GPTConfig(n_layer=2, d_model=64, n_head=4).head_dim
    16
    >>> GPTConfig.preset("gpt2_medium", max_seq_len=512).n_layer
    24
    """

    vocab_size: int = 50257
    max_seq_len: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    d_model: int = 768
    d_ff: int | None = None
    dropout: float = 0.0
    bias: bool = True
    gelu: Gelu = "tanh"
    layer_norm_eps: float = 1e-5
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = "float32"
    attention: str | None = None

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        problems = [*self._bad_sizes(), *self._bad_choices()]
        if problems:
            raise ValueError("\n".join(problems))

    def _bad_sizes(self) -> list[str]:
        names = ("vocab_size", "max_seq_len", "n_layer", "n_head", "d_model")
        sizes = {name: getattr(self, name) for name in names}
        optional = {"n_kv_head": self.n_kv_head, "d_ff": self.d_ff}
        sizes |= {name: size for name, size in optional.items() if size is not None}
        problems = [
            f"{name} is {size!r}: give a whole number of at least 1"
            for name, size in sizes.items()
            if not isinstance(size, int) or isinstance(size, bool) or size < 1
        ]
        if problems:
            return problems
        if self.d_model % self.n_head:
            near = max(1, round(self.d_model / self.n_head)) * self.n_head
            problems.append(
                f"d_model is {self.d_model} and n_head is {self.n_head}: "
                f"n_head must divide d_model; try d_model {near}"
            )
        if self.n_head % self.kv_heads:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            problems.append(
                f"n_head is {self.n_head} and n_kv_head is {self.kv_heads}: "
                f"n_kv_head must divide n_head; try one of {divisors}"
            )
        return problems

    def _bad_choices(self) -> list[str]:
        problems = []
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}: give a probability from 0 to below 1")
        if not 0 < self.layer_norm_eps < 1:
            problems.append(
                f"layer_norm_eps is {self.layer_norm_eps!r}: give a number above 0, such as 1e-5"
            )
        for name, allowed in (("gelu", Gelu), ("remat", Remat), ("dtype", Dtype)):
            if (value := getattr(self, name)) not in get_args(allowed):
                problems.append(f"{name} is {value!r}: give one of {list(get_args(allowed))}")
        return problems

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `n_kv_head` resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ff_dim(self) -> int:
        """Width of the MLP's hidden layer, `d_ff` resolved."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GPTConfig":
        """Return a published model's configuration, with fields replaced by `overrides`.

        Parameters
        ----------
        name
            One of gpt2_small, gpt2_medium, gpt2_large, gpt2_xl.
        **overrides
            Fields of `GPTConfig`.

        Raises
        ------
        ValueError
            If there is no preset of this name; the message names the nearest.
        """
        if name not in _PRESETS:
            near = difflib.get_close_matches(name, _PRESETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"no model preset is named {name!r}: give one of {list(_PRESETS)}{hint}"
            )
        return cls(**{**_PRESETS[name], **overrides})


# Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
_PRESETS: dict[str, dict[str, int]] = {
    "gpt2_small": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "gpt2_medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "gpt2_large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "gpt2_xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
}
