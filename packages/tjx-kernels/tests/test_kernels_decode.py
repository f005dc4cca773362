"""Decoding with a KV cache: results, and the keys that are read."""

import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_kernels import flash_attention
from tjx_kernels.attention.call import Operands, bind_arguments
from tjx_kernels.decode import RUN, _partial_results, decode_attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20, "sinks": True},
    "window-over-runs": {"window": RUN + 30, "soft_cap": 1.5, "scale": 0.7, "alibi": True},
}


def draw(
    new: int, max_len: int, dtype: str = "float32", heads: tuple[int, int] = (4, 2)
) -> dict[str, Any]:
    rng = np.random.default_rng(new)
    shapes = {
        "q": (5, new, heads[0], 8),
        "k": (5, max_len, heads[1], 8),
        "v": (5, max_len, heads[1], 6),
    }
    return {name: rng.standard_normal(s).astype(jnp.dtype(dtype)) for name, s in shapes.items()}


@cache
def compiled(which: str, options: tuple[Any, ...]) -> Any:
    given = dict(options)
    alibi, has_sinks = given.pop("alibi", False), given.pop("sinks", False)

    def run(x: dict[str, Any], lengths: Any) -> Any:
        heads = x["q"].shape[2]
        slopes = 2.0 ** -jnp.arange(1.0, heads + 1) if alibi else None
        sinks = jnp.linspace(-2, 3, heads) if has_sinks else None
        call: Any = partial(decode_attention, lengths=lengths)
        if which != "decode":
            offset = lengths - x["q"].shape[1]
            call = partial(flash_attention, causal=True, q_offset=offset, implementation=which)
        scales = {name: x[name] for name in ("k_scale", "v_scale") if name in x}
        return call(
            x["q"], x["k"], x["v"], return_lse=True, alibi_slopes=slopes, sinks=sinks,
            **given, **scales,
        )  # fmt: skip

    return jax.jit(run)


def run(which: str, inputs: dict[str, Any], lengths: Any, **options: Any) -> Any:
    arrays = jax.device_put((inputs, np.asarray(lengths, np.int32)))
    return jax.device_get(compiled(which, tuple(options.items()))(*arrays))


@pytest.mark.parametrize(("name", "new"), [("plain", 1), *((name, 3) for name in OPTIONS)])
def test_equals_attention_with_an_offset_for_each_row(name: str, new: int) -> None:
    max_len = 2 * RUN + 44
    inputs = draw(new, max_len)
    # None; fewer than the new ones; up to the edge of a run and past it; full.
    for lengths in (
        (0, 1, 2, RUN, RUN + 1),
        (max_len, 0, 2 * RUN, 2 * RUN + 1, 7),
        (2 * RUN, 2 * RUN - 1, 2 * RUN - 1, 0, 2 * RUN),
        (0, 0, 0, 0, 0),
    ):
        ours = run("decode", inputs, lengths, **OPTIONS[name])
        for other in ("reference", "xla") if name == "window" else ("reference",):
            for a, b in zip(ours, run(other, inputs, lengths, **OPTIONS[name]), strict=True):
                np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
        idle = np.array(lengths) == 0
        assert np.all(ours[0][idle] == 0)
        assert np.all(ours[1][idle] == -np.inf)


@pytest.mark.parametrize("max_len", [1, 40, RUN - 1, RUN, 4 * RUN])
def test_caches_shorter_and_longer_than_a_block(max_len: int) -> None:
    inputs = draw(1, max_len, heads=(3, 3))
    lengths = (0, 1, max_len, max_len // 2, max_len - 1)
    pairs = (run(which, inputs, lengths) for which in ("decode", "reference"))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "window"])
def test_int8_caches_are_those_of_their_products_with_the_scales(name: str) -> None:
    rng, inputs = np.random.default_rng(7), draw(3, RUN + 44)
    held, plain = {"q": inputs["q"]}, {"q": inputs["q"]}
    for x in "kv":
        held[x] = rng.integers(-127, 128, inputs[x].shape, np.int8)
        held[f"{x}_scale"] = rng.uniform(0.005, 0.02, held[x].shape[:3]).astype(np.float32)
        plain[x] = held[x] * held[f"{x}_scale"][..., None]
    lengths = (0, 3, RUN, RUN + 1, RUN + 44)
    pairs = (run("decode", given, lengths, **OPTIONS[name]) for given in (held, plain))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
    wrong: list[dict[str, Any]] = [
        {name: x for name, x in held.items() if name != "v_scale"},
        {**plain, "k_scale": held["k_scale"]},
        {**held, "k_scale": held["k_scale"][..., None]},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match=r"[kv]_scale: got .*expected"):
            run("decode", given, lengths)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    inputs = draw(2, 2 * RUN, dtype)
    lengths = (2, 50, RUN, RUN + 9, 2 * RUN)
    (ours, lse), (wanted, _) = (run(x, inputs, lengths) for x in ("decode", "reference"))
    assert str(ours.dtype) == dtype
    assert lse.dtype == np.float32
    np.testing.assert_allclose(
        ours.astype(np.float32), wanted.astype(np.float32), atol=0.02 if dtype[0] == "b" else 0.002
    )


def test_float64_is_computed_in_float64() -> None:
    with jax.enable_x64(True):
        inputs = draw(2, 2 * RUN, "float64")
        lengths = (2, 50, RUN, RUN + 9, 2 * RUN)
        pairs = (run(which, inputs, lengths) for which in ("decode", "reference"))
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize(("batch", "new", "max_len"), [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_empty_calls(batch: int, new: int, max_len: int) -> None:
    q, kv = (np.ones((batch, n, 4, 8), np.float32) for n in (new, max_len))
    arrays = jax.device_put((q, kv, kv, np.zeros(batch, np.int32)))
    out, lse = jax.jit(partial(decode_attention, return_lse=True))(*arrays)
    np.testing.assert_array_equal(jax.device_get(out), np.zeros(q.shape))
    np.testing.assert_array_equal(jax.device_get(lse), np.full((batch, 4, new), -np.inf))


def test_only_visible_key_blocks_are_read() -> None:
    """A run that is read would make the result NaN, even where it is masked: 0 * NaN."""
    inputs = draw(1, 8 * RUN)
    lengths = np.array([5 * RUN - 1, 0, 4 * RUN + 5, 5 * RUN, 0])
    clean = run("decode", inputs, lengths, window=RUN // 2)
    for first, stop in ((0, 3 * RUN), (5 * RUN, 8 * RUN)):
        inputs["v"][:, first:stop] = np.nan
    for a, b in zip(clean, run("decode", inputs, lengths, window=RUN // 2), strict=True):
        np.testing.assert_array_equal(a, b)
    inputs["v"][:, 3 * RUN : 5 * RUN] = np.nan
    assert np.isnan(run("decode", inputs, lengths, window=RUN // 2)[0]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_read_in_place(dtype: str) -> None:
    batch, max_len, kv_heads, head_dim = 3, 16 * RUN, 2, 16
    q = jax.ShapeDtypeStruct((batch, 1, 8, head_dim), dtype)  # type: ignore[no-untyped-call]
    kv: Any = jax.ShapeDtypeStruct((batch, max_len, kv_heads, head_dim), dtype)  # type: ignore[no-untyped-call]
    lengths = jax.ShapeDtypeStruct((batch,), np.int32)  # type: ignore[no-untyped-call]
    program = jax.jit(decode_attention).lower(q, kv, kv, lengths).compile()
    memory: Any = program.memory_analysis()
    size = batch * max_len * kv_heads * head_dim * kv.dtype.itemsize
    assert memory.temp_size_in_bytes < size / 2
    large = re.findall(
        rf"= \S*\[[0-9,]*\b{max_len}\b[0-9,]*\]\S* ([\w-]+)\(", program.as_text() or ""
    )
    assert set(large) == {"parameter", "get-tuple-element"}


def test_on_gpus_the_whole_cache_is_read_at_once_without_a_loop() -> None:
    """The host would wait for the device in every turn of a loop of unknown trip count."""
    inputs = draw(3, 2 * RUN + 44)
    lengths = np.array([0, 2, 2 * RUN, RUN + 1, 7], np.int32)
    arrays = jax.device_put((inputs["q"], inputs["k"], inputs["v"], lengths))
    for platform, loops in (("cuda", 0), ("cpu", 1)):
        lowered = jax.jit(decode_attention).trace(*arrays).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.while") == loops
    call, operands = bind_arguments(*arrays[:3], causal=True, q_offset=arrays[3], window=RUN)

    @jax.jit
    def both(operands: Operands) -> Any:
        return [_partial_results(call, operands, at_once=at_once) for at_once in (True, False)]

    at_once, by_runs = jax.device_get(both(operands))
    for a, b in zip(at_once, by_runs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)


def test_grows_by_one_token_as_a_whole_sequence_at_once() -> None:
    inputs = draw(7, 7)
    lengths = np.full(5, 7)
    whole = run("decode", inputs, lengths)[0]
    for t in range(7):
        one = {**inputs, "q": inputs["q"][:, t : t + 1]}
        np.testing.assert_allclose(
            run("decode", one, lengths - 6 + t)[0][:, 0], whole[:, t], atol=1e-6
        )


def test_vmap_equals_a_loop() -> None:
    inputs = draw(1, 2 * RUN + 3)
    lengths = np.array([0, 3, 2 * RUN + 3, RUN, 1], np.int32)
    wanted = run("decode", inputs, lengths, window=50)

    def one(x: Any, length: Any) -> Any:
        x = {name: a[None] for name, a in x.items()}
        return compiled("decode", (("window", 50),))(x, length[None])

    found = jax.device_get(jax.jit(jax.vmap(one))(*jax.device_put((inputs, lengths))))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a[:, 0], b, atol=1e-6)


def test_invalid_arguments_raise() -> None:
    q = jax.device_put(np.ones((2, 1, 4, 8), np.float32))
    kv = jax.device_put(np.ones((2, 9, 2, 8), np.float32))
    whole, real, three = (
        jax.device_put(x) for x in (np.ones(2, np.int32), np.ones(2), np.ones(3, np.int32))
    )
    for lengths in (real, three):
        with pytest.raises(ValueError, match=r"lengths: got .*expected int32 \[batch\], \[2\]"):
            decode_attention(q, kv, kv, lengths)
    with pytest.raises(ValueError, match="lengths: got"):
        decode_attention(q, kv, kv, q)
    flat, odd = (jax.device_put(np.ones(s, np.float32)) for s in ((2, 4, 8), (2, 1, 3, 8)))
    with pytest.raises(ValueError, match="q: got shape"):
        decode_attention(flat, kv, kv, whole)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        decode_attention(odd, kv, kv, whole)
    with pytest.raises(ValueError, match="window: got 0"):
        decode_attention(q, kv, kv, whole, window=0)
