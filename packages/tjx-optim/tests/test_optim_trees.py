"""Optimizers of parameter trees of five frameworks, with equal results for equal parameters."""

from collections.abc import Callable
from typing import Any

import chex
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tjx_optim
from tjx_optim import OptimizerConfig, decay_mask, make_optimizer
from tjx_optim.param_rules import leaves_by_path

SHAPES = {
    "wte/embedding": (5, 4),
    "up/kernel": (4, 6),
    "up/bias": (6,),
    "norm/scale": (6,),
    "norm/bias": (6,),
    "head/kernel": (6, 5),
}
DECAYED = {"wte/embedding", "up/kernel", "head/kernel"}
MATRICES = {"up/kernel"}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(5, 4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(self.head(self.norm(jax.nn.gelu(self.up(self.wte(tokens))))))


class EquinoxWeights(equinox.Module):
    weight: Any
    bias: Any = None


class EquinoxModel(equinox.Module):
    wte: EquinoxWeights
    up: EquinoxWeights
    norm: EquinoxWeights
    head: EquinoxWeights

    def __call__(self, tokens: Any) -> Any:
        """Make the tree callable, which optax.partition must not take for a function."""
        raise NotImplementedError


def nested(arrays: dict[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = array
    return tree


def nnx_state(arrays: dict[str, Any]) -> Any:
    return nnx.State(jax.tree.map(nnx.Param, nested(arrays)))


def linen(arrays: dict[str, Any]) -> Any:
    return {"params": nested(arrays)}


def haiku(arrays: dict[str, Any]) -> Any:
    names = {"embedding": "embeddings", "kernel": "w", "bias": "b"}
    tree = {
        f"model/~/{module}": {names.get(name, name): leaf for name, leaf in leaves.items()}
        for module, leaves in nested(arrays).items()
    }
    tree["model/~/norm"]["offset"] = tree["model/~/norm"].pop("b")
    return tree


def equinox_module(arrays: dict[str, Any]) -> Any:
    return EquinoxModel(
        wte=EquinoxWeights(arrays["wte/embedding"]),
        up=EquinoxWeights(arrays["up/kernel"], arrays["up/bias"]),
        norm=EquinoxWeights(arrays["norm/scale"], arrays["norm/bias"]),
        head=EquinoxWeights(arrays["head/kernel"]),
    )


Tree = Callable[[dict[str, Any]], Any]
TREES: list[Tree] = [nested, nnx_state, linen, haiku, equinox_module]
IN_TREES = pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype("f") for path, shape in SHAPES.items()}


def roles(tree: Tree) -> dict[str, str]:
    """Return the path in `SHAPES` of each path of a tree."""
    return {path: str(role) for path, role in leaves_by_path(tree({p: p for p in SHAPES})).items()}


@IN_TREES
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_weight_decay_applies_to_the_same_parameters(tree: Tree, decay_embeddings: bool) -> None:
    mask = leaves_by_path(decay_mask(tree(arrays(0)), decay_embeddings=decay_embeddings))
    decayed = {role for path, role in roles(tree).items() if mask[path]}
    assert decayed == DECAYED - (set() if decay_embeddings else {"wte/embedding"})


CONFIGS = {
    "adamw": OptimizerConfig(learning_rate=0.01, weight_decay=0.5, ema_decay=0.9),
    "muon": OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0.5),
    "lamb": OptimizerConfig(name="lamb", learning_rate=0.01, clip_adaptive=0.1),
    "frozen": OptimizerConfig(groups=("*wte*: frozen", "*head*: learning_rate_scale=0.5")),
}


def two_updates(config: OptimizerConfig, tree: Tree) -> dict[str, Any]:
    optimizer = make_optimizer(config)

    @jax.jit
    def updates(params: Any, gradients: Any) -> Any:
        state = optimizer.init(params)
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, update)
        return tjx_optim.evaluation_params(state, params)

    params, *gradients = (tree(jax.device_put(arrays(seed))) for seed in range(3))
    updated = leaves_by_path(jax.device_get(updates(params, gradients)))
    return {role: updated[path] for path, role in roles(tree).items()}


@IN_TREES
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_equal_those_of_nested_dicts(tree: Tree, name: str) -> None:
    """A role that is misread changes decay, the muon matrix or the frozen parameters."""
    chex.assert_trees_all_equal(
        two_updates(CONFIGS[name], tree), two_updates(CONFIGS[name], nested)
    )


GROUPS = ("norm/*: learning_rate_scale=0.5", "wte/*: frozen")


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
@jax.transfer_guard("allow")  # flax creates the step counter of nnx.Optimizer on the host
def test_twenty_steps_of_nnx_optimizer_equal_those_of_a_dict(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.5, groups=GROUPS)
    optimizer = make_optimizer(config)
    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def loss(model: Any) -> Any:
        return (model(jnp.arange(5)) ** 2).mean()

    @nnx.jit
    def nnx_step(model: Any, nnx_optimizer: Any) -> None:
        nnx_optimizer.update(model, nnx.grad(loss)(model))

    @jax.jit
    def dict_step(params: Any, opt_state: Any) -> Any:
        gradients = jax.grad(lambda params: loss(nnx.merge(graph, nnx.State(params))))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(optimizer.init)(params)
    for _ in range(20):
        nnx_step(model, nnx_optimizer)
        params, opt_state = dict_step(params, opt_state)
    assert np.isfinite(params["up"]["kernel"]).all()
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), params)


def test_masks_replace_the_roles_by_path() -> None:
    params = {"a": np.ones((3, 3), "f"), "b_1": np.ones((3, 3), "f")}
    config = OptimizerConfig(name="muon", weight_decay=0.5, learning_rate=1.0)
    masks: dict[str, Any] = {
        "muon_mask": {"a": True, "b_1": False},
        "decay_mask": {"a": False, "b_1": True},
    }
    optimizer = make_optimizer(config, **masks)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, state = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    np.testing.assert_array_equal(updates["a"], 0.0)
    np.testing.assert_array_equal(updates["b_1"], -0.5)
    paths = [path for path in leaves_by_path(state) if path.endswith("/a")]
    assert [path for path in paths if "/adamw/" in path] == []
    with pytest.raises(ValueError, match=r"decay_mask: got 1 paths .* such as b_1"):
        make_optimizer(config, decay_mask={"a": True}, muon_mask=masks["muon_mask"]).init(params)


def test_two_parameters_with_one_path_raise() -> None:
    params = {"a": {"b/c": np.ones(2, "f")}, "a/b": {"c": np.ones(2, "f")}}
    with pytest.raises(ValueError, match="got 2 parameters with the path a/b/c"):
        make_optimizer(OptimizerConfig()).init(params)
