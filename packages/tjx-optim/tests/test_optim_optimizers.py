"""Each optimizer equals the textbook, written out in NumPy float64, update by update."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from tjx_optim import (
    OPTIMIZERS,
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
)
from tjx_optim.optimizer_config import OptimizerName

LAYERS, WIDTH, VOCAB, UPDATES = 3, 4, 7, 100

# Which parameters decay, by hand; the shapes are those of layers stacked for a scan, where a
# bias has two axes and looks like a matrix.
SHAPES = {
    "wte/embedding": (VOCAB, WIDTH),
    "blocks/dense/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/dense/bias": (LAYERS, WIDTH),
    "blocks/norm/scale": (LAYERS, WIDTH),
    "blocks/norm/bias": (LAYERS, WIDTH),
    "head/kernel": (WIDTH, VOCAB),
    "final_norm/scale": (WIDTH,),
}
DECAYED = {"blocks/dense/kernel", "head/kernel"}


def nest(flat: Any) -> Any:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def direction(name: str, config: Any, gradient: Any, state: Any, t: int) -> Any:
    """Update direction of one array in float64, from the papers."""
    if name == "adamw":
        state["m"] = config.b1 * state.get("m", 0.0) + (1 - config.b1) * gradient
        state["v"] = config.b2 * state.get("v", 0.0) + (1 - config.b2) * gradient**2
        m_hat = state["m"] / (1 - config.b1**t)
        v_hat = state["v"] / (1 - config.b2**t)
        return m_hat / (np.sqrt(v_hat) + config.eps)
    if name == "lion":
        old = state.get("m", 0.0)
        state["m"] = config.b2 * old + (1 - config.b2) * gradient
        return np.sign(config.b1 * old + (1 - config.b1) * gradient)
    assert name == "sgd"
    state["m"] = config.b1 * state.get("m", 0.0) + gradient
    return state["m"]


def reference(config: Any, params: Any, gradients: Any, rate_of_step: Any) -> Any:
    """Return the parameters after each update; all in float64, one array at a time."""
    params = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    states: dict[str, Any] = {path: {} for path in params}
    decayed = DECAYED | ({"wte/embedding"} if config.decay_embeddings else set())
    history = []
    for step in range(UPDATES):
        g = {path: leaf[step].astype(np.float64) for path, leaf in gradients.items()}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
        factor = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        for path, leaf in params.items():
            update = direction(config.name, config, factor * g[path], states[path], step + 1)
            if path in decayed:
                update = update + config.weight_decay * leaf
            params[path] = leaf - rate_of_step(step) * update
        history.append({path: leaf.copy() for path, leaf in params.items()})
    return history


def run(optimizer: Any, params: Any, gradients: Any) -> Any:
    """Run all updates in one compiled scan; return the parameters after each."""

    def update(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def all_updates(params: Any, gradients: Any) -> Any:
        return jax.lax.scan(update, (params, optimizer.init(params)), gradients)[1]

    return jax.device_get(all_updates(jax.device_put(params), jax.device_put(gradients)))


def problem() -> Any:
    """Gradients whose global norm is on both sides of 1, and of very different sizes."""
    rng = np.random.default_rng(3)
    params = {
        p: rng.normal(scale=0.1, size=shape).astype(np.float32) for p, shape in SHAPES.items()
    }
    sizes = 10.0 ** rng.uniform(-2.5, 0.5, UPDATES)
    gradients = {
        p: (sizes.reshape(-1, *[1] * len(shape)) * rng.normal(size=(UPDATES, *shape))).astype("f")
        for p, shape in SHAPES.items()
    }
    return params, gradients


def worst_difference(config: Any, schedule: Any, rate_of_step: Any) -> Any:
    params, gradients = problem()
    got = run(make_optimizer(config, schedule), nest(params), nest(gradients))
    want = reference(config, params, gradients, rate_of_step)
    return max(
        np.abs(nested - np.stack([w[path] for w in want])).max()
        for path, nested in ((p, _at(got, p)) for p in SHAPES)
    )


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def test_the_reference_covers_the_whole_table() -> None:
    assert set(OPTIMIZERS) == {"adamw", "lion", "sgd"}


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_hundred_updates_equal_the_textbook(
    name: OptimizerName, clip_norm: float | None, decay_embeddings: bool
) -> None:
    # Lion moves by the whole rate each step, so float32 rounds it more than the others.
    rate = 3e-4 if name == "lion" else 1e-3
    config = OptimizerConfig(
        name=name, clip_norm=clip_norm, decay_embeddings=decay_embeddings, learning_rate=rate
    )
    assert worst_difference(config, None, lambda _: rate) < 1e-6


def test_adamw_follows_its_schedule() -> None:
    config = OptimizerConfig(learning_rate=2e-3)
    schedule = make_schedule(
        ScheduleConfig(name="linear", warmup_steps=9), learning_rate=2e-3, max_steps=UPDATES
    )

    def rate(step: int) -> Any:
        warm = (step + 1) / 10
        return 2e-3 * (warm if step < 9 else 1.0 - 0.9 * (step - 9) / (UPDATES - 9))

    assert worst_difference(config, schedule, rate) < 1e-6


def test_the_moments_see_the_clipped_gradient() -> None:
    # Were the clip after Adam, the huge first gradient would freeze the second moment for long.
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, clip_norm=1.0, b2=0.999)
    params = {"head": {"kernel": np.zeros((2, 2), np.float32)}}
    gradients = np.full((UPDATES, 2, 2), 0.1, np.float32)
    gradients[0] = 1e6
    path = run(make_optimizer(config), params, {"head": {"kernel": gradients}})["head"]["kernel"]
    assert (np.diff(path[50:, 0, 0]) < -5e-3).all()


def test_only_the_masked_parameters_shrink_when_there_is_no_gradient() -> None:
    params, gradients = problem()
    zeros = {path: np.zeros_like(leaf) for path, leaf in gradients.items()}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay_embeddings=False)
    got = run(make_optimizer(config), nest(params), nest(zeros))
    for path, before in params.items():
        after = _at(got, path)[-1]
        if path in DECAYED:
            np.testing.assert_allclose(after, before * 0.95**UPDATES, rtol=1e-5)
        else:
            np.testing.assert_array_equal(after, before)


def test_the_moments_stand_under_the_paths_of_their_parameters() -> None:
    # What shards the state relies on this: a leaf inherits from the parameter it is named for.
    params = nest(problem()[0])
    with jax.transfer_guard("allow"):
        state = make_optimizer(OptimizerConfig()).init(params)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
    for path in SHAPES:
        assert sum(p.endswith(f"/{path}") for p in paths) == 2
    assert len([p for p in paths if p.endswith("count")]) == len(paths) - 2 * len(SHAPES)


def test_narrow_parameters_are_refused_by_name() -> None:
    params = {"head": {"kernel": np.zeros((2, 2), np.float16)}, "norm": {"scale": np.ones(2, "f")}}
    with pytest.raises(ValueError, match=r"1 parameters .* head/kernel \(float16\): keep"):
        make_optimizer(OptimizerConfig()).init(params)
