"""Base configuration of all models: sizes, layer types, training and execution options.

Importing it needs only the standard library.
"""

from dataclasses import dataclass, field
from typing import Literal

from tjx_nn.config_checks import field_problems, number_problems
from tjx_nn.problems import Problem, raise_problems
from tjx_nn.sub_configs import (
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    check_choices,
    check_sizes,
)

Norm = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post", "output", "sandwich"]
ParallelNorm = Literal["shared", "separate"]
QKNormFeatures = Literal["head", "all"]
QKNormPosition = Literal["before_rope", "after_rope"]
Positions = Literal["learned", "sinusoidal", "rope", "alibi", "none"]
Activation = Literal[
    "gelu_tanh", "gelu_erf", "relu", "relu2", "swiglu", "geglu", "geglu_erf", "clamped_swiglu"
]  # fmt: skip
Remat = Literal["none", "full", "attention", "dots"]
Dtype = Literal["float32", "bfloat16", "float16"]
KVCacheDtype = Literal["model", "int8"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Configuration fields that all models share; subclasses add those of a model.

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
        Position encoding: "learned" or "sinusoidal" embeddings, "rope" or "alibi" in attention, or
        "none".
    rope
        Rotary position embeddings, for positions "rope".
    norm
        "layernorm", or "rmsnorm" (Zhang and Sennrich 2019).
    norm_position
        "pre" normalizes the input of a sublayer, "post" the residual stream after it, "output" the
        output of a sublayer (OLMo 2), "sandwich" its input and its output (Gemma 2).
    norm_eps
        Added to the variance.
    first_norm
        Whether the first block normalizes the input of its attention; False reads the embeddings
        as they are, which BERT models have normalized (ModernBERT).
    norm_unit_offset
        Whether the scale of an RMSNorm is 1 plus its parameter, which starts at 0 (Gemma).
    bias
        Whether linear layers and norms have biases.
    qkv_bias
        Whether the projections to queries, keys and values (and their latents) have biases; None
        is bias.
    activation
        Activation of the MLP: GELU (tanh approximation or exact), ReLU, squared ReLU, or gated:
        "swiglu", "geglu" (Shazeer 2020), "geglu_erf" with the exact GELU (ModernBERT),
        "clamped_swiglu" (gpt-oss, OpenAI 2025).
    swiglu_limit
        Bound of the inputs of "clamped_swiglu": of the gate from above, of the other on both sides.
    qk_norm
        Whether to normalize queries and keys (Dehghani et al. 2023).
    qk_norm_features
        Features that qk_norm normalizes together: those of a "head", or "all" (OLMo 2).
    qk_norm_position
        "before_rope", or "after_rope": rotated queries and keys are divided by their root mean
        square, without a trainable scale and only in blocks with rotary embeddings (Llama 4).
    attention_scale
        Factor of attention scores; None is 1 / sqrt(d_head), or 8 / d_head with muP.
    attention_soft_cap
        Bound of attention scores, soft_cap * tanh(score / soft_cap); None is unbounded.
    attention_sinks
        Whether each head has a trainable logit, 0 at first, that joins the denominator of the
        softmax (gpt-oss; Xiao et al. 2023, "Attention Sinks").
    attention_gate
        Number of first input features of a layer from which the gate of each head's output is
        computed, 2 * sigmoid(x @ kernel), 1 at first (Qiu et al. 2025, "Gated Attention for Large
        Language Models"); None has no gate.
    window
        Size of the sliding window of attention in tokens, the token itself included; None is
        unlimited.
    symmetric_window
        Whether the window of bidirectional attention ends as many tokens after the token as it
        starts before; otherwise all later tokens are visible.
    chunked_window
        Whether the window is a chunk: a token attends only to tokens of its own chunk of `window`
        consecutive positions, from the start of its document (Llama 4).
    global_every
        Every global_every-th block ignores the window; None is no block.
    global_first
        Whether the first of every global_every blocks ignores the window, not the last.
    nope_every
        Every nope_every-th block has no rotary embeddings and ignores the window (NoPE, Kazemnejad
        et al. 2023; SmolLM3); None is no block.
    nope_temperature
        Scale of queries by their position in blocks without rotary embeddings: the query at
        position p is multiplied by 1 + nope_temperature * log(1 + (p + 1) //
        nope_temperature_length) (Nakanishi 2025, "Scalable-Softmax"; Llama 4).
    nope_temperature_length
        Number of positions with the same scale, tokens.
    latent
        Latent attention (MLA).
    sparse
        Sparse attention (DSA, or top-k).
    experts
        Mixture of experts.
    parallel_block
        Whether attention and MLP read the same residual stream and are added in parallel (GPT-J).
    parallel_norm
        Whether attention and MLP of a parallel block have one norm, "shared", or each its own,
        "separate" (GPT-NeoX).
    residual_scale
        Factor of the output of each sublayer in the residual stream (Granite).
    layer_scale
        Initial value of a trainable scale of each sublayer's output features (Touvron et al. 2021,
        "CaiT"); None has no scale.
    dropout
        Dropout rate of the output of sublayers.
    embedding_dropout
        Dropout rate of embeddings; None is dropout.
    attention_dropout
        Dropout rate of attention weights.
    z_loss
        Weight of the squared log-sum-exp of a label's logits in the training objective, such as
        1e-4 (Chowdhery et al. 2022, "PaLM", section 5); evaluations omit it. 0 has none.
    init_std
        Standard deviation of initial weights; projections to the residual stream use
        init_std / sqrt(2 * n_layer), with mup_base_depth as n_layer if it is set.
    zero_init_residual
        Whether projections to the residual stream start at 0 instead (Zhang et al. 2019, "Fixup").
    mup_base
        Base width (d_model) of muP, at which learning rate and init_std were tuned (Yang et al.
        2022, "Tensor Programs V"). None disables muP.
    mup_base_depth
        Base depth (n_layer) of CompleteP, at which the optimizer's values were tuned (Dey et al.
        2025): sublayers are scaled by base / n_layer. None disables it.
    scan_layers
        Whether blocks run in a scan, which compiles fast, or unrolled; same parameters. None
        unrolls up to 24 blocks on GPUs, up to 12 on CPUs (without remat, d_model >= 128), and scans
        otherwise.
    remat
        Rematerialization in the backward pass: "none", "full" (whole blocks), "attention" (all but
        the attention output), "dots" (all but matrix products).
    remat_every
        Blocks of a rematerialized region; larger regions save fewer block inputs.
    dtype
        Dtype of the computation; parameters, norms, softmax and logits are float32.
    kv_cache_dtype
        Dtype of the keys and values that generation caches: that of the "model", or "int8" with a
        scale for each token and head.
    float8
        Whether attention projections and the MLP multiply in FP8 (e4m3, gradients e5m2), with
        per-tensor dynamic scaling.
    attention_implementation
        Attention implementation of tjx_kernels; None selects by platform.
    check_ids
        Whether out-of-range token ids and positions raise inside of `jax.jit` too, by a host
        callback in each step (for debugging). Otherwise compiled code clips them.

    Raises
    ------
    ValueError
        With a line for each invalid field.
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
    first_norm: bool = True
    norm_unit_offset: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    activation: Activation = "gelu_tanh"
    swiglu_limit: float = 7.0
    qk_norm: bool = False
    qk_norm_features: QKNormFeatures = "head"
    qk_norm_position: QKNormPosition = "before_rope"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    attention_gate: int | None = None
    window: int | None = None
    symmetric_window: bool = False
    chunked_window: bool = False
    global_every: int | None = None
    global_first: bool = False
    nope_every: int | None = None
    nope_temperature: float = 0.0
    nope_temperature_length: int = 8192
    latent: LatentConfig = field(default_factory=LatentConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    parallel_block: bool = False
    parallel_norm: ParallelNorm = "shared"
    residual_scale: float = 1.0
    layer_scale: float | None = None
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    z_loss: float = 0.0
    init_std: float = 0.02
    zero_init_residual: bool = False
    mup_base: int | None = None
    mup_base_depth: int | None = None
    scan_layers: bool | None = None
    remat: Remat = "none"
    remat_every: int = 1
    dtype: Dtype = "float32"
    kv_cache_dtype: KVCacheDtype = "model"
    float8: bool = False
    attention_implementation: str | None = None
    check_ids: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError with all errors of `validate`."""
        raise_problems(self.validate())

    def validate(self) -> list[Problem]:
        """Return the errors of this configuration; subclasses extend it."""
        sizes = check_sizes(
            self, "n_layer", "n_head", "n_kv_head", "d_model", "d_head", "d_ff", "max_seq_len",
            "window", "global_every", "nope_every", "nope_temperature_length", "mup_base",
            "mup_base_depth", "remat_every", "attention_gate",
        )  # fmt: skip
        choices = check_choices(
            self,
            positions=Positions, norm=Norm, norm_position=NormPosition, activation=Activation,
            remat=Remat, dtype=Dtype, parallel_norm=ParallelNorm, qk_norm_features=QKNormFeatures,
            qk_norm_position=QKNormPosition, kv_cache_dtype=KVCacheDtype,
        )  # fmt: skip
        problems = [*sizes, *choices, *number_problems(self)]
        return problems if sizes else [*problems, *field_problems(self)]

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
        """Features of a head's values: `head_dim`, or `latent.v_dim` of latent attention."""
        latent = self.latent
        return self.head_dim if latent.kv_dim is None else latent.v_dim or self.head_dim

    @property
    def embedding_dropout_rate(self) -> float:
        """Dropout rate of embeddings, `embedding_dropout` resolved."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases, `qkv_bias` resolved."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_final_norm(self) -> bool:
        """Whether the output of the last block is normalized once more."""
        return self.norm_position != "post"

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated."""
        return self.activation in ("swiglu", "geglu", "geglu_erf", "clamped_swiglu")

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
        """Attention window of each block; `max_seq_len` for a block without rotary embeddings."""

        def window(number: int) -> int | None:
            if self.nope_every is not None and number % self.nope_every == 0:
                return self.max_seq_len
            every = self.global_every
            is_global = every is not None and (number - self.global_first) % every == 0
            return None if is_global else self.window

        return tuple(window(number) for number in range(1, self.n_layer + 1))

    def block_rope(self, window: int | None) -> RopeConfig | None:
        """Return the rotary embeddings of a block with positions "rope"; None if it has none.

        Parameters
        ----------
        window
            Window of the block in tokens, an element of `windows`.

        Returns
        -------
        RopeConfig or None
            `rope`, with `local_base` as its base in a block with a window, and the factors of
            `max_seq_len`.
        """
        no_rope = self.nope_every is not None and window == self.max_seq_len
        return None if no_rope else self.rope.of_window(window).of_length(self.max_seq_len)

    @property
    def longest_seq_len(self) -> int:
        """Largest `max_seq_len` for the parameters of this model: "longrope" can extend it."""
        if self.positions != "rope" or self.rope.scaling != "longrope":
            return self.max_seq_len
        assert self.rope.original_seq_len is not None
        return max(self.max_seq_len, round(self.rope.factor * self.rope.original_seq_len))

    @property
    def stack_windows(self) -> tuple[tuple[int | None, ...], ...]:
        """Attention windows of the first `n_leading_layer` blocks, and of the others.

        With `experts.every` the windows of the blocks before each one with experts, and its own.
        """
        every, windows = self.experts.every, self.windows
        if self.experts.count and every > 1:
            ends = range(every, self.n_layer + 1, every)
            pairs = [(windows[end - every : end - 1], windows[end - 1 : end]) for end in ends]
            return tuple(part for pair in pairs for part in pair)
        leading = self.n_leading_layer
        return windows[:leading], windows[leading:]

    def block_number(self, index: int, *, leading: bool) -> int:
        """Return which block of the model a block of a stack is, counted from 0.

        Parameters
        ----------
        index
            Index of the block in its stack.
        leading
            Whether it is the stack of `n_leading_layer` blocks.

        Returns
        -------
        int
            Number of the block.
        """
        every = self.experts.every
        if not self.experts.count or every == 1:
            return index if leading else self.n_leading_layer + index
        return index + index // (every - 1) if leading else (index + 1) * every - 1

    def pipeline_problems(self, stages: int) -> list[str]:
        """Return why the blocks cannot be split into equal pipeline stages, if they cannot.

        Parameters
        ----------
        stages
            Number of stages.

        Returns
        -------
        list of str
            A line for each reason; empty if the blocks can be split.
        """
        if self.n_layer % stages:
            return [
                f"n_layer: got {self.n_layer}; expected a multiple of {stages} pipeline stages; "
                "change n_layer or the number of stages"
            ]
        if self.n_leading_layer:
            got = "first_norm: got False; expected True"
            if self.experts.count and self.experts.every > 1:
                got = f"experts.every: got {self.experts.every}; expected 1"
            elif self.experts.count:
                got = f"experts.first_layer: got {self.n_leading_layer}; expected 0"
            return [f"{got}, as all blocks of a pipeline have the same layers"]
        length = self.n_layer // stages
        if self.windows != self.windows[:length] * stages:
            return [
                f"global_every: got {self.global_every} and nope_every {self.nope_every}; expected "
                f"divisors of {length}, as all {stages} pipeline stages have the same windows"
            ]
        return []

    @property
    def n_leading_layer(self) -> int:
        """Number of blocks in a stack of their own, whose layers differ from the others.

        Blocks with an MLP before or between those with experts, or one without `first_norm`.
        """
        if not self.experts.count:
            return int(not self.first_norm)
        if self.experts.every > 1:
            return self.n_layer - self.n_layer // self.experts.every
        return self.experts.first_layer

    @property
    def drops(self) -> bool:
        """Whether any dropout rate is positive, so that training needs a PRNG key."""
        return any((self.dropout, self.embedding_dropout, self.attention_dropout))

    @property
    def width_multiplier(self) -> float:
        """Ratio of the width to the base width of muP; 1 without muP."""
        return 1.0 if self.mup_base is None else self.d_model / self.mup_base

    @property
    def depth_multiplier(self) -> float:
        """Ratio of the depth to the base depth of CompleteP; 1 without it."""
        return 1.0 if self.mup_base_depth is None else self.n_layer / self.mup_base_depth
