"""Every option of a decoder trains and generates, and the list of variants is complete."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    bind,
    generate,
)
from tjx_nn.binding import Params
from tjx_nn.config_reference import config_table

SIZES: dict[str, Any] = {
    "vocab_size": 29, "max_seq_len": 32, "n_layer": 2, "n_head": 4, "d_model": 16,
}  # fmt: skip

VARIANTS: dict[str, GPTConfig] = {
    "GPT-2 with every dropout": GPTConfig(
        **SIZES, dropout=0.1, embedding_dropout=0.2, attention_dropout=0.1, first_norm=False,
        multi_token_loss=0.3,
    ),
    "Llama": GPTConfig(
        **SIZES, positions="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, bias=False,
        tied_head=False, qk_norm=True, vocab_multiple=8, norm_eps=1e-6, residual_scale=0.5,
        logit_scale=2.0,
        rope=RopeConfig(base=100.0, scaling="llama3", factor=2.0, original_seq_len=16),
    ),
    "windows, ALiBi, caps, one key head, parallel": GPTConfig(
        **{**SIZES, "n_layer": 3}, positions="alibi", activation="geglu_erf", n_kv_head=1, window=4,
        global_every=2, global_first=True, parallel_block=True, attention_soft_cap=20.0,
        logit_soft_cap=15.0, z_loss=1e-3,
    ),
    "post-norm, sinusoids, layer scale": GPTConfig(
        **SIZES, positions="sinusoidal", scale_embeddings=False, norm_position="post",
        activation="relu2",
        layer_scale=0.5, remat="full", remat_every=2, value_mix="embedding",
    ),
    "no positions, unrolled, 8-bit floats": GPTConfig(
        **SIZES, positions="none", activation="relu", scan_layers=False, remat="attention",
        dtype="bfloat16", float8=True,
        tokenizer_size=27, check_ids=True, kv_cache_dtype="int8",
    ),
    "pairs side by side, muP": GPTConfig(
        **SIZES, positions="rope", activation="gelu_erf", d_head=8, d_ff=24, init_std=0.1,
        mup_base=8, mup_base_depth=1, remat="dots", attention_implementation="reference",
        rope=RopeConfig(interleaved=True, scaling="linear", factor=2.0, dim=4),
        parallel_block=True, parallel_norm="separate",
    ),
    "Gemma 3": GPTConfig(
        **SIZES, positions="rope", norm="rmsnorm", norm_unit_offset=True, norm_position="sandwich",
        activation="geglu", bias=False, qk_norm=True, attention_scale=0.4, embedding_scale=4.0,
        window=4, global_every=2, rope=RopeConfig(base=1000.0, local_base=10.0),
        zero_init_residual=True, embedding_skip=True, value_mix="first_block",
    ),
    "OLMo 2 with biases of queries, blocks without positions": GPTConfig(
        **SIZES, positions="rope", norm="rmsnorm", norm_position="output", activation="swiglu",
        bias=False, qkv_bias=True, n_kv_head=2, qk_norm=True, qk_norm_features="all", window=4,
        nope_every=2, attention_gate=5,
        rope=RopeConfig(
            scaling="longrope", factor=2.0, original_seq_len=16, short_factors=(1.0, 1.5),
            long_factors=(2.0, 4.0),
        ),
    ),
    "gpt-oss": GPTConfig(
        **SIZES, positions="rope", norm="rmsnorm", activation="clamped_swiglu", swiglu_limit=2.0,
        n_kv_head=2, window=4, global_every=2, attention_sinks=True, tied_head=False,
        remat="attention", value_mix="first_block",
        experts=ExpertsConfig(count=4, d_ff=8, use_bias=True),
        sparse=SparseConfig(top_k=3, indexer=False),
        rope=RopeConfig(scaling="yarn", factor=2.0, original_seq_len=16, truncate=False),
    ),
    "Llama 4": GPTConfig(
        **{**SIZES, "n_layer": 4}, positions="rope", norm="rmsnorm", activation="swiglu",
        bias=False, n_kv_head=2, tied_head=False, qk_norm=True, qk_norm_position="after_rope",
        window=5, chunked_window=True, nope_every=4, nope_temperature=0.5,
        nope_temperature_length=3, d_ff=24, rope=RopeConfig(interleaved=True),
        experts=ExpertsConfig(
            count=4, per_token=1, shared=1, d_ff=8, every=2, scores="sigmoid", normalize=False,
            scale_inputs=True,
        ),
    ),
    "latent attention": GPTConfig(
        **SIZES, positions="rope",
        latent=LatentConfig(kv_dim=8, rope_dim=4, v_dim=6, rope_heads=2, use_norm=False),
        rope=RopeConfig(scaling="ntk", factor=2.0), dtype="bfloat16",
    ),
    "DeepSeek": GPTConfig(
        **SIZES, positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
        latent=LatentConfig(kv_dim=8, q_dim=12, rope_dim=4),
        sparse=SparseConfig(top_k=4, n_head=2, head_dim=4, loss=0.5),
        experts=ExpertsConfig(
            count=4, per_token=1, shared=1, d_ff=8, first_layer=1, scores="sigmoid",
            choice_bias=True, groups=4, groups_per_token=2, group_top_k=1, weight_scale=2.5,
        ),
        rope=RopeConfig(
            scaling="yarn", factor=2.0, original_seq_len=16, beta_fast=4.0, beta_slow=0.5,
            attention_factor=1.0,
        ),
    ),
    "experts and sparse attention": GPTConfig(
        **SIZES, sparse=SparseConfig(top_k=5, head_dim=4), dtype="float16",
        experts=ExpertsConfig(
            count=3, capacity_factor=None, normalize=False, balance_loss=0.1, z_loss=0.01
        ),
    ),
}  # fmt: skip
# Fields that are not an option of their own, or of encoders alone (tested in test_nn_bert.py).
LEFT_OUT = {"family", "low_freq_factor", "high_freq_factor", "symmetric_window"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_generates(
    name: str, make: Callable[..., Params], run: Callable[..., np.ndarray]
) -> None:
    config = VARIANTS[name]
    count = config.tokenizer_size or config.vocab_size
    tokens = np.random.default_rng(0).integers(0, count, (2, 17)).astype(np.int32)

    @jax.jit
    def train(params: Params, key: jax.Array, tokens: jax.Array) -> tuple[Params, jax.Array]:
        def loss(params: Params, key: jax.Array) -> jax.Array:
            found = bind(config, params).losses(
                tokens[:, :-1], tokens[:, 1:], dropout_key=key if config.drops else None
            )
            return found.tokens.mean() + found.penalty

        def step(params: Params, key: jax.Array) -> tuple[Params, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, key)
            moved = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradients)
            return moved, value

        return jax.lax.scan(step, params, jax.random.split(key, 20))

    with jax.transfer_guard("allow"):
        params, losses = jax.device_get(train(make(config), jax.random.key(0), tokens))
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean() - 0.1

    prompt, lengths = tokens[:, :6], np.array([6, 3], np.int32)
    params = jax.device_put(params)
    new, log_probs = jax.device_get(
        generate(config, params, prompt, lengths, max_new_tokens=8, return_log_probs=True)
    )
    assert new.shape == (2, 8)
    assert ((new >= 0) & (new < count)).all()
    # Decoding with a cache equals the forward pass.
    whole = np.zeros((2, 14), np.int32)
    for row, length in enumerate(lengths):
        whole[row, : length + 8] = [*prompt[row, :length], *new[row]]
    logits = run(config, params, whole).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    exact = config.dtype == "float32"
    for row, length in enumerate(lengths):
        steps = expected[row, length - 1 : length + 7]
        said = np.take_along_axis(steps, new[row][:, None], 1)[:, 0]
        np.testing.assert_allclose(log_probs[row], said, atol=1e-5 if exact else 0.1)
        np.testing.assert_allclose(said, steps.max(1), atol=1e-5 if exact else 0.1)


def fields_of(config: Any) -> dict[str, Any]:
    """Every value of a configuration and its nested configurations, by name."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        inner = fields_of(value) if dataclasses.is_dataclass(value) else {}
        found |= inner or {entry.name: value}
    return found


def hints_of(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for name in (entry.name for entry in dataclasses.fields(kind)):  # class variables have hints
        hint = hints[name]
        found |= hints_of(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def test_variants_cover_every_option() -> None:
    chosen = [fields_of(config) for config in VARIANTS.values()]
    plain = fields_of(GPTConfig())
    for name, hint in hints_of(GPTConfig).items():
        values = {each[name] for each in chosen}
        if get_origin(hint) is Literal:
            assert values == set(get_args(hint)), name
        elif name not in LEFT_OUT:
            assert values != {plain[name]}, name


def test_the_configuration_reference_is_current() -> None:
    reference = Path(__file__).parents[1] / "CONFIG.md"
    assert config_table() in reference.read_text(encoding="utf-8")
