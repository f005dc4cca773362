"""What only the chunked implementation promises: memory, skipping, remat, sharding, scan."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.attention_call import AttentionCall
from tjx_kernels.attention_xla import plan_bands

CALL = AttentionCall(
    batch=1,
    q_len=1024,
    kv_len=1024,
    heads=1,
    kv_heads=1,
    head_dim=8,
    dtype="float32",
    causal=True,
    window=None,
    soft_cap=None,
    scale=1.0,
    segment_ids=False,
    q_offset=0,
    platform="cpu",
)


@given(
    q_len=st.integers(1, 1500),
    kv_len=st.integers(1, 1500),
    q_offset=st.none() | st.integers(-1600, 1600),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 1600),
)
def test_bands_cover_every_row_once_and_every_key_it_sees(
    q_len: int, kv_len: int, q_offset: int | None, causal: bool, window: int | None
) -> None:
    call = replace(CALL, q_len=q_len, kv_len=kv_len, q_offset=q_offset)
    next_row = 0
    for band in plan_bands(replace(call, causal=causal, window=window)):
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
            seen_to = min(kv_len, last + 1) if causal else kv_len
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


def test_what_cannot_be_seen_is_not_computed() -> None:
    long = replace(CALL, q_len=8192, kv_len=8192)
    assert work(replace(long, causal=False)) == 8192**2
    assert work(long) <= 0.57 * 8192**2
    assert work(replace(long, window=256)) <= 8192 * (256 + 128)
    assert work(replace(long, window=256, q_offset=None)) <= 8192 * (256 + 128)
    assert work(replace(CALL, q_len=1, kv_len=8192, window=256, q_offset=None)) <= 256


def temporary_bytes(length: int, options: dict[str, Any], differentiate: bool) -> int:
    x = shaped(1, length, 2, 16)
    call: Any = partial(flash_attention, implementation="xla", **options)
    run: Any = jax.grad(lambda *qkv: call(*qkv).sum(), (0, 1, 2)) if differentiate else call
    memory: Any = jax.jit(run).lower(x, x, x).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_is_linear_in_the_length(differentiate: bool) -> None:
    at_2k, at_8k = (temporary_bytes(n, {}, differentiate) for n in (2048, 8192))
    scores = 2 * 8192 * 8192 * 4
    assert at_8k < scores / 16
    assert at_8k < 4.5 * at_2k


def test_causal_bands_do_not_keep_their_scores_at_once() -> None:
    assert temporary_bytes(1024, {"causal": True}, differentiate=True) < 2 * 1024 * 1024 * 4 / 1.5


def count_exp(policy_names: Any) -> int:
    policy = jax.checkpoint_policies.save_only_these_names(*policy_names)
    call: Any = partial(flash_attention, causal=True, implementation="xla")

    def loss(x: Any) -> Any:
        return jax.checkpoint(lambda y: call(y, y, y).sum(), policy=policy)(x)

    x = shaped(1, 8, 2, 4)
    return len(re.findall(r"= exp\b", str(jax.make_jaxpr(jax.grad(loss))(x))))


def test_remat_that_keeps_both_names_does_not_run_forward_again() -> None:
    # One exponential in the forward pass, one in the backward pass.
    assert count_exp(["flash_attention_out", "flash_attention_lse"]) == 2
    assert count_exp(["flash_attention_out"]) == 3
    assert count_exp(["other"]) == 3


def test_batch_and_heads_spread_over_devices_need_no_communication() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    spec = PartitionSpec("data", None, "tensor", None)  # type: ignore[no-untyped-call]
    sharding = NamedSharding(mesh, spec)
    shape = shaped(4, 300, 4, 8, sharding=sharding)

    @jax.jit
    def gradients(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(partial(flash_attention, causal=True), q, k, v)
        return out, pull(dout)

    compiled = gradients.lower(shape, shape, shape, shape).compile()
    collectives = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(collectives, compiled.as_text() or "") == []

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape.shape).astype(np.float32) for _ in range(4)]
    found = compiled(*jax.device_put(arrays, sharding))
    alone = gradients(*jax.device_put(arrays, jax.devices()[0]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), atol=1e-5)


def test_scan_over_rematerialised_layers_equals_a_loop() -> None:
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
