"""muP: what a step changes in each layer does not depend on the width (the coordinate check)."""

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, init, learning_rate_scales
from tjx_nn.binding import Params

WIDTHS = (32, 256)


def changes(width: int, base: int | None) -> dict[str, float]:
    """Train with Adam for a few steps; return the root mean square of the changes."""
    config = GPTConfig(
        vocab_size=64, max_seq_len=16, n_layer=2, n_head=4, d_model=width, mup_base=base,
        attention_implementation="reference",  # compiles fastest
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)

    @jax.jit
    def outputs(params: Params) -> dict[str, jax.Array]:
        model = bind(config, params)
        hidden = model.hidden(tokens)
        return {"hidden": hidden, "logits": model.logits(hidden)}

    @jax.jit
    def gradients(params: Params) -> Params:
        def loss(params: Params) -> jax.Array:
            return bind(config, params).losses(tokens, tokens[:, ::-1]).tokens.mean()

        found: Params = jax.grad(loss)(params)
        return found

    def adam(p: np.ndarray, rate: float, g: tuple[np.ndarray, ...]) -> np.ndarray:
        n, first, second = len(g), 0 * p, 0 * p
        for each in g:
            first, second = 0.9 * first + 0.1 * each, 0.95 * second + 0.05 * each * each
        return p - rate * (first / (1 - 0.9**n)) / (np.sqrt(second / (1 - 0.95**n)) + 1e-12)

    with jax.transfer_guard("allow"):
        params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    trained, history = params, []
    for _ in range(3):
        history.append(jax.device_get(gradients(trained)))
        trained = jax.tree.map(
            lambda p, scale, *g: adam(p, 0.02 * scale, g),
            jax.device_get(trained), learning_rate_scales(config), *history,
        )  # fmt: skip
        trained = jax.device_put(trained)
    before, after = jax.device_get((outputs(params), outputs(trained)))
    return {name: float(((after[name] - before[name]) ** 2).mean() ** 0.5) for name in before}


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, float]]:
    """Ratio of the changes of the wide model to those of the narrow one."""
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
