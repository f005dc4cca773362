"""Mixture of experts against a loop over tokens in NumPy."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tjx_nn import Experts, ExpertsConfig, GPTConfig
from tjx_nn.binding import Params

ROUTED = ExpertsConfig(count=4, per_token=2, d_ff=6, capacity_factor=None)
TINY = GPTConfig(n_layer=2, n_head=2, d_model=8, max_seq_len=16, experts=ROUTED)


def variant(**experts: Any) -> GPTConfig:
    return dataclasses.replace(TINY, experts=dataclasses.replace(ROUTED, **experts))


@functools.cache
def abstract(config: GPTConfig) -> tuple[Any, Any]:
    with jax.transfer_guard("allow"):
        return nnx.split(nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0))))


def make_params(config: GPTConfig, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    shapes: Params = nnx.to_pure_dict(abstract(config)[1])
    params: Params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), shapes)
    return params


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(config: GPTConfig, params: Params, x: jax.Array, drop_tokens: bool) -> Any:
    return nnx.merge(abstract(config)[0], params)(x, drop_tokens=drop_tokens)


def run(config: GPTConfig, params: Params, x: np.ndarray, drop_tokens: bool = True) -> Any:
    return jax.device_get(apply(config, *jax.device_put((params, x)), drop_tokens))


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 7, 8)).astype(np.float32)


def all_experts(params: Params, x: Any, gated: bool) -> Any:
    """Output of every expert for every token: [batch, tokens, experts, features]."""
    up = jnp.einsum("btd,edf->btef", x, params["up"]["kernel"]) + bias_of(params["up"])
    if gated:
        gate = jnp.einsum("btd,edf->btef", x, params["gate"]["kernel"]) + bias_of(params["gate"])
        up = jax.nn.silu(gate) * up
    else:
        up = jax.nn.gelu(up, approximate=True)
    return jnp.einsum("btef,efd->bted", up, params["down"]["kernel"]) + bias_of(params["down"])


def bias_of(layer: Params) -> Any:
    """Bias with axes for batch and tokens."""
    bias = layer.get("bias")
    return 0 if bias is None else bias[None, None]


def chosen_experts(params: Params, x: np.ndarray) -> np.ndarray:
    """Two experts of each token, best first."""
    logits = x.astype(np.float64) @ params["router"]["kernel"] + bias_of(params["router"])
    return np.argsort(-logits, -1)[..., :2]


def dense(params: Params, x: jax.Array, chosen: np.ndarray, *, gated: bool, norm: bool) -> Any:
    """Dense mixture: all experts for each token, with weight 0 for experts not chosen."""
    weights = jax.nn.softmax(x @ params["router"]["kernel"] + bias_of(params["router"]))
    weights = weights * (np.arange(4) == chosen[..., None]).any(-2)
    total = weights.sum(-1, keepdims=True) if norm else 1
    return jnp.einsum("bte,bted->btd", weights / total, all_experts(params, x, gated))


@pytest.mark.parametrize(
    ("gated", "norm", "factor", "biases"),
    [
        (False, True, None, False),
        (True, False, None, True),
        (True, True, 4.0, False),
        (True, True, 4.0, True),
    ],
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(
    gated: bool, norm: bool, factor: float | None, biases: bool
) -> None:
    # A capacity of 4 times the share of 4 experts holds all tokens.
    config = dataclasses.replace(
        variant(normalize=norm, capacity_factor=factor, use_bias=biases),
        activation="swiglu" if gated else "gelu_tanh",
    )
    params, x, dy = make_params(config), inputs(), inputs(seed=1)
    chosen = chosen_experts(params, x)

    @jax.jit
    def ours(params: Params, x: jax.Array) -> Any:
        out, pullback = jax.vjp(lambda p, x: apply(config, p, x, True)[0], params, x)
        return out, pullback(jnp.asarray(dy))

    @jax.jit
    def expected(params: Params, x: jax.Array) -> Any:
        f = functools.partial(dense, chosen=chosen, gated=gated, norm=norm)
        out, pullback = jax.vjp(lambda p, x: f(p, x), params, x)
        return out, pullback(jnp.asarray(dy))

    placed = jax.device_put((params, x))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4),
        *jax.device_get((ours(*placed), expected(*placed))),
    )


@pytest.mark.parametrize("factor", [None, 4.0])
def test_weights_of_inputs_equal_a_loop_over_experts(factor: float | None) -> None:
    config = variant(
        scale_inputs=True, normalize=False, scores="sigmoid", capacity_factor=factor, use_bias=True
    )
    params, x, dy = make_params(config), inputs(), inputs(seed=1)
    is_chosen = (np.arange(4) == chosen_experts(params, x)[..., None]).any(-2)

    @jax.jit
    def ours(params: Params, x: jax.Array) -> Any:
        out, pullback = jax.vjp(lambda p, x: apply(config, p, x, True)[0], params, x)
        return out, pullback(jnp.asarray(dy))

    @jax.jit
    def expected(params: Params, x: jax.Array) -> Any:
        def loop(params: Params, x: jax.Array) -> Any:
            weights = jax.nn.sigmoid(x @ params["router"]["kernel"] + bias_of(params["router"]))
            of_expert = [
                all_experts(params, weights[..., e, None] * x, False)[..., e, :] for e in range(4)
            ]
            return jnp.einsum("bte,btej->btj", is_chosen, jnp.stack(of_expert, 2))

        out, pullback = jax.vjp(loop, params, x)
        return out, pullback(jnp.asarray(dy))

    placed = jax.device_put((params, x))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4),
        *jax.device_get((ours(*placed), expected(*placed))),
    )


GROUPED = ExpertsConfig(
    count=8, per_token=3, d_ff=6, capacity_factor=None, scores="sigmoid", choice_bias=True,
    groups=4, groups_per_token=2, weight_scale=2.5,
)  # fmt: skip


def grouped_weights(scores: np.ndarray, biased: np.ndarray, best: int) -> np.ndarray:
    """Weights of 8 experts in 4 groups: 3 experts of the 2 groups with the best sums."""
    sums = [np.sort(biased[2 * g : 2 * g + 2])[-best:].sum() for g in range(4)]
    groups = sorted(range(4), key=lambda g: -sums[g])[:2]
    allowed = [expert for expert in range(8) if expert // 2 in groups]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:3]
    return np.where(np.isin(np.arange(8), chosen), scores, 0)


@pytest.mark.parametrize(
    ("best", "scores", "normalize"), [(2, "sigmoid", True), (1, "softmax", False)]
)
def test_groups_of_experts_equal_a_loop_and_the_bias_learns_to_balance(
    best: int, scores: Literal["softmax", "sigmoid"], normalize: bool
) -> None:
    experts = dataclasses.replace(GROUPED, group_top_k=best, scores=scores, normalize=normalize)
    config = dataclasses.replace(TINY, experts=experts)
    params, x = make_params(config), inputs()

    @jax.jit
    def compute(params: Params, x: jax.Array) -> Any:
        def outputs(bias: jax.Array) -> Any:
            y, aux_losses = apply(config, params | {"choice_bias": bias}, x, True)
            return y, aux_losses["balance_loss"]

        both, pullback = jax.vjp(outputs, params["choice_bias"])
        zero, one = jnp.zeros_like(both[0]), jnp.ones(())
        return (
            both,
            pullback((zero + 1, 0 * one)),
            pullback((zero, one)),
            all_experts(params, x, False),
        )

    (y, balance), of_output, of_balance, made = jax.device_get(
        compute(*jax.device_put((params, x)))
    )
    logits = x.astype(np.float64) @ params["router"]["kernel"]
    own = 1 / (1 + np.exp(-logits))
    shares = own / own.sum(-1, keepdims=True)
    if scores == "softmax":
        own = shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    biased = own + params["choice_bias"]
    weights = np.zeros_like(own)
    for token in np.ndindex(x.shape[:2]):
        weights[token] = grouped_weights(own[token], biased[token], best)
    load = 8 * (weights > 0).mean((0, 1)) / 3
    np.testing.assert_allclose(balance, (load * shares.mean((0, 1))).sum(), rtol=1e-5)
    weights = 2.5 * weights / (weights.sum(-1, keepdims=True) if normalize else 1)
    np.testing.assert_allclose(y, np.einsum("bte,bted->btd", weights, made), atol=2e-4)
    np.testing.assert_array_equal(of_output[0], 0)
    np.testing.assert_allclose(of_balance[0], load - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"groups": 3}, "groups: got 3; expected a divisor of count 8"),
        ({"groups_per_token": 5}, "groups_per_token: got 5 .* at most 4"),
        ({"group_top_k": 3}, "group_top_k: got 3 .* at most 2"),
        ({"per_token": 5}, "per_token: got 5 with count 8 and groups 4; expected at most 4"),
        ({"weight_scale": 0.0}, "weight_scale: got 0.0"),
    ],
)
def test_invalid_groups_raise(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(GROUPED, **fields)


def test_without_dropping_there_is_no_capacity() -> None:
    limited = variant(capacity_factor=0.5)
    params, x = make_params(limited), inputs()
    y, aux_losses = run(limited, params, x, drop_tokens=False)
    unlimited, _ = run(TINY, params, x)
    np.testing.assert_array_equal(y, unlimited)
    assert aux_losses["dropped"] == 0
    assert np.abs(run(limited, params, x)[0] - y).max() > 1e-2


def test_full_experts_drop_later_choices_and_later_tokens() -> None:
    # Router: feature e of a token is its logit for expert e. Three tokens prefer expert 0,
    # and token 1 prefers expert 2, then expert 0.
    config = variant(capacity_factor=0.75)  # of a share of 2 * 4 / 4 choices: 2 tokens an expert
    params = make_params(config)
    params["router"]["kernel"] = np.eye(8, 4, dtype=np.float32)
    x = np.zeros((1, 4, 8), np.float32)
    x[0, :, :4] = [[9, 5, 0, 0], [5, 0, 9, 0], [9, 0, 5, 0], [9, 0, 0, 5]]
    y, aux_losses = run(config, params, x)
    served = [[0, 1], [2], [0, 2], [3]]  # expert 0 is full after the first choices of 0 and 2
    made = jax.device_get(
        jax.jit(all_experts, static_argnums=2)(*jax.device_put((params, x)), False)
    )
    for t, experts in enumerate(served):
        odds = {e: np.exp(x[0, t, e]) for e in np.argsort(-x[0, t, :4])[:2]}
        expected = sum(odds[e] / sum(odds.values()) * made[0, t, e] for e in experts)
        np.testing.assert_allclose(y[0, t], expected, atol=1e-4)
    assert aux_losses["dropped"] == 2 / 8


def test_dropped_tokens_do_not_depend_on_the_rest_of_the_batch() -> None:
    config = variant(capacity_factor=0.5)
    params, x = make_params(config), inputs()
    together, _ = run(config, params, x)
    other, _ = run(config, params, np.stack([x[0], 3 - x[1]]))
    np.testing.assert_allclose(together[0], other[0], atol=1e-5)


def test_aux_losses_of_balanced_and_collapsed_routing() -> None:
    config = variant(capacity_factor=1.0, per_token=1)
    params = make_params(config)
    params["router"]["kernel"] = np.eye(8, 4, dtype=np.float32)
    x = np.zeros((2, 8, 8), np.float32)
    even = x.copy()
    even[:, np.arange(8), np.arange(8) % 4] = 1
    aux_losses = run(config, params, even)[1]
    np.testing.assert_allclose(aux_losses["balance_loss"], 1, atol=1e-6)
    np.testing.assert_allclose(aux_losses["router_z_loss"], np.log(3 + math.e) ** 2, rtol=1e-6)
    assert aux_losses["dropped"] == 0
    x[..., 2] = 20
    aux_losses = run(config, params, x)[1]
    np.testing.assert_allclose(aux_losses["balance_loss"], 4, rtol=1e-6)
    assert aux_losses["dropped"] == 0.75
    assert all(value.dtype == np.float32 for value in aux_losses.values())


def test_balance_loss_pushes_towards_even_routing() -> None:
    params, x = jax.device_put((make_params(TINY), inputs()))

    @jax.jit
    def step(router: jax.Array) -> Any:
        def loss(router: jax.Array) -> jax.Array:
            aux_losses = apply(TINY, params | {"router": {"kernel": router}}, x, True)[1]
            balance: jax.Array = aux_losses["balance_loss"]
            return balance

        value, gradient = jax.value_and_grad(loss)(router)
        return value, router - 0.3 * gradient

    router, values = params["router"]["kernel"], []
    for _ in range(30):
        value, router = step(router)
        values.append(float(jax.device_get(value)))
    assert values[0] > 1.05
    assert values[-1] < values[0] - 0.03


def test_without_capacity_tokens_can_be_permuted() -> None:
    params, x = make_params(TINY), inputs()
    order = np.random.default_rng(0).permutation(7)
    y, aux_losses = run(TINY, params, x)
    permuted, same = run(TINY, params, x[:, order])
    np.testing.assert_allclose(permuted, y[:, order], atol=1e-5)
    np.testing.assert_allclose(same["balance_loss"], aux_losses["balance_loss"], rtol=1e-5)


def test_shared_experts_process_every_token() -> None:
    config = variant(shared=2, capacity_factor=0.5)
    params, x = make_params(config), inputs()
    assert params["shared"]["up"]["kernel"].shape == (8, 12)
    with_shared, _ = run(config, params, x)
    params["shared"]["down"] = jax.tree.map(np.zeros_like, params["shared"]["down"])
    without, _ = run(config, params, x)
    assert np.abs(with_shared - without).max(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("shape", "drop_tokens"), [((2, 0, 8), True), ((0, 3, 8), False), ((1, 1, 8), True)]
)
def test_no_tokens_and_one_token(shape: tuple[int, int, int], drop_tokens: bool) -> None:
    config = variant(capacity_factor=0.1)
    y, aux_losses = run(config, make_params(config), np.ones(shape, np.float32), drop_tokens)
    assert y.shape == shape
    assert np.isfinite(y).all()
    assert all(np.isfinite(value) for value in aux_losses.values())


def test_half_precision_routes_in_float32() -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params, x = make_params(config), inputs().astype(jnp.bfloat16)
    y, aux_losses = run(config, params, x)
    exact, same = run(TINY, params, x.astype(np.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.3)
    np.testing.assert_allclose(aux_losses["router_z_loss"], same["router_z_loss"], rtol=1e-6)
