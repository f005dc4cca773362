"""Gradients of whole models against finite differences in float64."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import tjx_nn.config
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
)
from tjx_nn.binding import Params

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "d_model": 16}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 19, "max_seq_len": 12}
LLAMA: dict[str, Any] = {
    "n_kv_head": 2, "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
}  # fmt: skip
MODELS: dict[str, TransformerConfig] = {
    "gpt": GPTConfig(
        **TEXT, **LLAMA, tied_head=False, qk_norm=True, layer_scale=0.5, window=5, remat="full",
        attention_soft_cap=3.0, logit_soft_cap=5.0, attention_gate=6, embedding_skip=True,
        value_mix="first_block", multi_token_loss=0.7,
    ),
    # A small step does not change the selected keys; the indexer loss reaches only the indexer.
    "deepseek": GPTConfig(
        **TEXT, positions="rope", norm="rmsnorm", activation="geglu", bias=False,
        latent=LatentConfig(kv_dim=8, q_dim=12, rope_dim=4),
        sparse=SparseConfig(top_k=4, n_head=2, head_dim=4, loss=0.0),
        experts=ExpertsConfig(count=4, shared=1, d_ff=8, first_layer=1, capacity_factor=0.7),
    ),
    "bert": BertConfig(**TEXT),
    "vit": ViTConfig(**SIZES, image_size=8, patch_size=4, channels=1, n_classes=19),
    "vit, probe": ViTConfig(
        **SIZES, image_size=8, patch_size=4, channels=1, n_classes=19, pool="map", n_registers=2
    ),
    "encoder-decoder": EncoderDecoderConfig(
        **TEXT, positions="alibi", n_encoder_layer=1, embedding_norm=True, logit_bias=True,
        relative_buckets=6, relative_max_distance=9, logit_scale=0.5,
    ),
}  # fmt: skip


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace float32 by float64 in models; jaxtyping checks are off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        monkeypatch.setattr(tjx_nn.config, "Dtype", Literal["float64"])
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs_of(name: str) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    text, source = rng.integers(0, 19, (2, 2, 12), np.int32)
    labels = np.where(rng.random((2, 12)) < 0.2, -100, np.roll(text, -1, 1))
    segments = np.repeat(np.array([[3, 1], [2, 2]], np.int32), (8, 4), 1)
    mask = np.arange(12)[None] < np.array([[10], [12]])
    match name:
        case "bert":
            return (text, labels), {"mask": mask, "segment_ids": segments}
        case "vit" | "vit, probe":
            return (rng.standard_normal((2, 8, 8, 1)), labels[:, 0]), {}
        case "encoder-decoder":
            return (source, text, labels), {"source_mask": mask}
        case _:
            return (text, labels), {"segment_ids": segments}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_losses_against_finite_differences(
    name: str, make: Callable[..., Params]
) -> None:
    config: Any = dataclasses.replace(MODELS[name], dtype="float64")  # type: ignore[arg-type]  # see above
    params: Params = jax.tree.map(lambda p: np.asarray(p, np.float64), jax.device_get(make(config)))
    data, keywords = jax.device_put(inputs_of(name))

    @jax.jit
    def compute(params: Params) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            found = bind(config, params).losses(*data, **keywords)
            assert found.tokens.dtype == np.float64
            total: jax.Array = found.tokens.sum() + found.penalty
            return total

        return jax.value_and_grad(loss)(params)

    def loss_at(step: float, direction: Params) -> float:
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return float(jax.device_get(compute(jax.device_put(moved))[0]))

    gradients = jax.device_get(compute(jax.device_put(params))[1])
    rng, step = np.random.default_rng(2), 1e-6
    paths = [path for path, _ in jax.tree.flatten_with_path(params)[0]]
    for only in (None, *paths):  # all parameters together, and each separately
        direction = jax.tree.map_with_path(
            lambda path, p, only=only: rng.standard_normal(p.shape) * (only in (None, path)), params
        )
        expected = (loss_at(step, direction) - loss_at(-step, direction)) / (2 * step)
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradients, direction)
        found = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=str(only))
