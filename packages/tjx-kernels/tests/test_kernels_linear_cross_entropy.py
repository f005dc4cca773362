"""Linear cross-entropy: float64 oracle, memory, sharding, errors."""

import importlib
import re
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_kernels import linear_cross_entropy
from tjx_kernels.cross_entropy import stored_logits
from tjx_kernels.cross_entropy.chunked import chunk_count
from tjx_kernels.target import Platform, Target

# The function of the same name hides the module from the import statement.
module = importlib.import_module("tjx_kernels.cross_entropy.api")

VOCAB, WIDTH = 53, 6
IGNORED = -100


def draw(
    seed: int, lead: tuple[int, ...] = (3, 7), vocab: int = VOCAB, dtype: Any = np.float32
) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*lead, WIDTH)).astype(dtype)
    w = rng.standard_normal((vocab, WIDTH)).astype(np.float32)
    labels = rng.integers(0, vocab, lead).astype(np.int32)
    labels = np.where(rng.random(lead) < 0.3, IGNORED, labels).astype(np.int32)
    return x, w, labels, rng.standard_normal(lead).astype(np.float32)


def oracle(
    x: Any,
    w: Any,
    labels: Any,
    dloss: Any,
    dlse: Any = 0.0,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
) -> Any:
    """Loss, log-sum-exp, and the gradients by formula, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    logits, slope = x @ w.T, 1.0
    if soft_cap is not None:
        slope = 1 / np.cosh(logits / soft_cap) ** 2
        logits = soft_cap * np.tanh(logits / soft_cap)
    lse = np.log(np.exp(logits).sum(-1))
    counts = labels != IGNORED
    target = (1 - label_smoothing) * np.eye(len(w))[np.where(counts, labels, 0)]
    target += label_smoothing / len(w)
    loss = np.where(counts, lse - (logits * target).sum(-1) + z_loss * lse**2, 0)
    p = np.exp(logits - lse[..., None])
    weight = np.where(counts, dloss, 0)[..., None]
    dlogits = weight * ((1 + 2 * z_loss * lse[..., None]) * p - target)
    dlogits = slope * (dlogits + p * np.asarray(dlse)[..., None])
    flat = dlogits.reshape(-1, len(w))
    return loss, lse, dlogits @ w, flat.T @ x.reshape(-1, x.shape[-1])


def plain(*inputs: Any) -> Any:
    loss, _, dx, dw = oracle(*inputs)
    return loss, dx, dw


# In place of a chunk size: the logits are kept, as on GPUs.
KEPT: Literal["kept"] = "kept"
type ChunkSize = int | Literal["kept"] | None


def loss_and_gradients(
    x: Any, w: Any, labels: Any, dloss: Any, chunk_size: ChunkSize = None
) -> Any:
    options: Any = {"keep_logits": True} if chunk_size == KEPT else {"chunk_size": chunk_size}
    call = partial(linear_cross_entropy, labels=labels, **options)
    loss, pull = jax.vjp(call, x, w)
    return (loss, *pull(dloss))


compute = jax.jit(loss_and_gradients, static_argnames="chunk_size")


@partial(jax.jit, static_argnames="options")
def compute_with_lse(
    x: Any, w: Any, labels: Any, dloss: Any, dlse: Any, options: tuple[tuple[str, Any], ...]
) -> Any:
    call = partial(linear_cross_entropy, labels=labels, return_lse=True, **dict(options))
    (loss, lse), pull = jax.vjp(call, x, w)
    return (loss, lse, *pull((dloss, dlse)))


# One chunk of all (53 is prime), a tail, a tail longer than a chunk, a row each.
@pytest.mark.parametrize("chunk_size", [None, 1000, 40, 20, 7, 1, KEPT])
def test_agrees_with_oracle(chunk_size: ChunkSize) -> None:
    inputs = draw(0)
    found = jax.device_get(compute(*jax.device_put(inputs), chunk_size=chunk_size))
    for a, b in zip(found, plain(*inputs), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


OPTIONS = st.fixed_dictionaries(
    {
        "z_loss": st.sampled_from([0.0, 0.3]),
        "label_smoothing": st.sampled_from([0.0, 0.2]),
        "soft_cap": st.sampled_from([None, 1.5]),
    }
)


@settings(max_examples=40)
@given(
    options=OPTIONS,
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    through=st.sampled_from(["loss", "lse", "both"]),
    kept=st.booleans(),
)
@example(
    options={"z_loss": 0.3, "label_smoothing": 1.0, "soft_cap": 1.5},
    seed=0,
    spread=1.0,
    through="both",
    kept=False,
)
def test_every_combination_agrees_with_oracle(
    options: Any, seed: int, spread: float, through: str, kept: bool
) -> None:
    x, w, labels, dloss = draw(seed)
    dlse = np.random.default_rng(seed + 1).standard_normal(labels.shape).astype(np.float32)
    inputs = (
        np.float32(spread) * x,
        w,
        labels,
        dloss * np.float32(through != "lse"),
        dlse * np.float32(through != "loss"),
    )
    # Sorted, and with one chunk size: each other tuple is compiled anew.
    static = (*sorted(options.items()), ("keep_logits", True) if kept else ("chunk_size", 20))
    found = jax.device_get(compute_with_lse(*jax.device_put(inputs), options=static))
    expected = oracle(*inputs, **options)
    for name, a, b in zip(("loss", "lse", "dx", "dw"), found, expected, strict=True):
        assert a.dtype == np.float32, name
        # Sums round by what is summed: with a z-loss and large logits that is up to 100.
        rounding = max(4e-5, 3e-6 * np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=rounding, err_msg=name)


def dense(
    x: Any, w: Any, labels: Any, z_loss: float, label_smoothing: float, soft_cap: float | None
) -> Any:
    """The same loss as anyone would write it, for JAX to differentiate."""
    logits = jnp.einsum("btd,vd->btv", x, w)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.nn.one_hot(labels, w.shape[0], dtype=x.dtype)
    target = (1 - label_smoothing) * hit + label_smoothing / w.shape[0]
    loss = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1) + z_loss * lse**2
    return jnp.where(labels == IGNORED, 0, loss), lse


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_float64_agrees_with_differentiating_the_dense_loss(soft_cap: float | None) -> None:
    options: Any = {"z_loss": 0.3, "label_smoothing": 0.2, "soft_cap": soft_cap}

    @jax.jit
    def expected(x: Any, w: Any, labels: Any, dloss: Any, dlse: Any) -> Any:
        (loss, lse), pull = jax.vjp(partial(dense, labels=labels, **options), x, w)
        return (loss, lse, *pull((dloss, dlse)))

    x, w, labels, dloss = draw(7)
    dlse = np.cos(np.arange(labels.size)).reshape(labels.shape)
    wide = [a.astype(np.float64) for a in (x, w, dloss, dlse)]
    with jax.enable_x64(True):
        arrays = jax.device_put((*wide[:2], labels, *wide[2:]))
        static = (*options.items(), ("chunk_size", 20))
        found = jax.device_get(compute_with_lse(*arrays, options=static))
        for a, b in zip(found, jax.device_get(expected(*arrays)), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


OPTIONS_OF_PADDED: list[tuple[int, Any]] = [
    (50, {"chunk_size": 20}),
    (50, {"chunk_size": 20, "label_smoothing": 0.2, "soft_cap": 1.5, "z_loss": 0.3}),
    (41, {"chunk_size": 7, "label_smoothing": 0.2}),
    (3, {"chunk_size": 7}),  # fewer than there are chunks
    (1, {}),
    (41, {"keep_logits": True, "label_smoothing": 0.2, "soft_cap": 1.5, "z_loss": 0.3}),
    (1, {"keep_logits": True}),
]


@pytest.mark.parametrize(("vocab_size", "options"), OPTIONS_OF_PADDED)
def test_rows_beyond_the_vocabulary_have_no_effect(vocab_size: int, options: Any) -> None:
    """With a bias, which is a column of w for a feature of x that is 1."""
    x, w, labels, dloss = draw(9)
    labels = np.where(labels >= vocab_size, 0, labels)
    bias = np.random.default_rng(9).standard_normal(VOCAB).astype(np.float32)
    dlse = np.ones_like(dloss)

    @jax.jit
    def run(x: Any, w: Any, bias: Any, labels: Any, dloss: Any, dlse: Any) -> Any:
        def call(x: Any, w: Any, bias: Any) -> Any:
            return linear_cross_entropy(
                x, w, labels, bias=bias, vocab_size=vocab_size, return_lse=True, **options
            )

        found, pull = jax.vjp(call, x, w, bias)
        return (*found, *pull((dloss, dlse)))

    found = jax.device_get(run(*jax.device_put((x, w, bias, labels, dloss, dlse))))
    wider = np.concatenate([x, np.ones_like(x[..., :1])], -1)
    head = np.concatenate([w, bias[:, None]], 1)[:vocab_size]
    how = ("chunk_size", "keep_logits")
    plain_options = {name: value for name, value in options.items() if name not in how}
    loss, lse, dx, dw = oracle(wider, head, labels, dloss, dlse, **plain_options)
    dw = np.pad(dw, ((0, VOCAB - vocab_size), (0, 0)))
    wanted = (loss, lse, dx[..., :-1], dw[:, :-1], dw[:, -1])
    for name, a, b in zip(("loss", "lse", "dx", "dw", "dbias"), found, wanted, strict=True):
        # Sums round by what is summed: with a z-loss and large logits that is up to 100.
        rounding = max(4e-5, 3e-6 * np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=rounding, err_msg=name)
    assert np.all(found[3][vocab_size:] == 0)


def test_stored_logits_of_a_padded_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """53 rows become 128; neither the result nor the shape of a gradient shows it.

    The reductions are those for GPUs; the other tests run those for CPUs.
    """
    monkeypatch.setattr(module, "PADDED_FROM", 1)
    monkeypatch.setattr(stored_logits, "current_target", lambda: Target("gpu", "sm_90"))
    inputs = draw(0)
    assert jax.eval_shape(module._padded, inputs[1]).shape == (128, WIDTH)
    # A function of its own: others are compiled without padding.
    found = jax.jit(partial(loss_and_gradients, chunk_size=KEPT))(*jax.device_put(inputs))
    for a, b in zip(jax.device_get(found), plain(*inputs), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "kept"),
    [
        ("cpu", "bfloat16", 1000, False),
        ("cpu", "float32", 1000, True),
        ("cpu", "float32", 10**5, False),
        ("gpu", "bfloat16", 64, True),
        ("gpu", "bfloat16", 10**6, False),
    ],
)
def test_logits_are_stored_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, platform: Platform, dtype: str, tokens: int, kept: bool
) -> None:
    monkeypatch.setattr(module, "current_target", lambda: Target(platform, ""))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    abstract: Any = jax.ShapeDtypeStruct  # JAX gives no types
    x, w = abstract((tokens, 64), dtype), abstract((5000, 64), "float32")
    labels = abstract((tokens,), "int32")

    def gradient(x: Any, w: Any, labels: Any) -> Any:
        return jax.grad(lambda x: linear_cross_entropy(x, w, labels).sum())(x)

    text = str(jax.make_jaxpr(gradient)(x, w, labels))
    assert bool(re.search(rf"f\d+\[{tokens},5(000|120)\]", text)) == kept


def test_labels_of_padded_rows_are_outside_the_vocabulary() -> None:
    x, w, labels, dloss = draw(10)
    labels[0, 0] = VOCAB - 1

    @jax.jit
    def run(x: Any, w: Any, labels: Any, dloss: Any) -> Any:
        call = partial(linear_cross_entropy, labels=labels, vocab_size=VOCAB - 1, chunk_size=20)
        loss, pull = jax.vjp(call, x, w)
        return loss, pull(dloss)[0]

    loss, dx = jax.device_get(run(*jax.device_put((x, w, labels, dloss))))
    assert np.isnan(loss[0, 0])
    assert np.all(np.isnan(dx[0, 0]))
    assert np.all(np.isfinite(loss[1:]))


def test_ignored_tokens_keep_their_lse_and_its_gradient() -> None:
    x, w, labels, dloss = draw(8)
    labels[:] = IGNORED
    arrays = jax.device_put((x, w, labels, dloss, np.ones_like(dloss)))
    loss, lse, dx, _ = jax.device_get(compute_with_lse(*arrays, options=(("z_loss", 0.3),)))
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_allclose(lse, oracle(x, w, labels, dloss)[1], rtol=1e-5)
    assert np.abs(dx).min() > 0


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (0,), (2, 0)])
def test_any_token_axes(lead: tuple[int, ...]) -> None:
    inputs = draw(1, lead)
    found = jax.device_get(compute(*jax.device_put(inputs), chunk_size=20))
    for a, b in zip(found, plain(*inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 20, KEPT])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_activations_with_float32_weights(dtype: str, chunk_size: ChunkSize) -> None:
    x, w, labels, dloss = draw(2, dtype=dtype)
    w = w.astype(dtype).astype(np.float32)  # so that the oracle sees what the products see
    found = jax.device_get(compute(*jax.device_put((x, w, labels, dloss)), chunk_size=chunk_size))
    assert [a.dtype for a in found] == [np.float32, dtype, np.float32]
    loss, dx, dw = plain(x, w, labels, dloss)
    # Logits are float32, and kept ones of x's dtype: of up to 8, rounded to 1 / 32 of bfloat16.
    atol = 0.03 if chunk_size == KEPT else 1e-5
    np.testing.assert_allclose(found[0], loss, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(found[1].astype(np.float32), dx, atol=0.03)
    np.testing.assert_allclose(found[2], dw, atol=0.03)


@pytest.mark.parametrize("chunk_size", [None, 20, KEPT])
@pytest.mark.parametrize("label", [VOCAB, -1, 10**6])
def test_a_label_outside_the_vocabulary_gives_nan(label: int, chunk_size: ChunkSize) -> None:
    x, w, labels, dloss = draw(3)
    labels[1, 2] = label
    loss, dx, dw = jax.device_get(
        compute(*jax.device_put((x, w, labels, dloss)), chunk_size=chunk_size)
    )
    assert np.isnan(loss[1, 2])
    assert np.isnan(loss).sum() == 1
    assert np.isnan(dx[1, 2]).all()
    assert np.isnan(dw).any()


def test_ignored_tokens_change_nothing() -> None:
    x, w, labels, dloss = draw(4)
    full = jax.device_get(compute(*jax.device_put((x, w, labels, dloss)), chunk_size=20))
    x[labels == IGNORED] = 7
    dloss[labels == IGNORED] = np.nan
    other = jax.device_get(compute(*jax.device_put((x, w, labels, dloss)), chunk_size=20))
    for a, b in zip(full, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_extreme_logits_stay_finite() -> None:
    x, w, labels, dloss = draw(5)
    for chunk_size in (None, 20, KEPT):
        arrays = jax.device_put((100 * x, 100 * w, labels, dloss))
        for array in jax.device_get(compute(*arrays, chunk_size=chunk_size)):
            assert np.all(np.isfinite(array))


ALL = (("z_loss", 1e-4), ("label_smoothing", 0.1), ("soft_cap", 30.0))


@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
def test_logits_are_never_all_in_memory(options: tuple[tuple[str, Any], ...]) -> None:
    tokens, vocab, width = 4096, 16381, 16  # 256 MiB of logits
    lead = (4, tokens // 4)
    kinds: list[Any] = [((*lead, width), np.float32), ((vocab, width), np.float32)]
    kinds += [(lead, np.int32), (lead, np.float32), (lead, np.float32)]
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]  # type: ignore[no-untyped-call]
    for chunk_size, part in ((None, 6), (256, 20)):
        static = (*options, ("chunk_size", chunk_size))
        compiled: Any = compute_with_lse.lower(*shapes, options=static).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / part


def test_chunk_counts_divide_the_vocabulary_if_possible() -> None:
    assert chunk_count(50304, 5000) == 12
    assert chunk_count(50257, 1024) == 29  # 29 * 1733
    assert chunk_count(50257, 10000) == 6  # leaves a tail of one row
    assert chunk_count(8, 8) == 1
    assert chunk_count(8, 1) == 8


def sharded_compile(
    mesh: Mesh, specs: Any, lead: tuple[int, ...], vocab: int, chunk_size: int | None
) -> str:
    inputs = draw(6, lead, vocab)
    shardings = [NamedSharding(mesh, PartitionSpec(*s)) for s in specs]  # type: ignore[no-untyped-call]
    arrays = jax.device_put(list(inputs), shardings)
    compiled = compute.lower(*arrays, chunk_size=chunk_size).compile()
    for a, b in zip(compiled(*arrays), plain(*inputs), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-5, atol=2e-5)
    return compiled.as_text() or ""


@pytest.mark.parametrize("chunk_size", [None, 20])
@pytest.mark.parametrize("lead", [(8, 5), (40,)])
def test_sharded_tokens_are_not_gathered(lead: tuple[int, ...], chunk_size: int | None) -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    hlo = sharded_compile(mesh, [("data",), (), ("data",), ("data",)], lead, VOCAB, chunk_size)
    assert re.findall(r"all-gather|all-to-all|collective-permute", hlo) == []


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_sharded_weight_rows_are_not_gathered(chunk_size: int | None) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    specs = [("data",), ("tensor",), ("data",), ("data",)]
    hlo = sharded_compile(mesh, specs, (8, 5), 64, chunk_size)
    assert re.findall(r"all-gather|all-to-all|collective-permute", hlo) == []


MISTAKES: dict[str, tuple[Any, ...]] = {
    "width": ((2, 3), (5, 4), (2,), {}, r"x, w: got shapes \(2, 3\) and \(5, 4\)"),
    "rank": ((2, 3), (3,), (2,), {}, r"and \(3,\); expected"),
    "labels": ((2, 3), (5, 3), (3,), {}, r"labels: got shape \(3,\).*\(2,\)"),
    "chunk_size": ((2, 3), (5, 3), (2,), {"chunk_size": 0}, "chunk_size: got 0"),
    "vocab_size": ((2, 3), (5, 3), (2,), {"vocab_size": 6}, r"vocab_size: got 6.*\(5, 3\)"),
    "no vocabulary": ((2, 3), (5, 3), (2,), {"vocab_size": 0}, "vocab_size: got 0"),
    "z_loss": ((2, 3), (5, 3), (2,), {"z_loss": -1.0}, "z_loss: got -1.0.*>= 0"),
    "smoothing": ((2, 3), (5, 3), (2,), {"label_smoothing": 1.1}, "got 1.1.*from 0 to 1"),
    "soft_cap": ((2, 3), (5, 3), (2,), {"soft_cap": 0.0}, "soft_cap: got 0.0.*None for no cap"),
    "several": (
        (2, 3),
        (5, 4),
        (2,),
        {"z_loss": float("nan")},
        r"(?s)\(5, 4\).*z_loss: got nan",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_arguments_raise(name: str) -> None:
    x, w, labels, options, message = MISTAKES[name]
    arrays = (np.ones(x, np.float32), np.ones(w, np.float32), np.ones(labels, np.int32))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*jax.device_put(arrays), **options)


def test_bias_of_another_length_raises() -> None:
    x, w, labels, bias = jax.device_put(
        (np.ones((2, 3)), np.ones((5, 3)), np.ones(2, np.int32), np.ones(4, np.int32))
    )
    with pytest.raises(ValueError, match=r"(?s)bias: got shape \(4,\).*bias: got int32"):
        linear_cross_entropy(x, w, labels, bias=bias)


def test_wrong_dtypes_raise() -> None:
    arrays = jax.device_put((np.ones((2, 3), np.int32), np.ones((5, 3)), np.ones(2)))
    with pytest.raises(ValueError, match=r"(?s)x: got int32.*labels: got float32"):
        linear_cross_entropy(*arrays)
