"""Chunked local attention: which tokens see which, and packed documents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tjx_nn import Attention, GPTConfig, RopeConfig
from tjx_nn.binding import Params

LENGTH, CHUNK = 8, 3
CONFIG = GPTConfig(
    vocab_size=23, max_seq_len=LENGTH, n_layer=2, n_head=4, n_kv_head=2, d_model=24,
    positions="rope", norm="rmsnorm", qk_norm=True, qk_norm_position="after_rope", window=CHUNK,
    chunked_window=True, nope_every=2, nope_temperature=0.5, nope_temperature_length=2,
    rope=RopeConfig(interleaved=True),
)  # fmt: skip
# Ids of a row may be far apart, and negative.
SEGMENTS = np.array([[3] * 4 + [-(2**27)] * 4, [5] * LENGTH], np.int32)
POSITIONS = np.array([[*range(4), *range(4)], [*range(2, 2 + LENGTH)]], np.int32)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_the_tokens_of_its_chunk(causal: bool) -> None:
    with jax.transfer_guard("allow"):
        layer = Attention(CONFIG, causal=causal, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (2, LENGTH, CONFIG.d_model))

        @jax.jit
        def sensitivity(x: jax.Array) -> jax.Array:
            def attend(x: jax.Array) -> jax.Array:
                given: Any = (x, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
                out: jax.Array = layer(*given, window=CHUNK)[0].sum(-1)
                return out

            return jnp.abs(jax.jacrev(attend)(x)).sum(-1)

        found = np.asarray(sensitivity(x)) > 1e-9
    for row, token, other, key in np.ndindex(2, LENGTH, 2, LENGTH):
        seen = row == other and SEGMENTS[row, token] == SEGMENTS[row, key]
        seen = seen and POSITIONS[row, token] // CHUNK == POSITIONS[row, key] // CHUNK
        assert found[row, token, other, key] == (seen and (not causal or key <= token))


def test_packed_documents_equal_separate_calls(
    make: Callable[..., Params], run: Callable[..., np.ndarray]
) -> None:
    params = make(CONFIG)
    packed = np.random.default_rng(0).integers(0, 23, (2, LENGTH), np.int32)
    separate = packed.copy()
    separate[1, :4] = packed[0, 4:]  # a causal model ignores what follows
    expected = run(CONFIG, params, separate)
    found = run(CONFIG, params, packed, segment_ids=SEGMENTS)
    np.testing.assert_allclose(found[0, :4], expected[0, :4], atol=1e-5)
    np.testing.assert_allclose(found[0, 4:], expected[1, :4], atol=1e-5)
