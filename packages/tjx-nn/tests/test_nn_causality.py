"""Causality: a logit depends on exactly the tokens up to its own position."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    EncoderDecoderConfig,
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    SparseConfig,
    TransformerConfig,
    bind,
)
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]


T = 8
SIZES: dict[str, Any] = {"vocab_size": T, "max_seq_len": T, "n_layer": 2, "n_head": 2, "d_model": 8}
FULL = np.tri(T, dtype=bool)
# Two blocks with a window of three reach four previous tokens.
BAND = FULL & ~np.tri(T, k=-5, dtype=bool)
LATENT = LatentConfig(kv_dim=6, rope_dim=2)
KINDS: dict[str, tuple[TransformerConfig, np.ndarray]] = {
    "learned": (GPTConfig(**SIZES, n_kv_head=1), FULL),
    "rope": (GPTConfig(**SIZES, positions="rope", window=3), BAND),
    "alibi": (GPTConfig(**SIZES, positions="alibi", window=3, parallel_block=True), BAND),
    "none": (GPTConfig(**SIZES, positions="none", window=2, global_every=2), FULL),
    "latent": (GPTConfig(**SIZES, positions="rope", latent=LATENT, norm_position="post"), FULL),
    "sparse": (GPTConfig(**SIZES, sparse=SparseConfig(top_k=T, head_dim=4), window=3), BAND),
    "experts": (GPTConfig(**SIZES, experts=ExpertsConfig(count=3, capacity_factor=0.1)), FULL),
    "encoder-decoder": (EncoderDecoderConfig(**SIZES, source_vocab_size=3, stop_id=2), FULL),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_influence_is_lower_triangular(kind: str, make: Callable[..., Params]) -> None:
    """Differentiate each position's logits by each position's input embedding."""
    config, expected = KINDS[kind]

    @jax.jit
    def influence(params: Params, direction: jax.Array) -> jax.Array:
        table = params["wte"]["embedding"]

        def outputs(inputs: jax.Array) -> jax.Array:
            # Each position has a token of its own, whose row of the table is its input; as a head
            # the table stays.
            values = {**params, "wte": {"embedding": inputs}, "head": {"embedding": table}}
            model: Any = bind(dataclasses.replace(config, tied_head=False), values)  # type: ignore[call-arg]  # of each kind
            source = [jnp.zeros((1, 3), jnp.int32)] * isinstance(config, EncoderDecoderConfig)
            logits: jax.Array = model(*source, jnp.arange(T)[None])[0]
            return logits @ direction

        _, pullback = jax.vjp(outputs, table)
        return jnp.abs(jax.lax.map(lambda row: pullback(row)[0], jnp.eye(T))).sum(2)

    direction = np.random.default_rng(0).standard_normal(T).astype(np.float32)
    grid = np.asarray(influence(make(config), jax.device_put(direction)))
    np.testing.assert_array_equal(grid > 0, expected)


def test_rows_of_a_batch_are_independent(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    together = run(tiny, params, tokens)
    alone = run(tiny, params, jax.device_get(tokens)[1:])
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)
