"""Parameter counts, training FLOPs and cache sizes of models.

Counts and FLOPs are formulas, which need no JAX.

Models of other configuration classes (`tjx_nn.register`) are counted from their parameter shapes.

Names: d is d_model, h head_dim, n and k the numbers of query and key heads.
"""

import math
from typing import Any

from tjx_nn.config import TransformerConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig

_BUILT_IN = (GPTConfig, BertConfig, ViTConfig, EncoderDecoderConfig)


def count_params(config: TransformerConfig) -> int:
    """Count the parameters of a model; a tied embedding counts once.

    Parameters
    ----------
    config
        Configuration of the model.

    Returns
    -------
    int
        Number of parameters.

    Examples
    --------
    >>> count_params(GPTConfig.preset("gpt2_small"))
    124439808
    >>> count_params(ViTConfig.preset("vit_base"))
    86567656
    """
    if type(config) not in _BUILT_IN:
        return sum(math.prod(shape) for shape in _param_shapes(config))
    return _not_multiplied(config) + _multiplied(config, config.experts.count)


def cache_bytes(config: GPTConfig, tokens: int) -> int:
    """Compute the size of the KV cache of one sequence, from the shapes that `generate` uses.

    Parameters
    ----------
    config
        Configuration of a decoder, whose `dtype` and `kv_cache_dtype` give that of the cache.
    tokens
        Length of the sequence [tokens]. Blocks with a window keep that many tokens.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> cache_bytes(GPTConfig.preset("gpt2_small"), 1024) == 2 * 12 * 768 * 4 * 1024
    True
    """
    import jax
    import jax.numpy as jnp

    from tjx_nn.attention.kv_cache import cache_slots, quantize_cache
    from tjx_nn.binding import bind
    from tjx_nn.functional import init

    def entries() -> list[Any]:
        model = bind(config, init(config, jax.random.key(0)))
        cache: list[Any] = model.prefill(model.unstacked_blocks(), jnp.zeros((1, 1), jnp.int32))[1]
        return [quantize_cache(x) for x in cache] if config.kv_cache_dtype == "int8" else cache

    per_token = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(block))
        for block in jax.eval_shape(entries)
    ]
    return sum(
        size * slots for size, slots in zip(per_token, cache_slots(config, tokens), strict=True)
    )


def flops_per_token(config: TransformerConfig, seq_len: int) -> int:
    """Compute the FLOPs of training on one token, forward and backward.

    6 for each parameter in a matrix product with the token (including the head and the token's
    experts, excluding embedding lookups), plus for attention 6 for each query and value feature,
    head and visible token, without subtracting the causal mask. For GPT-2 this is
    ``6 * N + 12 * n_layer * seq_len * d_model``, the usual convention of MFU (Chowdhery et al.
    2022, "PaLM", appendix B). Work that is done twice counts once: remat, and the values of the
    first block with `value_mix`. The head counts twice with `multi_token_loss`.

    A model of another configuration class counts 6 for each parameter of two or more axes. BERT
    counts masked language modeling; ViT the FLOPs of an image divided by its tokens; an
    encoder-decoder one target token and one source token.

    Parameters
    ----------
    config
        Configuration of the model.
    seq_len
        Sequence length in tokens; of an encoder-decoder, of source and target each; of ViT,
        `max_seq_len`.

    Returns
    -------
    int
        FLOPs.

    Raises
    ------
    ValueError
        If `seq_len` of an image model differs from its number of tokens.

    Examples
    --------
    >>> flops_per_token(GPTConfig.preset("gpt2_small"), 1024)
    855166464
    """
    if type(config) not in _BUILT_IN:
        return 6 * sum(math.prod(shape) for shape in _param_shapes(config) if len(shape) > 1)
    met = _multiplied(config, config.experts.per_token)
    causal = isinstance(config, GPTConfig | EncoderDecoderConfig)
    windows = config.windows
    if isinstance(config, GPTConfig) and config.multi_token_loss:
        windows += windows[-1:]
        met += config.vocab_rows * config.d_model
    attention = sum(_attention_flops(config, seq_len, window, causal=causal) for window in windows)
    if isinstance(config, EncoderDecoderConfig):
        encoder = config.encoder
        attention += sum(_attention_flops(encoder, seq_len, window) for window in encoder.windows)
        attention += config.n_layer * _attention_flops(config.cross, seq_len, None)
    if isinstance(config, ViTConfig):
        if seq_len != config.max_seq_len:
            raise ValueError(
                f"seq_len: got {seq_len}; expected {config.max_seq_len}, the number of tokens of "
                "an image"
            )
        return (6 * met * seq_len - _not_of_image(config)) // seq_len + attention
    return 6 * met + attention


def _param_shapes(config: TransformerConfig) -> list[tuple[int, ...]]:
    from tjx_nn.binding import param_shapes  # imports JAX

    return list(param_shapes(config).values())


def _not_multiplied(config: TransformerConfig) -> int:
    """Count the parameters outside of matrix products: lookup tables and unused heads."""
    d = config.d_model
    positions = config.max_seq_len * d if config.positions == "learned" else 0
    match config:
        case GPTConfig():
            mixes = config.embedding_skip + (config.value_mix != "none")
            tables = (0 if config.tied_head else d) + (
                config.kv_heads * config.head_dim if config.value_mix == "embedding" else 0
            )
            return positions + 2 * config.n_layer * mixes + config.vocab_rows * tables
        case BertConfig():
            types, classes = config.n_token_types * d, config.n_classes
            pooler = 0 if classes is None else _linear(config, d, d) + _linear(config, d, classes)
            return positions + types + pooler
        case ViTConfig():
            if config.positions == "learned":
                positions -= config.n_registers * d
            return positions + (config.n_prefix + config.mask_token + (config.pool == "map")) * d
        case EncoderDecoderConfig():
            tables = (0 if config.tied_head else config.vocab_size) + (
                config.source_vocab_size or 0
            )
            biases = 2 * (config.relative_buckets or 0) * config.n_head
            return 2 * positions + tables * d + biases
    raise AssertionError(type(config))


def _multiplied(config: TransformerConfig, experts: int) -> int:
    """Count the parameters of matrix products and norms, with `experts` experts in a MoE block."""
    d, norm = config.d_model, _norm(config, config.d_model)
    blocks = _blocks(config, experts) + (norm if config.has_final_norm else 0)
    match config:
        case GPTConfig():
            blocks += _multi_token(config) if config.multi_token_loss else 0
            return blocks + config.vocab_rows * d
        case BertConfig():
            bias = config.vocab_size if config.has_logit_bias else 0
            return blocks + 2 * norm + _linear(config, d, d) + config.vocab_size * d + bias
        case ViTConfig():
            pool = _attention_pool(config) if config.pool == "map" else 0
            return blocks + _patch(config) + pool + _head(config)
        case EncoderDecoderConfig():
            encoder = _blocks(config.encoder, experts)
            encoder += norm if config.has_final_norm else 0
            cross = _attention(config.cross) + norm + (0 if config.layer_scale is None else d)
            norms = 2 * norm if config.embedding_norm else 0
            bias = config.vocab_size if config.logit_bias else 0
            return blocks + encoder + config.n_layer * cross + norms + config.vocab_size * d + bias
    raise AssertionError(type(config))


def _patch(config: ViTConfig) -> int:
    return _linear(config, config.patch_size**2 * config.channels, config.d_model)


def _head(config: ViTConfig) -> int:
    return 0 if config.n_classes is None else _linear(config, config.pooled_dim, config.n_classes)


def _attention_pool(config: ViTConfig) -> int:
    norm = _norm(config, config.d_model)
    return _attention(config.probe) + norm + _mlp(config, config.ff_dim)


def _not_of_image(config: ViTConfig) -> int:
    """Count the FLOPs of tokens that layers outside of the blocks do not see, of an image."""
    rows, columns = config.patches
    missed = _patch(config) * config.n_prefix + _head(config) * (config.max_seq_len - 1)
    if config.pool != "map":
        return 6 * missed
    # The probe attends to the patches: only their keys and values are computed for each of them.
    keys = 2 * config.d_model * config.kv_heads * config.head_dim
    keys += 2 * config.kv_heads * config.head_dim if config.has_qkv_bias else 0
    missed += (_attention_pool(config) - keys) * (config.max_seq_len - 1) + keys * config.n_prefix
    return 6 * missed - _attention_flops(config.probe, rows * columns, None)


def _blocks(config: TransformerConfig, experts: int) -> int:
    """Count the parameters of all blocks, with `experts` experts in each MoE block."""
    dense = config.n_leading_layer if config.experts.count else config.n_layer
    first = 0 if config.first_norm else _norm(config, config.d_model)
    return (
        config.n_layer * _without_mlp(config)
        - first
        + dense * _mlp(config, config.ff_dim)
        + (config.n_layer - dense) * _experts(config, experts)
    )


def _without_mlp(config: TransformerConfig) -> int:
    """Count the parameters of a block without those of its MLP or experts."""
    shared = config.parallel_block and config.parallel_norm == "shared"
    per_block = 4 if config.norm_position == "sandwich" else 1 if shared else 2
    norms = per_block * _norm(config, config.d_model)
    scales = 0 if config.layer_scale is None else 2 * config.d_model
    return norms + scales + _attention(config)


def _multi_token(config: GPTConfig) -> int:
    d, norms = config.d_model, 2 + config.has_final_norm
    block = _without_mlp(config) + _mlp(config, config.ff_dim)
    return block + norms * _norm(config, d) + _linear(config, 2 * d, d)


def _attention(config: TransformerConfig) -> int:
    d, h, n, k = config.d_model, config.head_dim, config.n_head, config.kv_heads
    if config.latent.kv_dim is not None:
        return _latent_attention(config, config.latent.kv_dim) + _indexer(config)
    kernels = d * (n + 2 * k) * h + _linear(config, n * h, d)
    kernels += (n + 2 * k) * h if config.has_qkv_bias else 0
    normalized = (n * h, k * h) if config.qk_norm_features == "all" else (h, h)
    trained = config.qk_norm and config.qk_norm_position == "before_rope"
    norms = sum(_norm(config, features) for features in normalized) if trained else 0
    sinks = n if config.attention_sinks else 0
    gates = n * (config.attention_gate or 0)
    return kernels + norms + sinks + gates + _indexer(config)


def _latent_attention(config: TransformerConfig, kv_dim: int) -> int:
    latent, d, n = config.latent, config.d_model, config.n_head
    query_dim, up_dim = (
        n * (config.head_dim + latent.rope_dim),
        n * (config.head_dim + config.v_dim),
    )
    shapes = [(d, kv_dim + latent.rope_dim), (kv_dim, up_dim)]
    if latent.q_dim is None:
        shapes.append((d, query_dim))
    else:
        shapes += [(d, latent.q_dim), (latent.q_dim, query_dim)]
    kernels = sum((fan_in + config.has_qkv_bias) * fan_out for fan_in, fan_out in shapes)
    normalized = (kv_dim, latent.q_dim or 0) if latent.use_norm else ()
    norms = sum(_norm(config, features) for features in normalized)
    return kernels + norms + _linear(config, n * config.v_dim, d)


def _indexer(config: TransformerConfig) -> int:
    sparse = config.sparse
    if sparse.top_k is None or not sparse.indexer:
        return 0
    features = sparse.n_head * sparse.head_dim + sparse.head_dim + sparse.n_head
    return config.d_model * features + _norm(config, sparse.head_dim)


def _mlp(config: TransformerConfig, d_ff: int) -> int:
    ups = 2 if config.gated else 1
    return ups * _linear(config, config.d_model, d_ff) + _linear(config, d_ff, config.d_model)


def _experts(config: TransformerConfig, count: int) -> int:
    experts, d = config.experts, config.d_model
    ups, f = 2 if config.gated else 1, config.expert_dim
    router = (d + experts.choice_bias + experts.use_bias) * experts.count
    biases = ups * f + d if experts.use_bias else 0
    routed = router + count * ((ups + 1) * d * f + biases)
    shared = _mlp(config, experts.shared * config.expert_dim) if experts.shared else 0
    return routed + shared


def _linear(config: TransformerConfig, fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + (fan_out if config.bias else 0)


def _norm(config: TransformerConfig, features: int) -> int:
    return features * (2 if config.bias and config.norm == "layernorm" else 1)


def _attention_flops(
    config: TransformerConfig, seq_len: int, window: int | None, *, causal: bool = False
) -> int:
    reach = window or seq_len
    if window is not None and config.symmetric_window and not causal:
        reach = 2 * reach - 1
    sparse, seen = config.sparse, min(seq_len, reach)
    selected = min(seen, sparse.top_k or seen)
    query_dim = config.head_dim
    if config.latent.kv_dim is not None:
        query_dim += config.latent.rope_dim
    if sparse.top_k is not None and sparse.indexer:
        scores = sparse.n_head * sparse.head_dim * seen + config.n_head * query_dim * selected
    else:
        scores = config.n_head * query_dim * seen
    return 6 * (scores + config.n_head * config.v_dim * selected)
