"""Training on a mesh equals training on one device."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_parallel import (
    MeshConfig,
    ShardingRules,
    make_constraint,
    make_mesh,
    param_shardings,
    replicated,
    shard_batch,
    state_shardings,
)

# A small transformer with tied embeddings: layers L, vocabulary V, width D, heads N, MLP width F.
L, V, D, N, F, B, T = 2, 64, 16, 4, 32, 8, 8
LOGICAL = {
    "embedding": ("vocab", "embed"),
    "blocks": {
        "qkv": ("layers", "embed", None, "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
}
SHAPES = {
    "embedding": (V, D),
    "blocks": {
        "qkv": (L, D, 3, N, D // N),
        "out": (L, N, D // N, D),
        "up": (L, D, F),
        "down": (L, F, D),
        "scale": (L, D),
    },
}


type Constraint = Callable[[Any, Sequence[str | None]], Any]


class State(NamedTuple):
    step: Any
    params: Any
    moments: Any


def init(key: Any) -> State:
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(leaves))
    values = [
        jax.random.uniform(k, shape, minval=-0.2, maxval=0.2)
        for k, shape in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(structure, values)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return State(jnp.int32(0), params, {"mu": zeros, "nu": zeros})


def norm(x_BTD: Any) -> Any:
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + 1e-6)


def block(x_BTD: Any, w: Any, constrain: Constraint) -> tuple[Any, None]:
    x_BTD = constrain(x_BTD, ("batch", "seq", "embed"))
    h_BTD = norm(x_BTD) * w["scale"][None, None, :]
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dcnh->btcnh", h_BTD, w["qkv"]), 2, 0)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(D // N)
    mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    attended = jnp.einsum("bnqk,bknh->bqnh", weights, v)
    x_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", attended, w["out"])
    hidden = jax.nn.gelu(jnp.einsum("btd,df->btf", norm(x_BTD), w["up"]))
    return x_BTD + jnp.einsum("btf,fd->btd", hidden, w["down"]), None


def loss_fn(params: Any, tokens: Any, labels: Any, constrain: Constraint) -> Any:
    table = constrain(params["embedding"], ("vocab", None))
    x_BTD = table[tokens]
    x_BTD, _ = jax.lax.scan(partial(block, constrain=constrain), x_BTD, params["blocks"])
    x_BTD = constrain(x_BTD, ("batch", "seq", "embed"))
    logits = jnp.einsum("btd,vd->btv", norm(x_BTD), table)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(picked)


def train_step(state: State, batch: Any, constrain: Constraint) -> tuple[State, Any]:
    loss, grads = jax.value_and_grad(loss_fn)(
        state.params, batch["tokens"], batch["labels"], constrain
    )
    step = state.step + 1
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.moments["mu"], grads)
    nu = jax.tree.map(lambda n, g: 0.99 * n + 0.01 * g**2, state.moments["nu"], grads)

    def update(p: Any, m: Any, n: Any) -> Any:
        return p - 1e-2 * (m / (1 - 0.9**step)) / (jnp.sqrt(n / (1 - 0.99**step)) + 1e-6)

    params = jax.tree.map(update, state.params, mu, nu)
    return State(step, params, {"mu": mu, "nu": nu}), loss


def batch_of(step: int) -> dict[str, Any]:
    tokens = np.random.default_rng(step).integers(0, V, (B, T + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def train(config: MeshConfig, device_count: int) -> tuple[State, State, list[float]]:
    """Return the first state, the last one, and the losses of 5 steps."""
    mesh = make_mesh(config, jax.devices()[:device_count])
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = param_shardings(mesh, ShardingRules(), LOGICAL, abstract.params)
    shardings = state_shardings(abstract, shardings)
    first = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    constrain = make_constraint(mesh, ShardingRules())
    step = jax.jit(
        partial(train_step, constrain=constrain), out_shardings=(shardings, replicated(mesh))
    )
    state, losses = first, []
    for number in range(5):
        state, loss = step(state, shard_batch(mesh, batch_of(number)))
        losses.append(float(loss))
    return first, state, losses


@pytest.fixture(scope="module")
def one_device() -> tuple[State, State, list[float]]:
    with jax.transfer_guard("allow"):
        return train(MeshConfig(), 1)


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=1, fsdp=2, tensor=4),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=lambda config: f"data{config.data}-fsdp{config.fsdp}-tensor{config.tensor}",
)
def test_every_mesh_trains_as_one_device_does(
    one_device: tuple[State, State, list[float]],
    config: MeshConfig,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with jax.transfer_guard("allow"):
        first, last, losses = train(config, 8)
    expected_first, expected_last, expected_losses = one_device
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, first, expected_first)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0), last, expected_last
    )
    assert "rematerialization" not in capfd.readouterr().err
    # Each device holds its part and no more: of the weights, and of both their moments.
    whole_on_tensor = {"embedding": config.tensor, "qkv": config.tensor, "scale": 1}
    for tree in (last.params, last.moments["mu"], last.moments["nu"]):
        for name, array in {"embedding": tree["embedding"], **tree["blocks"]}.items():
            parts = config.fsdp * whole_on_tensor.get(name, config.tensor)
            assert {s.data.nbytes for s in array.addressable_shards} == {array.nbytes // parts}
