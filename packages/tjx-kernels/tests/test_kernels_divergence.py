"""Divergence of two heads: float64 oracle, memory, sharding, errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_kernels import linear_kl_divergence

VOCAB, LEAD = 53, (3, 7)
abstract: Any = jax.ShapeDtypeStruct  # JAX gives no types


def draw(vocab: int = VOCAB, teacher_vocab: int = VOCAB) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    shapes = ((*LEAD, 6), (vocab, 6), (*LEAD, 9), (teacher_vocab, 9), LEAD)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def oracle(
    x: Any, w: Any, u: Any, t: Any, cotangent: Any, *, vocab: int = VOCAB, temperature: float = 1.0,
    cap: float | None = None, teacher_cap: float | None = None,
) -> Any:  # fmt: skip
    """Divergence and gradients by formula, in float64, from all logits."""
    x, w, u, t = (np.asarray(each, np.float64) for each in (x, w, u, t))
    z, y = x @ w[:vocab].T, u @ t[:vocab].T
    slope = 1.0 if cap is None else 1 / np.cosh(z / cap) ** 2
    z, y = (
        each if c is None else c * np.tanh(each / c) for each, c in ((z, cap), (y, teacher_cap))
    )
    p, q = (np.exp(each / temperature) for each in (z, y))
    p, q = (each / each.sum(-1, keepdims=True) for each in (p, q))
    divergence = (q * np.log(q / p)).sum(-1)
    dlogits = slope * np.asarray(cotangent)[..., None] * (p - q) / temperature
    dw = np.zeros(w.shape)
    dw[:vocab] = dlogits.reshape(-1, vocab).T @ x.reshape(-1, x.shape[-1])
    return divergence, dlogits @ w[:vocab], dw


@partial(jax.jit, static_argnames=("chunk_size", "vocab_size", "temperature", "caps"))
def compute(
    x: Any, w: Any, u: Any, t: Any, cotangent: Any, *, chunk_size: int | None = None,
    vocab_size: int | None = None, temperature: float = 1.0, caps: Any = (None, None),
) -> Any:  # fmt: skip
    call = partial(
        linear_kl_divergence, chunk_size=chunk_size, vocab_size=vocab_size,
        temperature=temperature, soft_cap=caps[0], teacher_soft_cap=caps[1],
    )  # fmt: skip
    found, pull = jax.vjp(call, x, w, u, t)
    return found, *pull(cotangent)


# One chunk of all (53 is prime), a padded chunk, several padded rows, a row each.
@pytest.mark.parametrize("chunk_size", [None, 40, 20, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_equal_the_oracle(chunk_size: int | None, temperature: float) -> None:
    inputs = draw()
    found = compute(*jax.device_put(inputs), chunk_size=chunk_size, temperature=temperature)
    value, dx, dw, du, dt = jax.device_get(found)
    for a, b in zip((value, dx, dw), oracle(*inputs, temperature=temperature), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert not du.any()
    assert not dt.any()


def test_it_equals_the_oracle_in_float64() -> None:
    with jax.enable_x64(True):
        inputs = tuple(np.asarray(each, np.float64) for each in draw())
        found = jax.device_get(compute(*jax.device_put(inputs), chunk_size=20, temperature=3.0))
    for a, b in zip(found[:3], oracle(*inputs, temperature=3.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_padded_rows_and_soft_caps() -> None:
    inputs = draw(vocab=64, teacher_vocab=57)
    options: Any = {"vocab_size": VOCAB, "temperature": 2.0, "caps": (3.0, 5.0)}
    found = jax.device_get(compute(*jax.device_put(inputs), chunk_size=20, **options))
    expected = oracle(*inputs, temperature=2.0, cap=3.0, teacher_cap=5.0)
    for a, b in zip(found[:3], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_equal_heads_have_no_divergence_and_extreme_logits_are_finite() -> None:
    x, w, _, _, cotangent = draw()
    value, dx, dw, *_ = jax.device_get(compute(*jax.device_put((x, w, x, w, cotangent))))
    np.testing.assert_allclose(value, 0, atol=2e-6)
    np.testing.assert_allclose(dx, 0, atol=1e-5)
    np.testing.assert_allclose(dw, 0, atol=1e-5)
    found = compute(*jax.device_put((100 * x, w, 100 * x, -w, cotangent)), chunk_size=20)
    assert all(np.isfinite(each).all() for each in jax.device_get(found))


def test_no_array_of_all_logits_is_in_memory() -> None:
    x, w = (
        abstract((512, 8), jnp.bfloat16),
        abstract((8192, 8), jnp.float32),
    )

    def loss(x: Any, w: Any) -> Any:
        return linear_kl_divergence(x, w, x, w, chunk_size=128).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    logits = 512 * 8192 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4  # type: ignore[union-attr]


@pytest.mark.parametrize(("of_tokens", "of_rows"), [("a", "b"), (("a", "b"), None)])
def test_shards_of_tokens_and_rows_give_the_same(of_tokens: Any, of_rows: Any) -> None:
    x, w, u, t, cotangent = draw(vocab=52, teacher_vocab=52)
    inputs = (*(np.concatenate([each] * 4) for each in (x, u, cotangent)), w, t)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    tokens, rows = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (of_tokens, of_rows))  # type: ignore[no-untyped-call]
    results = []
    for placed in (jax.device_put(inputs), jax.device_put(inputs, (*[tokens] * 3, rows, rows))):
        x, u, cotangent, w, t = placed
        results.append(jax.device_get(compute(x, w, u, t, cotangent, chunk_size=13)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({1: (53, 5)}, {}, r"x, w: got shapes \(3, 7, 6\) and \(53, 5\)"),
        ({2: (3, 6, 9)}, {}, r"teacher_x: got shape \(3, 6, 9\); expected the tokens of x"),
        ({3: (54, 9)}, {}, "w, teacher_w: got 53 and 54 rows"),
        ({}, {"vocab_size": 54}, "vocab_size: got 54; expected 1 to 53"),
        ({}, {"temperature": 0.0}, "temperature: got 0.0"),
    ],
)
def test_mistakes_are_named(change: Any, options: Any, message: str) -> None:
    shapes = [change.get(i, each.shape) for i, each in enumerate(draw()[:4])]
    inputs = [abstract(shape, np.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(linear_kl_divergence, **options), *inputs)
