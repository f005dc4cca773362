"""Boolean masks and mask functions of `flash_attention`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_kernels import chosen_implementation, flash_attention, register_backend, unregister_backend
from tjx_kernels.attention.backends import xla
from tjx_kernels.attention.mask_functions import is_elementwise

RNG = np.random.default_rng(0)
Q, K, V = (jax.device_put(RNG.standard_normal((2, 6, n, 8)).astype(np.float32)) for n in (4, 2, 2))


def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Causal, with the first three keys visible to all queries of the first row."""
    del head
    return (key <= query) | ((key < 3) & (batch == 0))


def as_array(q_offset: int = 0) -> np.ndarray:
    indices = np.indices((2, 1, 6, 6))
    return np.asarray(prefix(indices[0], indices[1], indices[2] + q_offset, indices[3]))


def expected(mask: np.ndarray) -> np.ndarray:
    """Attention in float64."""
    q, k, v = (np.asarray(jax.device_get(x), np.float64) for x in (Q, K, V))
    scores = np.einsum("btnh,bsnh->bnts", q, k.repeat(2, 2)) / 8**0.5
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: np.ndarray = np.einsum(
        "bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v.repeat(2, 2)
    )
    return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_mask_and_function_equal_dense_attention(implementation: str) -> None:
    @jax.jit
    def attend(mask: jax.Array) -> Any:
        options: Any = {"implementation": implementation}
        return (
            flash_attention(Q, K, V, mask=mask, **options),
            flash_attention(Q, K, V, mask=prefix, **options),
            flash_attention(Q, K, V, mask=prefix, q_offset=2, **options),
        )

    by_array, by_function, offset = jax.device_get(attend(jax.device_put(as_array())))
    np.testing.assert_allclose(by_array, expected(as_array()), atol=1e-5)
    np.testing.assert_allclose(by_function, by_array, atol=1e-6)
    np.testing.assert_allclose(offset, expected(as_array(2)), atol=1e-5)


def test_masked_rows_are_dead_and_gradients_are_causal() -> None:
    keep = np.tri(6, dtype=bool)[None, None]
    keep[..., 1, :] = False

    @jax.jit
    def jacobian(mask: jax.Array) -> Any:
        out = flash_attention(Q, K, V, mask=mask)
        of_row = jax.grad(lambda v: flash_attention(Q, K, v, mask=mask)[:, 3].sum())(V)
        return out, of_row, jax.grad(lambda q: flash_attention(q, K, V, mask=mask).sum())(Q)

    out, dv, dq = jax.device_get(jacobian(jax.device_put(keep)))
    assert not out[:, 1].any()
    assert not dq[:, 1].any()
    assert dv[:, :4].any((0, 2, 3)).all()
    assert not dv[:, 4:].any()


@pytest.mark.parametrize(
    "mask",
    [np.ones((2, 6, 6), bool), np.ones((2, 3, 6, 6), bool), np.ones((1, 1, 6, 6), np.float32)],
)
def test_masks_of_other_shapes_and_dtypes_are_rejected(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"mask: got .* of shape .*; expected bool of shape"):
        flash_attention(Q, K, V, mask=jax.device_put(mask))


def test_functions_that_read_other_indices_or_arrays_equal_their_array() -> None:
    """A backend that evaluated them tile by tile would compute another mask."""
    with jax.transfer_guard("allow"):
        lengths = jnp.array([4, 6])
        prefix_sum = np.cumsum(np.arange(6) % 3)

        def captured(batch: Any, head: Any, query: Any, key: Any) -> Any:
            del head, query
            return key < lengths[batch]

        def cumulative(batch: Any, head: Any, query: Any, key: Any) -> Any:
            del batch, head
            return jnp.cumsum(key % 3, axis=3) <= query

        assert not is_elementwise(captured)
        assert not is_elementwise(cumulative)
        key, query = np.arange(6), np.arange(6)[:, None]
        for function, mask in (
            (captured, key < np.array([4, 6]).reshape(2, 1, 1, 1)),
            (cumulative, (prefix_sum <= query)[None, None]),
        ):
            out = flash_attention(Q, K, V, mask=function)
            np.testing.assert_allclose(out, expected(mask), atol=1e-5)


def test_a_function_has_to_return_a_mask() -> None:
    with pytest.raises(ValueError, match=r"mask: got int32 of shape \(1, 1, 6, 1\); expected bool"):
        flash_attention(Q, K, V, mask=lambda *indices: indices[2])


def test_a_backend_without_mask_functions_does_not_run_them(request: Any) -> None:
    register_backend("plain", xla.BACKEND._replace(masks=False), before="cudnn")
    request.addfinalizer(lambda: unregister_backend("plain"))
    assert chosen_implementation(Q, K, V) == "plain"
    assert chosen_implementation(Q, K, V, mask=prefix) == "xla"
    with pytest.raises(ValueError, match="'plain' cannot serve this call: has no mask functions"):
        flash_attention(Q, K, V, mask=prefix, implementation="plain")
