"""muP: what a step changes in each layer does not depend on the width (the coordinate check)."""

from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, init, learning_rate_scales
from tjx_nn.functional import Params

WIDTHS = (32, 256)


def changes(width: int, base: int | None) -> dict[str, float]:
    """Train with Adam for a few steps; give the root mean square of what that changed."""
    config = GPTConfig(
        vocab_size=64, max_seq_len=16, n_layer=2, n_head=4, d_model=width, mup_base=base
    )  # fmt: skip
    rate = jax.tree.map(lambda s: 0.02 * s, learning_rate_scales(config))

    @jax.jit
    def train(key: jax.Array, tokens: jax.Array) -> Any:
        def outputs(params: Params) -> dict[str, jax.Array]:
            model = bind(config, params)
            hidden = model.hidden(tokens)
            return {"hidden": hidden, "logits": model.logits(hidden)}

        def step(state: Any, _: None) -> Any:
            params, first, second, n = state
            loss = lambda p: bind(config, p).losses(tokens, tokens[:, ::-1]).tokens.mean()  # noqa: E731  short
            g = jax.grad(loss)(params)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, g)
            second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, g)
            move = jax.tree.map(
                lambda p, r, m, v: p
                - r * (m / (1 - 0.9**n)) / ((v / (1 - 0.95**n)) ** 0.5 + 1e-12),
                params, rate, first, second,
            )  # fmt: skip
            return (move, first, second, n + 1), None

        params = init(config, key)
        zeros = jax.tree.map(lambda p: 0 * p, params)
        (trained, *_), _ = jax.lax.scan(step, (params, zeros, zeros, 1.0), length=3)
        before, after = outputs(params), outputs(trained)
        return {name: ((after[name] - before[name]) ** 2).mean() ** 0.5 for name in before}

    tokens = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
    with jax.transfer_guard("allow"):
        found = train(jax.random.key(0), tokens)
    return {name: float(jax.device_get(x)) for name, x in found.items()}


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, float]]:
    """How many times more changes in the wide model than in the narrow one."""
    found = {}
    for name, base in (("plain", None), ("mup", WIDTHS[0])):
        narrow, wide = (changes(width, base) for width in WIDTHS)
        found[name] = {part: wide[part] / narrow[part] for part in wide}
    return found


def test_coordinate_check(growth: dict[str, dict[str, float]]) -> None:
    assert growth["plain"]["logits"] > 3
    assert 0.5 < growth["mup"]["logits"] < 2
    assert 0.5 < growth["mup"]["hidden"] < 2


def test_without_a_base_nothing_is_scaled() -> None:
    scales = learning_rate_scales(GPTConfig(n_layer=1, n_head=2, d_model=8, vocab_size=9))
    assert set(jax.tree.leaves(scales)) == {1.0}
