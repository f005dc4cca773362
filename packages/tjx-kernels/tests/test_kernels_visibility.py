"""Block ranges of masks agree with the elementwise mask for all sizes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tjx_kernels.attention.call import AttentionCall, Operands, describe_call
from tjx_kernels.attention.masks import (
    Blocks,
    block_lists,
    key_blocks,
    row_blocks,
    segment_blocks,
)


def call(q_len: int, kv_len: int, mask: str, window: int | None) -> AttentionCall:
    one = jax.ShapeDtypeStruct((1, 1, 1, 8), np.float32)  # type: ignore[no-untyped-call]
    plain = describe_call(q=one, k=one, v=one)
    sizes = replace(plain, q_len=q_len, kv_len=kv_len, window=window)
    return replace(
        sizes, causal=mask == "causal", symmetric_window=mask == "symmetric" and window is not None
    )


def seen(described: AttentionCall, offset: int) -> Any:
    distance = offset + np.arange(described.q_len)[:, None] - np.arange(described.kv_len)[None, :]
    sees = np.ones(distance.shape, bool)
    if described.causal:
        sees &= distance >= 0
    if described.window is not None:
        sees &= distance < described.window
        if described.symmetric_window:
            sees &= distance > -described.window
    return sees


def check(found: Blocks, tile: Any, block: int) -> None:
    """`tile` [block's own axis, the axis that is walked] says who sees whom."""
    length = tile.shape[1]
    count = -(-length // block)
    start, full_start, full_stop, stop = (int(x) for x in found)
    assert 0 <= start <= full_start <= full_stop <= stop <= count
    some = tile.any(axis=0)
    assert not some[: start * block].any()
    assert not some[stop * block :].any()
    assert tile[:, full_start * block : full_stop * block].all()
    assert full_start == full_stop or full_stop * block <= length
    # Tight: the first and the last block hold something seen; a whole block is known for one.
    if start < stop:
        assert some[start * block : (start + 1) * block].any()
        assert some[(stop - 1) * block : stop * block].any()
    whole = [tile[:, i * block : (i + 1) * block].all() for i in range(length // block)]
    assert sum(whole) == full_stop - full_start


sizes = {
    "q_len": st.integers(1, 70),
    "kv_len": st.integers(1, 70),
    "offset": st.integers(-90, 90),
    "mask": st.sampled_from(["none", "causal", "symmetric"]),
    "window": st.none() | st.integers(1, 80),
    "block": st.sampled_from([1, 4, 16]),
    "traced": st.booleans(),
}


@given(**sizes, first=st.integers(0, 69), rows=st.integers(1, 20))
def test_blocks_of_keys(
    q_len: int,
    kv_len: int,
    offset: int,
    mask: str,
    window: int | None,
    block: int,
    traced: bool,
    first: int,
    rows: int,
) -> None:
    first = min(first, q_len - 1)
    rows = min(rows, q_len - first)
    described = call(q_len, kv_len, mask, window)
    with jax.transfer_guard("allow"), jax.disable_jit():
        position: Any = np.int32(offset + first) if traced else offset + first
        found = key_blocks(described, jax.device_put(position) if traced else position, rows, block)
        check(found, seen(described, offset)[first : first + rows], block)


@given(**sizes, first=st.integers(0, 69), keys=st.integers(1, 20))
def test_blocks_of_rows(
    q_len: int,
    kv_len: int,
    offset: int,
    mask: str,
    window: int | None,
    block: int,
    traced: bool,
    first: int,
    keys: int,
) -> None:
    first = min(first, kv_len - 1)
    keys = min(keys, kv_len - first)
    described = call(q_len, kv_len, mask, window)
    with jax.transfer_guard("allow"), jax.disable_jit():
        start: Any = jax.device_put(np.int32(offset)) if traced else offset
        found = row_blocks(described, start, first, keys, block)
        check(found, seen(described, offset)[:, first : first + keys].T, block)


@given(
    seed=st.integers(0, 2**20),
    lengths=st.sampled_from([(37, 26), (1, 40), (16, 3)]),
    ordered=st.booleans(),
)
def test_blocks_that_share_a_segment(seed: int, lengths: tuple[int, int], ordered: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(-3, 4, (2, n)).astype(np.int32) for n in lengths]
    if ordered:
        ids = [np.sort(x, axis=1) for x in ids]
    block_q, block_k = 8, 4
    with jax.transfer_guard("allow"):
        q_ids, kv_ids = jax.device_put(ids)
        found = segment_blocks(q_ids, kv_ids, block_q, block_k)
        start, stop = (np.asarray(x) for x in found)
    for b in range(2):
        for i in range(start.shape[1]):
            same = np.equal.outer(ids[0][b, i * block_q : (i + 1) * block_q], ids[1][b])
            keys = np.flatnonzero(same.any(axis=0)) // block_k
            assert 0 <= start[b, i] <= stop[b, i] <= -(-lengths[1] // block_k)
            if keys.size:
                assert start[b, i] <= keys.min()
                assert keys.max() < stop[b, i]


@given(
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    offset=st.integers(-20, 20),
    traced=st.booleans(),
    segments=st.booleans(),
    of_keys=st.booleans(),
    period=st.integers(1, 20),
    of_head=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_lists_of_blocks_under_a_mask_function(
    q_len: int,
    kv_len: int,
    offset: int,
    traced: bool,
    segments: bool,
    of_keys: bool,
    period: int,
    of_head: bool,
    seed: int,
) -> None:
    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch
        return (key // period % 2 == (head % 2 if of_head else 0)) & (key - query < 9)

    block_q, block_k, batch, heads = 8, 4, 2, 2
    described = replace(call(q_len, kv_len, "none", 30), batch=batch, heads=heads, mask=mask)
    rng = np.random.default_rng(seed)
    ids = [
        np.sort(rng.integers(0, 3, (batch, n)), axis=1).astype(np.int32) for n in (q_len, kv_len)
    ]
    offsets = np.array([offset, offset + 3 * traced], np.int32)
    described = replace(described, q_offset=None if traced else offset, segment_ids=segments)
    with jax.transfer_guard("allow"):
        none: Any = None
        operands = Operands(none, none, none)
        if segments:
            q_ids, kv_ids = jax.device_put(ids)
            operands = operands._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        if traced:
            operands = operands._replace(q_offset=jax.device_put(offsets))
        lists = block_lists(described, operands, block_q, block_k, of_keys=of_keys)
        order, full, stop = (np.broadcast_to(x, (batch, heads, *x.shape[2:])) for x in lists)
    assert lists.order.shape[:2] == (batch if traced or segments else 1, heads if of_head else 1)
    pairs = np.zeros(
        (batch, heads, -(-q_len // block_q) * block_q, -(-kv_len // block_k) * block_k)
    )
    for b, n in np.ndindex(batch, heads):
        position = offsets[b] + np.arange(q_len)[:, None]
        pairs[b, n, :q_len, :kv_len] = mask(b, n, position, np.arange(kv_len)[None]) & seen(
            described, int(offsets[b])
        )
    tiles = pairs.reshape(batch, heads, -1, block_q, pairs.shape[3] // block_k, block_k)
    shares = tiles.mean((3, 5)).swapaxes(2, 3) if of_keys else tiles.mean((3, 5))
    same = np.ones_like(shares, bool)
    if segments:
        touch = [np.equal.outer(*(x[b] for x in ids)) for b in range(batch)]
        padded = np.zeros((batch, *pairs.shape[2:]), bool)
        padded[:, :q_len, :kv_len] = touch
        blocks = padded.reshape(batch, -1, block_q, pairs.shape[3] // block_k, block_k).any((2, 4))
        same = np.broadcast_to(
            (blocks.swapaxes(1, 2) if of_keys else blocks)[:, None], shares.shape
        )
    for at in np.ndindex(shares.shape[:3]):
        assert sorted(order[at]) == list(range(shares.shape[3]))
        whole, visited = set(order[at][: full[at]]), set(order[at][: stop[at]])
        assert whole == (set() if segments else set(np.flatnonzero(shares[at] == 1)))
        needed = set(np.flatnonzero((shares[at] > 0) & same[at]))
        assert needed <= visited <= set(np.flatnonzero(shares[at] > 0))
        assert segments or visited == needed
