"""Dropout masks: rate, independence and gradient."""

from functools import partial

import jax
import numpy as np
import pytest

from tjx_nn.layers.dropout import dropout
from tjx_nn.layout import SINGLE_DEVICE

SHAPE = (8, 512, 30)  # the number of features is no multiple of those of a Threefry block


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_features_are_dropped_independently_at_the_rate(rate: float) -> None:
    apply = jax.jit(lambda x, key: dropout(x, rate, key, SINGLE_DEVICE))
    with jax.transfer_guard("allow"):
        keys = [jax.random.key(seed) for seed in (0, 1)]
    x = jax.device_put(np.ones(SHAPE, np.float32))
    y = np.asarray(apply(x, keys[0]))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-4)
    # 4096 samples of each feature, within five standard deviations.
    deviation = np.sqrt(rate * (1 - rate) / 4096)
    np.testing.assert_allclose(kept.reshape(4096, -1).mean(0), 1 - rate, atol=5 * deviation)
    centred = kept - kept.mean()
    other = np.asarray(apply(x, keys[1])) != 0
    pairs = {
        "features": np.corrcoef(centred.reshape(4096, -1).T)[np.triu_indices(SHAPE[-1], 1)],
        "rows": np.corrcoef(centred.reshape(8, -1))[np.triu_indices(8, 1)],
        "tokens": np.corrcoef(centred[:, 1:].ravel(), centred[:, :-1].ravel())[0, 1],
        "keys": np.corrcoef(centred.ravel(), other.ravel())[0, 1],
    }
    for name, correlation in pairs.items():
        draws = 4096 if name == "features" else kept[0].size
        assert np.abs(correlation).max() < 5 / np.sqrt(draws), name


def test_the_gradient_drops_the_same_features() -> None:
    with jax.transfer_guard("allow"):
        key = jax.random.key(2)
    dropped = partial(dropout, rate=0.3, key=key, layout=SINGLE_DEVICE)
    x = jax.device_put(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(dropped, x)
        return y, pull(x)[0]

    y, dx = jax.device_get(both(x))
    np.testing.assert_array_equal(y, dx)  # dropout is linear
    assert 0.6 < (y != 0).mean() < 0.8
