"""What every implementation of attention must do; each one inherits the whole of it."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tjx_kernels import flash_attention

# --- an oracle of our own: NumPy, float64, one head at a time, gradients by hand --------------


def oracle(
    inputs: dict[str, Any],
    *,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: Any = 0,
) -> Any:
    """Give out, lse and the gradients of sum(out * dout) + sum(lse * dlse over live rows)."""
    q, k, v, dout = (np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "dout"))
    dlse = np.asarray(inputs["dlse"], np.float64)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = np.zeros_like(q), np.full(dlse.shape, -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    position = q_offset + np.arange(q.shape[1])[:, None]
    key = np.arange(k.shape[1])[None, :]
    for b in range(q.shape[0]):
        sees = np.ones((q.shape[1], k.shape[1]), bool)
        if causal:
            sees &= key <= position
        if window is not None:
            sees &= position - key < window
        if "q_segment_ids" in inputs:
            sees &= np.equal.outer(inputs["q_segment_ids"][b], inputs["kv_segment_ids"][b])
        live = sees.any(1)
        for n in range(q.shape[2]):
            m = n // (q.shape[2] // k.shape[2])
            raw = scale * q[b, :, n] @ k[b, :, m].T
            s = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
            weight = np.where(sees, np.exp(s - s.max(initial=0)), 0)
            total = np.where(live, weight.sum(1), 1)
            p = weight / total[:, None]
            out[b, :, n] = p @ v[b, :, m]
            lse[b, n] = np.where(live, np.log(total) + s.max(initial=0), -np.inf)
            dp = dout[b, :, n] @ v[b, :, m].T
            ds = p * (dp - (p * dp).sum(1)[:, None] + dlse[b, n][:, None])
            if soft_cap is not None:
                ds *= 1 - np.tanh(raw / soft_cap) ** 2
            dq[b, :, n] += scale * ds @ k[b, :, m]
            dk[b, :, m] += scale * ds.T @ q[b, :, n]
            dv[b, :, m] += p.T @ dout[b, :, n]
    return out, lse, dq, dk, dv


def draw(
    seed: int,
    batch: int,
    q_len: int,
    kv_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    segments: int = 0,
) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, head_dim),
        "dout": (batch, q_len, heads, head_dim),
        "dlse": (batch, heads, q_len),
    }
    inputs = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    if segments:
        for name, length in (("q_segment_ids", q_len), ("kv_segment_ids", kv_len)):
            ids = rng.integers(0, segments, (batch, length)).astype(np.int32)
            inputs[name] = np.sort(ids, axis=1)
    return inputs


@cache
def compiled(implementation: str, options: dict[str, Any]) -> Any:
    """One jitted function an implementation and set of static options; it compiles once a shape."""

    def run(inputs: dict[str, Any], q_offset: Any = None) -> Any:
        rest = {name: x for name, x in inputs.items() if name.endswith("ids")}
        static = dict(options)
        if q_offset is not None:
            static["q_offset"] = q_offset

        def both(q: Any, k: Any, v: Any) -> Any:
            call = partial(flash_attention, return_lse=True, implementation=implementation)
            return call(q, k, v, **rest, **static)

        (out, lse), pull = jax.vjp(both, inputs["q"], inputs["k"], inputs["v"])
        return (out, lse, *pull((inputs["dout"].astype(out.dtype), inputs["dlse"])))

    return jax.jit(run)


def compute(
    implementation: str, inputs: dict[str, Any], q_offset: Any = None, **options: Any
) -> Any:
    run = compiled(implementation, tuple(sorted(options.items())))
    given = jax.device_put((inputs, None if q_offset is None else np.int32(q_offset)))
    return jax.device_get(run(*given))


NAMES = ("out", "lse", "dq", "dk", "dv")


def assert_agrees(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        # Errors are relative to the size of the whole array: a sum of n terms errs by more.
        size = 1 + np.max(np.abs(np.where(np.isinf(b), 0, b)), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=name)


@dataclass(frozen=True)
class Case:
    """Shapes are few, so that compiling stays a matter of seconds."""

    shape: tuple[int, int, int, int, int, int]  # batch, q_len, kv_len, heads, kv_heads, head_dim
    options: dict[str, Any] = field(default_factory=dict)
    segments: int = 0


CASES = {
    "plain": Case((2, 9, 13, 4, 4, 8)),
    "long-and-odd": Case((1, 300, 259, 2, 1, 8)),
    "causal": Case((2, 37, 37, 4, 2, 8), {"causal": True}),
    "causal-long": Case((1, 1160, 1160, 2, 1, 4), {"causal": True}),
    "causal-more-keys": Case((1, 140, 300, 2, 2, 4), {"causal": True, "q_offset": 160}),
    "causal-dead-rows": Case((1, 300, 170, 2, 2, 4), {"causal": True, "q_offset": -150}),
    "window-within-chunk": Case((1, 300, 300, 2, 1, 4), {"causal": True, "window": 7}),
    "window-over-chunks": Case((1, 300, 300, 2, 1, 4), {"causal": True, "window": 250}),
    "window-two-sided": Case((1, 200, 200, 2, 1, 4), {"window": 20}),
    "window-past-all-keys": Case((1, 200, 20, 2, 1, 4), {"window": 5, "q_offset": 10}),
    "soft-cap-and-scale": Case((2, 37, 37, 4, 1, 8), {"soft_cap": 1.5, "scale": 0.7}),
    "segments": Case((2, 150, 170, 2, 1, 4), segments=5),
    "everything": Case(
        (2, 200, 260, 4, 2, 80), {"causal": True, "window": 100, "soft_cap": 2.0, "q_offset": 60}, 3
    ),
}


class AttentionContract:
    """The meaning of `flash_attention`, for the implementation named by the subclass."""

    implementation: ClassVar[str]
    tolerance: ClassVar[float] = 1e-5

    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_oracle(self, name: str) -> None:
        case = CASES[name]
        inputs = draw(1, *case.shape, case.segments)
        found = compute(self.implementation, inputs, **case.options)
        assert_agrees(found, oracle(inputs, **case.options), self.tolerance)

    # The subclasses share this method on purpose; what Hypothesis warns of is meant.
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(offset=st.integers(-200, 60), segments=st.integers(1, 4), seed=st.integers(0, 2**20))
    def test_any_offset_known_only_when_it_runs(
        self, offset: int, segments: int, seed: int
    ) -> None:
        inputs = draw(seed, 1, 131, 40, 2, 1, 4, segments=segments)
        options: dict[str, Any] = {"causal": True, "window": 30}
        found = compute(self.implementation, inputs, q_offset=offset, **options)
        assert_agrees(found, oracle(inputs, q_offset=offset, **options), self.tolerance)

    def test_decoding_reads_the_window_of_a_long_cache(self) -> None:
        inputs = draw(2, 2, 1, 400, 4, 2, 8)
        for offset in (0, 5, 250, 399):
            options: dict[str, Any] = {"causal": True, "window": 20}
            found = compute(self.implementation, inputs, q_offset=offset, **options)
            assert_agrees(found, oracle(inputs, q_offset=offset, **options), self.tolerance)

    @pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 5), (5, 1)])
    def test_shortest_lengths(self, q_len: int, kv_len: int) -> None:
        inputs = draw(3, 2, q_len, kv_len, 4, 2, 8)
        found = compute(self.implementation, inputs, causal=True)
        assert_agrees(found, oracle(inputs, causal=True), self.tolerance)

    def test_causality_is_exact(self) -> None:
        rows = np.array([0, 1, 127, 128, 255, 256, 260])
        inputs = draw(4, 1, 261, 261, 1, 1, 4)
        call = partial(flash_attention, causal=True, implementation=self.implementation)

        @jax.jit
        def gradients(q: Any, k: Any, v: Any, pick: Any) -> Any:
            _, pull = jax.vjp(call, q, k, v)
            return jax.vmap(pull)(pick)

        pick = np.zeros((len(rows), 1, 261, 1, 4), np.float32)
        pick[np.arange(len(rows)), 0, rows] = 1
        arrays = jax.device_put((inputs["q"], inputs["k"], inputs["v"], pick))
        dq, dk, dv = jax.device_get(gradients(*arrays))
        for i, row in enumerate(rows):
            assert np.all(dk[i, 0, row + 1 :] == 0)
            assert np.all(dv[i, 0, row + 1 :] == 0)
            assert np.all(dv[i, 0, : row + 1] != 0)
            assert np.all(np.delete(dq[i, 0], row, axis=0) == 0)

    def test_segments_equal_separate_calls(self) -> None:
        inputs = draw(5, 1, 150, 150, 2, 1, 4)
        ids = np.repeat(np.array([0, 1, 2], np.int32), (40, 11, 99))[None]
        packed = {**inputs, "q_segment_ids": ids, "kv_segment_ids": ids}
        found = compute(self.implementation, packed, causal=True)
        for name, axis, array in zip(NAMES, (1, 2, 1, 1, 1), found, strict=True):
            for segment, start in ((0, 0), (1, 40), (2, 51)):
                length = int(np.sum(ids == segment))
                part = {
                    key: x.take(np.arange(start, start + length), 2 if key == "dlse" else 1)
                    for key, x in inputs.items()
                }
                alone = dict(zip(NAMES, oracle(part, causal=True), strict=True))[name]
                cut = array.take(np.arange(start, start + length), axis)
                np.testing.assert_allclose(cut, alone, rtol=0, atol=self.tolerance * 10)

    def test_dead_rows_are_zero_whatever_arrives_for_them(self) -> None:
        inputs = draw(6, 1, 140, 140, 2, 1, 4)
        inputs["q_segment_ids"] = np.where(np.arange(140) % 3 == 0, 9, 1)[None].astype(np.int32)
        inputs["kv_segment_ids"] = np.ones((1, 140), np.int32)
        dead = inputs["q_segment_ids"][0] == 9
        clean = compute(self.implementation, inputs)
        assert np.all(clean[0][0, dead] == 0)
        assert np.all(clean[1][0, :, dead] == -np.inf)
        assert np.all(clean[2][0, dead] == 0)
        assert_agrees(clean, oracle(inputs), self.tolerance)
        # A merge of partial results, as in ring attention, sends such NaNs back.
        inputs["dout"][:, dead] = np.nan
        inputs["dlse"][:, :, dead] = np.nan
        for a, b in zip(clean, compute(self.implementation, inputs), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_as_exact_as_plain_xla(self, dtype: str) -> None:
        inputs = draw(7, 2, 140, 140, 4, 2, 16)
        inputs["dlse"][:] = 0  # the plain computation has no LSE to differentiate
        half = {x: a if x == "dlse" else a.astype(dtype) for x, a in inputs.items()}
        wanted = oracle(half, causal=True)
        found = compute(self.implementation, half, causal=True)
        assert [a.dtype for a in found] == [dtype, np.float32, dtype, dtype, dtype]
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)

        def plain(q: Any, k: Any, v: Any) -> Any:
            k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
            scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(np.float32) / 4
            seen = jnp.tril(jnp.ones((140, 140), bool))[None, None]
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(q.dtype)
            return jnp.einsum("bnts,bsnh->btnh", weights, v)

        @jax.jit
        def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(plain, q, k, v)
            return (out, *pull(dout))

        peer = jax.device_get(run(*jax.device_put([half[x] for x in ("q", "k", "v", "dout")])))
        for i, theirs in zip((0, 2, 3, 4), peer, strict=True):
            error, allowed = (
                np.max(np.abs(x.astype(np.float64) - wanted[i])) for x in (found[i], theirs)
            )
            assert error <= 2 * allowed, NAMES[i]

    def test_extreme_scores_stay_finite(self) -> None:
        inputs = draw(8, 1, 20, 20, 2, 2, 8)
        inputs["q"] *= 100
        inputs["k"] *= 100
        for array in compute(self.implementation, inputs, causal=True):
            assert np.all(np.isfinite(array))

    def test_float64_is_computed_in_float64(self) -> None:
        with jax.enable_x64(True):
            inputs = {x: a.astype(np.float64) for x, a in draw(9, 1, 140, 140, 2, 1, 4).items()}
            found = compute(self.implementation, inputs, causal=True, soft_cap=2.0)
            assert_agrees(found, oracle(inputs, causal=True, soft_cap=2.0), 1e-13)

    def test_vmap_equals_a_loop(self) -> None:
        inputs = draw(10, 3, 140, 140, 2, 1, 4)
        arrays = [inputs[x][:, None] for x in ("q", "k", "v")]
        offsets = np.array([0, -3, 5], np.int32)

        def call(q: Any, k: Any, v: Any, offset: Any) -> Any:
            name = self.implementation
            return flash_attention(q, k, v, causal=True, q_offset=offset, implementation=name)

        found = jax.device_get(jax.jit(jax.vmap(call))(*jax.device_put((*arrays, offsets))))
        for i, offset in enumerate(offsets):
            one = {x: a[i : i + 1] for x, a in inputs.items()}
            wanted = oracle(one, causal=True, q_offset=int(offset))[0]
            np.testing.assert_allclose(found[i], wanted, atol=1e-5)


class TestXla(AttentionContract):
    implementation = "xla"


class TestReference(AttentionContract):
    implementation = "reference"


def test_grouped_heads_share_neighbouring_keys() -> None:
    inputs = draw(11, 1, 6, 6, 4, 2, 8)
    spread = {**inputs, "k": inputs["k"].repeat(2, axis=2), "v": inputs["v"].repeat(2, axis=2)}
    grouped, full = compute("xla", inputs), compute("xla", spread)
    np.testing.assert_allclose(grouped[0], full[0], atol=1e-6)


def test_forward_mode_works_in_the_reference() -> None:
    inputs = draw(12, 1, 5, 5, 2, 2, 4)
    call = partial(flash_attention, causal=True, implementation="reference")
    arrays = jax.device_put([inputs[x] for x in ("q", "k", "v")])
    _, tangent = jax.jit(lambda *x: jax.jvp(call, x, x))(*arrays)
    assert np.all(np.isfinite(jax.device_get(tangent)))
    assert jnp.isdtype(tangent.dtype, "real floating")
