"""What every model's configuration has: the choices of a block, and the depth.

Only the standard library is needed to read it.
"""

from dataclasses import dataclass, field
from typing import Literal

from tjx_nn.sub_configs import (
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    check_choices,
    check_sizes,
    raise_problems,
)

Norm = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post"]
Positions = Literal["learned", "sinusoidal", "rope", "alibi", "none"]
Activation = Literal["gelu_tanh", "gelu_erf", "relu", "relu2", "swiglu", "geglu"]
Remat = Literal["none", "full", "attention", "dots"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What all models share; each model's configuration adds its own.

    Attributes
    ----------
    n_layer
        Number of blocks.
    n_head
        Number of query heads in a block.
    n_kv_head
        Number of key and value heads; None is n_head (MHA), 1 is MQA, between them GQA.
    d_model
        Width of the residual stream in features.
    d_head
        Features of a head; None is d_model / n_head.
    d_ff
        Width of the MLP's hidden layer in features; None is 4 * d_model, and two thirds of that
        for gated activations, rounded up to a multiple of 64.
    max_seq_len
        Longest sequence in tokens.
    positions
        How a model knows the order of tokens: "learned" or "sinusoidal" vectors added to the
        embeddings, "rope" and "alibi" inside attention, or "none".
    rope
        Rotary positions, for positions "rope".
    norm
        "layernorm", or "rmsnorm" (Zhang and Sennrich 2019).
    norm_position
        "pre" normalises what a sublayer reads, "post" the residual stream after it.
    norm_eps
        Added to the variance.
    bias
        Whether linear layers and norms have biases.
    activation
        Of the MLP: GELU by GPT-2's tanh formula or exact, ReLU, its square, or a product with a
        gate: "swiglu", "geglu" (Shazeer 2020).
    qk_norm
        Whether queries and keys of each head are normalised (Dehghani et al. 2023).
    attention_soft_cap
        Bounds attention scores: soft_cap * tanh(score / soft_cap); None does not.
    window
        Tokens that attention looks back, the own one included; None is all.
    global_every
        Every this many-th block looks back over everything in spite of window; None is no block.
    latent
        Latent attention (MLA).
    sparse
        Sparse attention (DSA).
    experts
        Mixture of experts.
    parallel_block
        Whether attention and MLP read the same norm and add to the stream together (GPT-J).
    layer_scale
        Initial value of a factor for each feature that a sublayer adds (Touvron et al. 2021,
        "CaiT"); None has no factors.
    dropout
        Probability of dropping a feature of a sublayer's output while training.
    embedding_dropout
        The same for embeddings; None is dropout.
    attention_dropout
        Probability of dropping an attention weight while training.
    init_std
        Standard deviation of initial weights; those that write to the residual stream have
        init_std / sqrt(2 * n_layer).
    mup_base
        Width (d_model) that learning rate and init_std were tuned at; widths beyond it are scaled
        so that they stay right (Yang et al. 2022, "Tensor Programs V"). None is no muP.
    scan_layers
        Whether blocks run as a compiled loop, which compiles fast, or unrolled; same parameters.
        None unrolls up to 24 blocks on GPUs and, without remat and from d_model 128, up to 4 on
        CPUs.
    remat
        What the backward pass computes again to save memory: "none", "full" (all of a block),
        "attention" (all but attention's output), "dots" (all but matrix products).
    remat_every
        Blocks that are computed again together: more need less memory for their inputs.
    dtype
        Floating-point type of the computation; parameters, norms, softmax and logits are float32.
    float8
        Whether the products of attention's projections and of the MLP take 8-bit floats (e4m3, for
        gradients e5m2), scaled by the largest magnitude of each operand; all else has `dtype`.
    attention_implementation
        Name of an implementation of tjx_kernels; None picks by platform.
    check_ids
        Whether token ids and positions outside their tables raise inside `jax.jit` too, for
        debugging: each step then calls the host. Without it compiled code clips them silently.

    Raises
    ------
    ValueError
        Naming every field that is wrong, one a line.
    """

    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    d_model: int = 768
    d_head: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 1024
    positions: Positions = "learned"
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm: Norm = "layernorm"
    norm_position: NormPosition = "pre"
    norm_eps: float = 1e-5
    bias: bool = True
    activation: Activation = "gelu_tanh"
    qk_norm: bool = False
    attention_soft_cap: float | None = None
    window: int | None = None
    global_every: int | None = None
    latent: LatentConfig = field(default_factory=LatentConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    parallel_block: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    init_std: float = 0.02
    mup_base: int | None = None
    scan_layers: bool | None = None
    remat: Remat = "none"
    remat_every: int = 1
    dtype: Dtype = "float32"
    float8: bool = False
    attention_implementation: str | None = None
    check_ids: bool = False

    def __post_init__(self) -> None:
        """Report everything that is wrong at once."""
        raise_problems(self.validate())

    def validate(self) -> list[str]:
        """List what is wrong; a model's configuration adds its own."""
        sizes = check_sizes(
            self, "n_layer", "n_head", "n_kv_head", "d_model", "d_head", "d_ff", "max_seq_len",
            "window", "global_every", "mup_base", "remat_every",
        )  # fmt: skip
        choices = check_choices(
            self,
            positions=Positions, norm=Norm, norm_position=NormPosition, activation=Activation,
            remat=Remat, dtype=Dtype,
        )  # fmt: skip
        return [*sizes, *choices, *self._bad_numbers(), *([] if sizes else self._bad_heads())]

    def _bad_numbers(self) -> list[str]:
        problems = [
            f"{name} is {value!r}: give a probability from 0 to below 1"
            for name in ("dropout", "embedding_dropout", "attention_dropout")
            if (value := getattr(self, name)) is not None and not 0 <= value < 1
        ]
        positive = {"attention_soft_cap": 50, "layer_scale": 0.1, "init_std": 0.02}
        problems += [
            f"{name} is {value!r}: give a number above 0, such as {example}"
            for name, example in positive.items()
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if not 0 < self.norm_eps < 1:
            problems.append(f"norm_eps is {self.norm_eps!r}: give a number above 0, such as 1e-5")
        return problems

    def _bad_heads(self) -> list[str]:
        problems = []
        if self.d_head is None and self.d_model % self.n_head:
            near = max(1, round(self.d_model / self.n_head)) * self.n_head
            problems.append(
                f"d_model is {self.d_model} and n_head is {self.n_head}: "
                f"n_head must divide d_model; try d_model {near}, or give d_head"
            )
        if self.n_head % self.kv_heads:
            divisors = [k for k in range(1, min(self.n_head, 1024) + 1) if self.n_head % k == 0]
            problems.append(
                f"n_head is {self.n_head} and n_kv_head is {self.kv_heads}: "
                f"n_kv_head must divide n_head; try one of {divisors}"
            )
        rotary = self.positions == "rope" and self.latent.kv_dim is None
        if rotary and (self.rope.dim or self.head_dim) > self.head_dim:
            problems.append(
                f"rope.dim is {self.rope.dim} and a head has {self.head_dim} features: give at "
                f"most {self.head_dim}"
            )
        elif rotary and self.rope.dim is None and self.head_dim % 2:
            problems.append(f"a head has {self.head_dim} features: rope turns pairs, make it even")
        if self.latent.kv_dim is not None and self.n_kv_head not in (None, self.n_head):
            problems.append(
                f"n_kv_head is {self.n_kv_head} and latent.kv_dim is {self.latent.kv_dim}: latent "
                "attention has keys for every head; leave n_kv_head out"
            )
        if self.latent.kv_dim is not None and self.qk_norm:
            problems.append(
                "qk_norm is True and latent.kv_dim is given: latent attention has norms of its "
                "own; leave qk_norm out"
            )
        if self.sparse.top_k is not None and self.attention_implementation is not None:
            problems.append(
                f"attention_implementation is {self.attention_implementation!r} and sparse.top_k "
                f"is {self.sparse.top_k}: sparse attention has one implementation; leave it out"
            )
        if self.float8 and self.experts.count:
            problems.append(
                f"float8 is True and experts.count is {self.experts.count}: got experts, whose "
                "products have no 8-bit form; expected none; set float8 to False"
            )
        if self.parallel_block and self.norm_position == "post":
            problems.append("parallel_block needs norm_position 'pre'")
        if self.experts.count and self.experts.first_layer >= self.n_layer:
            problems.append(
                f"experts.first_layer is {self.experts.first_layer} and n_layer is {self.n_layer}: "
                f"give at most {self.n_layer - 1}"
            )
        return problems

    @property
    def head_dim(self) -> int:
        """Features of one head, `d_head` resolved."""
        return self.d_model // self.n_head if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `n_kv_head` resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def v_dim(self) -> int:
        """Features of a head's values: `head_dim`, or what latent attention says."""
        latent = self.latent
        return self.head_dim if latent.kv_dim is None else latent.v_dim or self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its hidden layer with a gate."""
        return self.activation in ("swiglu", "geglu")

    @property
    def ff_dim(self) -> int:
        """Width of the MLP's hidden layer, `d_ff` resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 64) * 64 if self.gated else 4 * self.d_model

    @property
    def expert_dim(self) -> int:
        """Width of an expert's hidden layer, `experts.d_ff` resolved."""
        return self.experts.d_ff or self.ff_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each block."""
        every = self.global_every
        return tuple(
            None if every is not None and (layer + 1) % every == 0 else self.window
            for layer in range(self.n_layer)
        )

    def pipeline_problems(self, parts: int) -> list[str]:
        """Say why the blocks cannot be taken in so many equal parts, if they cannot."""
        if self.n_layer % parts:
            return [
                f"n_layer is {self.n_layer} and a pipeline wants {parts} equal parts: give another "
                "n_layer, or fewer parts"
            ]
        if self.n_dense_layer:
            return [
                f"experts.first_layer is {self.n_dense_layer}: a pipeline wants blocks that are "
                "all of one kind; give 0"
            ]
        length = self.n_layer // parts
        if self.windows != self.windows[:length] * parts:
            return [
                f"global_every is {self.global_every}: a pipeline of {parts} parts wants each "
                f"{length} blocks to have the same windows; give a divisor of {length}"
            ]
        return []

    @property
    def n_dense_layer(self) -> int:
        """Number of blocks that have an MLP before those that have experts; 0 without experts."""
        return self.experts.first_layer if self.experts.count else 0

    @property
    def drops(self) -> bool:
        """Whether training drops anything, so that it needs a key."""
        return any((self.dropout, self.embedding_dropout, self.attention_dropout))

    @property
    def width_multiplier(self) -> float:
        """How much wider than muP's base the model is; 1 without muP."""
        return 1.0 if self.mup_base is None else self.d_model / self.mup_base
