"""Parameter counts and FLOPs: published numbers, formulas, XLA cost analysis and shapes."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import (
    BertConfig,
    EncoderDecoderConfig,
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    SparseConfig,
    TransformerConfig,
    ViTConfig,
    bind,
    count_params,
    flops_per_token,
    init,
)

PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}
SMALL: dict[str, Any] = {"vocab_size": 7, "max_seq_len": 5, "n_head": 4, "d_model": 8}
VARIANTS = {
    "grouped queries": GPTConfig(**SMALL, n_layer=3, n_kv_head=2, d_ff=20),
    "one key, no biases": GPTConfig(**SMALL, n_layer=1, n_kv_head=1, bias=False),
    "a head of its own": GPTConfig(
        **SMALL, n_layer=2, tied_head=False, vocab_multiple=4, layer_scale=0.1, qk_norm=True,
        positions="sinusoidal", parallel_block=True, activation="geglu", attention_gate=3,
        embedding_skip=True, value_mix="embedding", multi_token_loss=0.1,
    ),
    "llama": GPTConfig.preset("llama_small"),
    "sparse, a dense block, experts": GPTConfig(
        **SMALL, n_layer=3, norm_position="post", sparse=SparseConfig(top_k=2, head_dim=6),
        experts=ExpertsConfig(count=3, shared=2, d_ff=5, first_layer=1, choice_bias=True),
        multi_token_loss=0.1, d_ff=12,
    ),
    "deepseek": GPTConfig.preset("deepseek_small"),
    "sinks, experts with biases": GPTConfig(
        **SMALL, n_layer=2, attention_sinks=True, activation="clamped_swiglu",
        experts=ExpertsConfig(count=3, d_ff=5, use_bias=True),
    ),
    "experts in every other block, a norm without a scale": GPTConfig(
        **SMALL, n_layer=4, d_head=2, positions="rope", qk_norm=True, qk_norm_position="after_rope",
        experts=ExpertsConfig(count=3, d_ff=5, shared=1, every=2),
    ),
    "no first norm, a bias of the head alone": BertConfig(
        **SMALL, n_layer=3, norm_position="pre", first_norm=False, bias=False, logit_bias=True,
    ),
    "experts of both stacks": EncoderDecoderConfig(
        **SMALL, n_layer=2, n_encoder_layer=3, layer_scale=0.1,
        experts=ExpertsConfig(count=3, first_layer=1), latent=LatentConfig(kv_dim=3, rope_dim=2),
    ),
}  # fmt: skip


def built_params(config: TransformerConfig) -> int:
    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = GPTConfig.preset(name)
    assert count_params(config) == PUBLISHED[name]
    assert built_params(config) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_formula_equals_the_parameters_of_every_variant(name: str) -> None:
    assert count_params(VARIANTS[name]) == built_params(VARIANTS[name])


def test_flops_of_a_model_counted_by_hand() -> None:
    config = GPTConfig(vocab_size=3, max_seq_len=4, n_layer=1, n_head=1, d_model=2, bias=False)
    matrices = 4 * 2 * 2 + 2 * 2 * 8 + 3 * 2  # attention, MLP, head
    norms = 3 * 2
    assert flops_per_token(config, 4) == 6 * (matrices + norms) + 12 * 1 * 4 * 2


def test_flops_of_a_symmetric_window_count_both_sides() -> None:
    one_sided = BertConfig(**{**SMALL, "max_seq_len": 32}, n_layer=3, window=5, global_every=3)
    symmetric = dataclasses.replace(one_sided, symmetric_window=True)
    added = flops_per_token(symmetric, 32) - flops_per_token(one_sided, 32)
    assert added == 2 * 12 * 4 * 8  # two local blocks, four more tokens, d_model features
    assert flops_per_token(symmetric, 6) - flops_per_token(one_sided, 6) == 2 * 12 * 8


# Wide enough for matrix products to dominate, long enough for attention to matter.
WIDE: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "d_model": 128, "scan_layers": False,
    "attention_implementation": "reference",  # recomputes nothing
}  # fmt: skip
LONG: dict[str, Any] = {**WIDE, "vocab_size": 90, "max_seq_len": 128}
LATENT = LatentConfig(kv_dim=32, q_dim=48, rope_dim=32, v_dim=16)
COSTLY: dict[str, TransformerConfig] = {
    "gpt": GPTConfig(**LONG),
    "llama": GPTConfig(
        **LONG, n_kv_head=1, positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
        d_ff=200, tied_head=False, value_mix="first_block", multi_token_loss=0.3,
    ),
    "latent": GPTConfig(**LONG, positions="rope", latent=LATENT),
    # All keys: the reference computes masked scores too.
    "sparse": GPTConfig(
        **{**LONG, "attention_implementation": None}, remat="none",
        sparse=SparseConfig(top_k=128, n_head=8, head_dim=64),
    ),
    "experts": GPTConfig(
        **LONG, experts=ExpertsConfig(count=4, shared=1, d_ff=100, capacity_factor=1.0)
    ),
    "bert": BertConfig(**LONG),
    "vit": ViTConfig(**WIDE, image_size=44, patch_size=4, channels=3, n_classes=50),
    "vit, registers": ViTConfig(
        **WIDE, image_size=44, patch_size=4, channels=3, n_classes=50, pool="class_mean",
        n_registers=4, mask_token=True,
    ),
    "vit, probe": ViTConfig(
        **WIDE, image_size=44, patch_size=4, channels=3, n_classes=50, pool="map"
    ),
    "encoder-decoder": EncoderDecoderConfig(**LONG, n_encoder_layer=1),
}  # fmt: skip


def shape(*sizes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)  # type: ignore[no-untyped-call]  # as jax is


@pytest.mark.parametrize("name", COSTLY)
def test_flops_equal_the_cost_analysis_of_xla(name: str) -> None:
    config: Any = COSTLY[name]
    text = shape(2, 128)
    data: tuple[Any, ...] = (text, text)
    if isinstance(config, ViTConfig):
        data = (shape(2, 44, 44, 3, dtype=np.float32), shape(2))
    if name == "encoder-decoder":
        data = (text, *data)

    @jax.jit
    def step(params: Any, data: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            found = bind(config, params).losses(*data)
            total: jax.Array = found.tokens.sum() + found.penalty
            return total

        return jax.grad(loss)(params)

    with jax.transfer_guard("allow"):
        params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        analysis = step.lower(params, data).cost_analysis()
    assert analysis is not None
    tokens = 2 * (config.max_seq_len if isinstance(config, ViTConfig) else 128)
    ratio = analysis["flops"] / (tokens * flops_per_token(config, tokens // 2))
    # No gradient flows to the input of the indexer: a third of the counted FLOPs.
    assert (0.95 if name == "sparse" else 1) <= ratio < 1.05, ratio
