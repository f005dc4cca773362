"""Backend contract: tests that every attention backend inherits."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import oracle

from tjx_kernels import flash_attention, implementations_for
from tjx_kernels.attention.call import describe_call

ARRAYS = ("q_segment_ids", "kv_segment_ids", "q_offset", "bias", "alibi_slopes", "dropout_key")


def islands(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Some blocks fully visible, some partly and some masked, by batch row and head."""
    near = (query // 64 == key // 64) & (head % 2 == 0)
    return near | (key < 10 + 50 * batch) | ((key > 150) & (query > 100))


def sinks(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """The last 40 keys and the first ones, whatever the batch row and head."""
    del batch, head
    return (query - key < 40) | (key < 20)


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; few distinct sizes keep the compile time to seconds.

    `shape` is batch, q_len, kv_len, heads, kv_heads; the head_dim comes from the implementation.
    """

    shape: tuple[int, int, int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    segments: int = 0
    bias: tuple[int, int] | None = None
    alibi: bool = False
    offset: tuple[int, ...] = ()  # one for each batch row, known only when the program runs
    wide_values: bool = False


CASES = {
    "plain": Case((2, 9, 13, 4, 4)),
    "long-and-odd": Case((1, 300, 259, 2, 1)),
    "causal": Case((2, 37, 37, 4, 2), {"causal": True}),
    "causal-long": Case((1, 1160, 1160, 2, 1), {"causal": True}),
    "causal-more-keys": Case((1, 140, 300, 2, 2), {"causal": True, "q_offset": 160}),
    "causal-dead-rows": Case((1, 300, 170, 2, 2), {"causal": True, "q_offset": -150}),
    "window-within-chunk": Case((1, 300, 300, 2, 1), {"causal": True, "window": 7}),
    "window-over-chunks": Case((1, 300, 300, 2, 1), {"causal": True, "window": 250}),
    "window-two-sided": Case((1, 200, 200, 2, 1), {"window": 20}),
    "window-symmetric": Case((1, 300, 300, 2, 1), {"window": 20, "symmetric_window": True}),
    "window-past-all-keys": Case((1, 200, 20, 2, 1), {"window": 5, "q_offset": 10}),
    "soft-cap-and-scale": Case((2, 37, 37, 4, 1), {"soft_cap": 1.5, "scale": 0.7}),
    "segments": Case((2, 150, 170, 2, 1), segments=5),
    "offset-of-each-row": Case((2, 131, 150, 2, 1), {"causal": True}, offset=(-40, 60)),
    "everything": Case(
        (2, 200, 260, 4, 2), {"causal": True, "window": 100, "soft_cap": 2.0, "q_offset": 60}, 3
    ),
    "alibi": Case((2, 37, 45, 4, 2), {"causal": True, "q_offset": 8}, alibi=True),
    "bias": Case((2, 37, 45, 4, 2), bias=(2, 4)),
    "bias-for-all": Case((2, 150, 170, 4, 2), {"soft_cap": 3.0}, bias=(1, 1)),
    "bias-of-heads": Case((2, 150, 170, 4, 2), {"causal": True}, segments=3, bias=(1, 4)),
    "dropout": Case((2, 150, 170, 4, 2), {"causal": True, "dropout_rate": 0.3}),
    "mask-function": Case((2, 300, 260, 4, 2), {"mask": islands}),
    "mask-function-and-others": Case(
        (2, 200, 260, 4, 2), {"causal": True, "mask": sinks}, 3, bias=(1, 4), offset=(60, -30)
    ),
    "wide-values": Case((1, 140, 150, 4, 2), {"causal": True}, wide_values=True),
}


# Parameters of the contract's tests, and the values whose ideas other values have too. An
# interpreted kernel takes seconds for each: only the nightly job runs those.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "name": tuple(CASES),
    "head_dim": (64, 80, 96, 128, 256),
    "lengths": ((0, 5), (5, 0), (0, 0), (1, 1), (1, 5), (5, 1)),
    "half": ("bfloat16", "float16"),
}
REPEATED: dict[str, set[Any]] = {
    "name": {
        "plain",
        "causal",
        "causal-long",
        "window-over-chunks",
        "segments",
        "bias-of-heads",
        "mask-function-and-others",
    },
    "head_dim": {64, 96, 128},
    "lengths": {(1, 5), (5, 1)},
    "half": {"float16"},
}


# Head dimensions and dtypes for which kernels are lowered, without running them.
LOWERED = [
    (64, "bfloat16"), (80, "float32"), (128, "bfloat16"), (256, "float32"),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [
            (64, "float32"), (80, "bfloat16"), (96, "bfloat16"), (96, "float32"),
            (128, "float32"), (256, "bfloat16"),
        ]
    ),
]  # fmt: skip


def draw(seed: int, case: Case, head_dim: int, dtype: str = "float32") -> dict[str, Any]:
    """Random inputs and cotangents of a case, rounded to its dtype."""
    rng = np.random.default_rng(seed)
    batch, q_len, kv_len, heads, kv_heads = case.shape
    v_dim = 2 * head_dim if case.wide_values else head_dim
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, v_dim),
        "dout": (batch, q_len, heads, v_dim),
    }
    inputs: dict[str, Any] = {
        name: rng.standard_normal(s).astype(_dtype(dtype)) for name, s in shapes.items()
    }
    inputs["dlse"] = rng.standard_normal((batch, heads, q_len)).astype(np.float32)
    if case.segments:
        for name, length in (("q_segment_ids", q_len), ("kv_segment_ids", kv_len)):
            ids = rng.integers(0, case.segments, (batch, length)).astype(np.int32)
            inputs[name] = np.sort(ids, axis=1)
    if case.bias is not None:
        bias = rng.standard_normal((*case.bias, q_len, kv_len))
        bias[rng.random(bias.shape) < 0.1] = -np.inf  # a mask is a bias too
        inputs["bias"] = bias.astype(np.float32)
    if case.alibi:
        inputs["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if case.offset:
        inputs["q_offset"] = np.array(case.offset, np.int32)
    return inputs


def _dtype(name: str) -> Any:
    return jnp.dtype(name)  # unlike NumPy's, it knows bfloat16


# --- the code under test --------------------------------------------------------------------------


@cache
def _compiled(implementation: str, interpret: bool, options: tuple[Any, ...]) -> Any:
    """One jitted function an implementation and set of static options; it compiles once a shape."""

    def run(inputs: dict[str, Any]) -> Any:
        given = {name: inputs[name] for name in ARRAYS if name in inputs}
        bias = given.pop("bias", None)

        def both(q: Any, k: Any, v: Any, bias: Any) -> Any:
            call: Any = partial(
                flash_attention, implementation=implementation, interpret=interpret, bias=bias
            )
            return call(q, k, v, return_lse=True, **given, **dict(options))

        (out, lse), pull = jax.vjp(both, *(inputs[name] for name in "qkv"), bias)
        dq, dk, dv, dbias = pull((inputs["dout"], inputs["dlse"].astype(lse.dtype)))
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        return found if bias is None else {**found, "dbias": dbias}

    return jax.jit(run)


def assert_agrees(found: Any, wanted: Any, tolerance: float) -> None:
    """Errors are relative to the size of the whole array: a sum of n terms errs by more."""
    assert found.keys() == wanted.keys()
    for name, b in wanted.items():
        size = 1 + np.max(np.abs(np.where(np.isinf(b), 0, b)), initial=0)
        a = np.asarray(found[name], np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=name)


class AttentionContract:
    """The meaning of `flash_attention`, for the implementation named by the subclass."""

    implementation: ClassVar[str]
    interpret: ClassVar[bool] = False
    head_dim: ClassVar[int] = 8
    dtype: ClassVar[str] = "float32"
    tolerance: ClassVar[float] = 1e-5
    draws: ClassVar[int] = 20
    refuses: ClassVar[frozenset[str]] = frozenset()  # cases and dtypes that it says it cannot serve

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name in PARAMETERS.keys() & set(metafunc.fixturenames):
            values = [
                pytest.param(
                    value,
                    marks=pytest.mark.slow if self.interpret and value in REPEATED[name] else (),
                    id="-".join(map(str, value)) if isinstance(value, tuple) else str(value),
                )
                for value in PARAMETERS[name]
            ]
            metafunc.parametrize(name, values)

    def draw(self, seed: int, case: Case, dtype: str | None = None) -> dict[str, Any]:
        return draw(seed, case, self.head_dim, dtype or self.dtype)

    def compute(self, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        run = _compiled(self.implementation, self.interpret, tuple(sorted(options.items())))
        result: dict[str, Any] = jax.device_get(run(jax.device_put(inputs)))
        return result

    def reason(self, inputs: dict[str, Any], **options: Any) -> str | None:
        """Ask why the implementation refuses a call; None if it serves."""
        names = ("q", "k", "v", *ARRAYS)
        arrays = jax.device_put({name: inputs[name] for name in names if name in inputs})
        call = describe_call(**arrays, **options, return_lse=True, interpret=self.interpret)
        # A reason of its own is wanted, not that it needs another machine.
        return implementations_for(call)[self.implementation]

    def check(self, inputs: dict[str, Any], **options: Any) -> None:
        assert_agrees(self.compute(inputs, **options), oracle(inputs, **options), self.tolerance)

    def test_agrees_with_oracle(self, name: str) -> None:
        case = CASES[name]
        inputs = self.draw(1, case)
        if "dropout_rate" in case.options:
            with jax.transfer_guard("allow"):
                inputs["dropout_key"] = jax.random.key(3)
        reason = self.reason(inputs, **case.options)
        assert (reason is not None) == (name in self.refuses), reason
        if reason is None:
            self.check(inputs, **case.options)

    def test_head_dims(self, head_dim: int) -> None:
        case = Case((1, 70, 81, 2, 1), {"causal": True, "q_offset": 11})
        self.check(draw(2, case, head_dim, self.dtype), **case.options)

    def test_traced_offsets_and_segments(self) -> None:
        rng = np.random.default_rng(3)
        for seed in range(self.draws):
            offset = tuple(int(x) for x in rng.integers(-200, 60, 2))
            segments = int(rng.integers(1, 5))
            case = Case((2, 131, 40, 2, 1), segments=segments, offset=offset)
            self.check(self.draw(seed, case), causal=True, window=30)

    def test_segments_in_any_order(self) -> None:
        case = Case((2, 150, 170, 2, 1), segments=4)
        inputs = self.draw(4, case)
        for name in ("q_segment_ids", "kv_segment_ids"):
            np.random.default_rng(4).shuffle(inputs[name], axis=1)
        self.check(inputs)

    def test_decoding_reads_the_window_of_a_long_cache(self) -> None:
        for offset in (0, 5, 250, 399):
            case = Case((2, 1, 400, 4, 2), offset=(offset, offset // 2))
            self.check(self.draw(5, case), causal=True, window=20)

    def test_shortest_lengths(self, lengths: tuple[int, int]) -> None:
        self.check(self.draw(6, Case((2, *lengths, 4, 2))), causal=True)

    def test_causality_is_exact(self) -> None:
        """The gradient of one row's output is zero for all later keys, bit for bit."""
        rows = np.array([0, 1, 63, 64, 127, 128, 132])
        inputs = self.draw(7, Case((len(rows), 133, 133, 1, 1)))
        inputs["dout"][:] = 0
        inputs["dlse"][:] = 0
        inputs["dout"][np.arange(len(rows)), rows] = 1
        found = self.compute(inputs, causal=True)
        for i, row in enumerate(rows):
            assert np.all(found["dk"][i, row + 1 :] == 0)
            assert np.all(found["dv"][i, row + 1 :] == 0)
            assert np.all(found["dv"][i, : row + 1] != 0)
            assert np.all(np.delete(found["dq"][i], row, axis=0) == 0)

    def test_segments_equal_separate_calls(self) -> None:
        inputs = self.draw(8, Case((1, 150, 150, 2, 1)))
        ids = np.repeat(np.array([0, 1, 2], np.int32), (40, 11, 99))[None]
        packed = {**inputs, "q_segment_ids": ids, "kv_segment_ids": ids}
        found = self.compute(packed, causal=True)
        for start, stop in ((0, 40), (40, 51), (51, 150)):

            def cut(name: str, x: Any, span: Any = slice(start, stop)) -> Any:
                return x[:, :, span] if name.endswith("lse") else x[:, span]

            part = {name: cut(name, x) for name, x in inputs.items()}
            ours = {name: cut(name, x) for name, x in found.items()}
            assert_agrees(ours, oracle(part, causal=True), self.tolerance)

    def test_dead_rows_are_zero_for_any_cotangent(self) -> None:
        inputs = self.draw(9, Case((1, 140, 140, 2, 1)))
        inputs["q_segment_ids"] = np.where(np.arange(140) % 3 == 0, 9, 1)[None].astype(np.int32)
        inputs["kv_segment_ids"] = np.ones((1, 140), np.int32)
        dead = inputs["q_segment_ids"][0] == 9
        clean = self.compute(inputs)
        assert np.all(clean["out"][0, dead] == 0)
        assert np.all(clean["lse"][0, :, dead] == -np.inf)
        assert np.all(clean["dq"][0, dead] == 0)
        assert_agrees(clean, oracle(inputs), self.tolerance)
        # A merge of partial results, as in ring attention, sends such NaNs back. That what came
        # out is the same to the last bit shows too that the backward pass is deterministic.
        inputs["dout"][:, dead] = np.nan
        inputs["dlse"][:, :, dead] = np.nan
        for name, x in self.compute(inputs).items():
            np.testing.assert_array_equal(clean[name], x)

    def test_half_precision_is_as_exact_as_plain_xla(self, half: str) -> None:
        inputs = self.draw(10, Case((2, 140, 140, 4, 2)), half)
        inputs["dlse"][:] = 0  # the plain computation has no LSE to differentiate
        found, wanted = self.compute(inputs, causal=True), oracle(inputs, causal=True)
        for name, x in found.items():
            assert x.dtype == ("float32" if name == "lse" else half), name
        np.testing.assert_allclose(found["lse"], wanted["lse"], atol=max(1e-5, self.tolerance / 8))
        for name, theirs in _plain(inputs).items():
            error, allowed = (
                np.max(np.abs(np.asarray(x, np.float64) - wanted[name]))
                for x in (found[name], theirs)
            )
            assert error <= 2 * allowed, name

    def test_extreme_scores_stay_finite(self) -> None:
        inputs = self.draw(11, Case((1, 20, 20, 2, 2)))
        for name in ("q", "k"):
            inputs[name] *= np.asarray(100, inputs[name].dtype)
        for x in self.compute(inputs, causal=True).values():
            assert np.all(np.isfinite(np.asarray(x, np.float32)))

    def test_float64_is_computed_in_float64_or_unsupported(self) -> None:
        with jax.enable_x64(True):
            inputs = self.draw(12, Case((1, 140, 140, 2, 1)), "float64")
            options: dict[str, Any] = {"causal": True, "soft_cap": 2.0}
            reason = self.reason(inputs, **options)
            assert (reason is not None) == ("float64" in self.refuses), reason
            if reason is None:
                found = self.compute(inputs, **options)
                assert_agrees(found, oracle(inputs, **options), 1e-13)

    def test_vmap_equals_a_loop(self) -> None:
        inputs = self.draw(13, Case((3, 70, 70, 2, 1)))
        names = ("q", "k", "v", "dout")
        offsets = np.array([0, -3, 5], np.int32)

        def call(q: Any, k: Any, v: Any, dout: Any, offset: Any) -> Any:
            attend: Any = partial(
                flash_attention, implementation=self.implementation, interpret=self.interpret
            )
            out, pull = jax.vjp(partial(attend, causal=True, q_offset=offset), q, k, v)
            return (out, *pull(dout))

        arrays = jax.device_put((*(inputs[x][:, None] for x in names), offsets))
        found = jax.device_get(jax.jit(jax.vmap(call))(*arrays))
        for i, offset in enumerate(offsets):
            one = {x: a[i : i + 1] for x, a in inputs.items()}
            one["dlse"] = 0 * one["dlse"]
            wanted = oracle(one, causal=True, q_offset=int(offset))
            del wanted["lse"]
            ours = {name: x[i] for name, x in zip(wanted, found, strict=True)}
            assert_agrees(ours, wanted, self.tolerance)


def _plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """Causal attention as people write it in JAX, in the inputs' dtype."""
    group = inputs["q"].shape[2] // inputs["k"].shape[2]

    def attend(q: Any, k: Any, v: Any) -> Any:
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(np.float32) * q.shape[3] ** -0.5
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(q.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    @jax.jit
    def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(dout))

    found = jax.device_get(run(*jax.device_put([inputs[x] for x in ("q", "k", "v", "dout")])))
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))
