"""XLA backend: memory, skipped blocks, remat, sharding, scan.

Its meaning is checked by the contract; here again only where a window slides over many chunks.
"""

import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from attention_contract import islands
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.attention.backends.xla import plan_bands
from tjx_kernels.attention.call import AttentionCall
from tjx_kernels.attention.support_table import PLAIN

CALL = replace(
    PLAIN, batch=1, heads=1, kv_heads=1, head_dim=8, v_head_dim=8, dtype="float32", scale=1.0
)


@given(
    q_len=st.integers(1, 1500),
    kv_len=st.integers(1, 1500),
    q_offset=st.none() | st.integers(-1600, 1600),
    mask=st.sampled_from(["none", "causal", "symmetric"]),
    window=st.none() | st.integers(1, 1600),
)
def test_bands_cover_every_row_once_and_its_visible_keys(
    q_len: int, kv_len: int, q_offset: int | None, mask: str, window: int | None
) -> None:
    call = replace(CALL, q_len=q_len, kv_len=kv_len, q_offset=q_offset, window=window)
    symmetric = mask == "symmetric" and window is not None
    call = replace(call, causal=mask == "causal", symmetric_window=symmetric)
    next_row = 0
    for band in plan_bands(call):
        assert band.start == next_row
        next_row += band.chunks * band.rows
        assert band.first_key >= 0
        assert band.width >= 1
        assert band.first_key + band.width <= kv_len
        for row in range(band.start, next_row, band.rows):
            # An offset that is not known may be any: try one that puts the window amid the keys.
            first = row + (kv_len // 2 if q_offset is None else q_offset)
            last = first + band.rows - 1
            seen_from = 0 if window is None else max(0, first - window + 1)
            seen_to = min(kv_len, last + 1) if mask == "causal" else kv_len
            if symmetric:
                assert window is not None
                seen_to = min(kv_len, last + window)
            if seen_from >= seen_to:
                continue
            read_from = band.first_key
            if band.slides:
                assert window is not None
                read_from = min(max(0, first - window + 1), kv_len - band.width)
            assert read_from <= seen_from
            assert seen_to <= read_from + band.width
    assert next_row == q_len


def shaped(*shape: int, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)  # type: ignore[no-untyped-call]


def work(call: AttentionCall) -> int:
    return sum(band.chunks * band.rows * band.width for band in plan_bands(call))


def test_masked_blocks_are_not_computed() -> None:
    long = replace(CALL, q_len=8192, kv_len=8192)
    assert work(replace(long, causal=False)) == 8192**2
    assert work(long) <= 0.57 * 8192**2
    assert work(replace(long, window=256)) <= 8192 * (256 + 128)
    assert work(replace(long, window=256, q_offset=None)) <= 8192 * (256 + 128)
    symmetric = replace(long, causal=False, window=256, symmetric_window=True)
    assert work(symmetric) <= 8192 * (2 * 256 + 128)
    assert work(replace(CALL, q_len=1, kv_len=8192, window=256, q_offset=None)) <= 256


@cache
def temporary_bytes(
    length: int,
    differentiate: bool = True,
    bias: tuple[int, int] | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: Any = None,
) -> int:
    x = shaped(1, length, 2, 16)
    arrays = [x, x, x] if bias is None else [x, x, x, shaped(*bias, length, length)]

    def call(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        attend: Any = partial(flash_attention, causal=causal, window=window, bias=bias, mask=mask)
        return attend(q, k, v, implementation="xla")

    run: Any = call
    if differentiate:
        run = jax.grad(lambda *x: call(*x).sum(), tuple(range(len(arrays))))
    memory: Any = jax.jit(run).lower(*arrays).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_is_linear_in_the_length(differentiate: bool) -> None:
    at_2k, at_8k = (temporary_bytes(n, differentiate) for n in (2048, 8192))
    scores = 2 * 8192 * 8192 * 4
    assert at_8k < scores / 16
    assert at_8k < 4.5 * at_2k


def test_a_mask_function_is_not_stored() -> None:
    assert temporary_bytes(4096, mask=islands) < 4096 * 4096 * 4 / 4


def test_causal_bands_do_not_store_their_scores_together() -> None:
    assert temporary_bytes(1024, causal=True) < 2 * 1024 * 1024 * 4 / 1.5


@pytest.mark.parametrize("window", [None, 100])
def test_gradient_of_a_bias_takes_no_memory_but_its_own(window: int | None) -> None:
    # The gradient itself is a result, not temporary memory.
    without = temporary_bytes(1024, causal=True, window=window)
    with_bias = temporary_bytes(1024, bias=(1, 2), causal=True, window=window)
    assert with_bias - without < 2 * 1024 * 1024 * 4 / 8


def test_products_of_float32_are_float32_on_every_device() -> None:
    def products(dtype: Any) -> list[str]:
        x = jax.ShapeDtypeStruct((1, 300, 2, 16), dtype)  # type: ignore[no-untyped-call]
        call: Any = partial(flash_attention, causal=True, implementation="xla")
        program = jax.jit(jax.grad(lambda *x: call(*x).sum(), (0, 1, 2))).lower(x, x, x).as_text()
        return re.findall(r"dot_general.*precision = \[(\w+)", program)

    assert set(products(np.float32)) == {"HIGHEST"}
    assert "DEFAULT" in products(jax.numpy.bfloat16)


def count_exp(policy_names: Any) -> int:
    policy = jax.checkpoint_policies.save_only_these_names(*policy_names)
    call: Any = partial(flash_attention, causal=True, implementation="xla")

    def loss(x: Any) -> Any:
        return jax.checkpoint(lambda y: call(y, y, y).sum(), policy=policy)(x)

    x = shaped(1, 8, 2, 4)
    return len(re.findall(r"= exp\b", str(jax.make_jaxpr(jax.grad(loss))(x))))


def test_remat_policy_that_saves_both_names_skips_the_second_forward() -> None:
    # One exponential in the forward pass, one in the backward pass.
    assert count_exp(["flash_attention_out", "flash_attention_lse"]) == 2
    assert count_exp(["flash_attention_out"]) == 3
    assert count_exp(["other"]) == 3


# Everything that a batch row and a head may have of its own, over more than two chunks.
SLIDING: dict[str, Any] = {"causal": True, "window": 40, "dropout_rate": 0.2}


def draw(*shape: int) -> dict[str, Any]:
    batch, length, heads, _ = shape
    rng = np.random.default_rng(0)
    names = ("q", "k", "v", "dout")
    inputs: dict[str, Any] = {x: rng.standard_normal(shape).astype(np.float32) for x in names}
    ids = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)
    inputs |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    inputs["alibi_slopes"] = rng.random((batch, heads)).astype(np.float32)
    inputs["q_offset"] = np.linspace(-20, 30, batch).astype(np.int32)
    return inputs


def differentiate(x: dict[str, Any], implementation: str, **options: Any) -> Any:
    """Return the output, the LSE, and the gradients of q, k, v and the bias, if any."""
    x = dict(x)
    dout, qkv, bias = x.pop("dout"), [x.pop(name) for name in "qkv"], x.pop("bias", None)
    if "dropout_rate" in options:
        options["dropout_key"] = jax.random.key(0)

    def call(q: Any, k: Any, v: Any, bias: Any) -> Any:
        attend: Any = partial(flash_attention, bias=bias, implementation=implementation)
        return attend(q, k, v, return_lse=True, **x, **options)

    (out, lse), pull = jax.vjp(call, *qkv, bias)
    return out, lse, pull((dout, jax.numpy.where(lse == -np.inf, 0, lse)))


def assert_close(a: Any, b: Any) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(jax.device_get(left), jax.device_get(right), atol=2e-5)


@pytest.mark.parametrize(
    ("offset", "bias"), [("for-each-row", None), ("for-each-row", (3, 1)), ("static", (1, 2))]
)
def test_a_sliding_window_equals_the_reference(offset: str, bias: Any) -> None:
    inputs, options = draw(3, 300, 2, 8), dict(SLIDING)
    if offset == "static":
        del inputs["q_offset"]
        options["q_offset"] = 11
    if bias is not None:
        inputs["bias"] = np.random.default_rng(1).standard_normal((*bias, 300, 300))
        inputs["bias"] = inputs["bias"].astype(np.float32)
    arrays = jax.device_put(inputs)
    assert_close(
        *(
            jax.jit(partial(differentiate, implementation=name, **options))(arrays)
            for name in ("xla", "reference")
        )
    )


def assert_spreads_without_communication(run: Any, inputs: Any, shardings: Any) -> None:
    compiled = jax.jit(run).lower(jax.device_put(inputs, shardings)).compile()
    collectives = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(collectives, compiled.as_text() or "") == []
    alone = jax.jit(run)(jax.device_put(inputs, jax.devices()[0]))
    assert_close(compiled(jax.device_put(inputs, shardings)), alone)


def shardings_of(inputs: dict[str, Any], row: tuple[str | None, ...]) -> dict[str, NamedSharding]:
    """Spread batch rows as `row` says, then heads over "tensor" where there are any."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    heads: dict[str, tuple[str | None, ...]] = dict.fromkeys(
        ("q", "k", "v", "dout"), (None, "tensor")
    )
    heads["alibi_slopes"] = ("tensor",)
    specs = {x: PartitionSpec(*row, *heads.get(x, ())) for x in inputs}  # type: ignore[no-untyped-call]
    return {x: NamedSharding(mesh, spec) for x, spec in specs.items()}


@pytest.mark.parametrize("sliding", [False, True])
def test_sharded_batch_and_heads_need_no_communication(sliding: bool) -> None:
    inputs = draw(4, 300, 4, 8)
    if not sliding:
        inputs = {x: inputs[x] for x in ("q", "k", "v", "dout")}
    run = partial(differentiate, implementation="xla", **(SLIDING if sliding else {"causal": True}))
    assert_spreads_without_communication(run, inputs, shardings_of(inputs, ("data",)))


def test_a_vmapped_axis_may_be_sharded() -> None:
    inputs = draw(4, 300, 4, 8)
    run = partial(differentiate, implementation="xla", causal=True, window=40)
    mapped = {name: x[:, None] for name, x in inputs.items()}
    many = jax.vmap(run, spmd_axis_name="data")
    assert_spreads_without_communication(many, mapped, shardings_of(mapped, ("data", None)))
    found = jax.tree.map(lambda x: x[:, 0], jax.jit(many)(jax.device_put(mapped)))
    assert_close(found, jax.jit(run)(jax.device_put(inputs)))


def test_scan_over_rematerialized_layers_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 20, 2, 4)).astype(np.float32)
    weights = rng.standard_normal((3, 4, 4)).astype(np.float32)

    def layer(h: Any, w: Any) -> Any:
        return h + flash_attention(h @ w, h, h, causal=True), None

    def scanned(x: Any, weights: Any) -> Any:
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0].sum()

    def looped(x: Any, weights: Any) -> Any:
        for w in (weights[0], weights[1], weights[2]):
            x, _ = layer(x, w)
        return x.sum()

    arrays = jax.device_put((x, weights))
    a, b = (jax.device_get(jax.jit(jax.grad(f, (0, 1)))(*arrays)) for f in (scanned, looped))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)


def test_backends_without_kernels_reject_interpret() -> None:
    with jax.enable_x64(True):  # no kernel takes float64, so that nothing is left to choose
        x = jax.device_put(np.ones((1, 5, 2, 4)))
        for name in ("xla", None):
            with pytest.raises(ValueError, match="leave out interpret"):
                flash_attention(x, x, x, implementation=name, interpret=True)


def test_forward_mode_error_suggests_the_reference() -> None:
    x = jax.device_put(np.ones((1, 5, 2, 4), np.float32))

    def call(x: Any) -> Any:
        return flash_attention(x, x, x, implementation="xla")

    with pytest.raises(TypeError, match='give implementation="reference"'):
        jax.jvp(call, (x,), (x,))
    # The other way around it works: the passes themselves are plain JAX.
    hessian = jax.jit(lambda x: jax.jvp(jax.grad(lambda y: call(y).sum()), (x,), (x,)))(x)
    assert np.all(np.isfinite(jax.device_get(hessian[1])))
