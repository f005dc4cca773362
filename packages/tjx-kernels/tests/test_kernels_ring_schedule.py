"""Ring schedule: every visible pair exactly once, balanced load."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_kernels.attention.call import AttentionCall, describe_call
from tjx_kernels.sharded.ring_schedule import (
    Order,
    RingBlock,
    schedule,
    step_blocks,
    unzigzag,
    zigzag,
    zigzag_positions,
)


def held_by_a_device(
    length: int, causal: bool = True, window: int | None = None, symmetric: bool = False
) -> AttentionCall:
    x = jax.ShapeDtypeStruct((1, length, 1, 8), np.float32)  # type: ignore[no-untyped-call]
    return describe_call(q=x, k=x, v=x, causal=causal, window=window, symmetric_window=symmetric)


def positions(order: Order, size: int, device: int, length: int) -> Any:
    whole = np.arange(size * length)
    return (zigzag(whole, size, axis=0) if order == "zigzag" else whole).reshape(size, -1)[device]


def pairs_of(block: RingBlock, symmetric: bool = False) -> Any:
    """Return the mask of the attention call of a block."""
    i = block.offset + np.arange(block.rows[1] - block.rows[0])[:, None]
    j = np.arange(block.keys[1] - block.keys[0])[None, :]
    seen = np.ones((i.size, j.size), bool)
    if block.causal:
        seen &= j <= i
    if block.window is not None:
        seen &= j > i - block.window
        if symmetric:
            seen &= j < i + block.window
    return seen


@given(
    size=st.integers(1, 6),
    half=st.integers(1, 4),
    order=st.sampled_from(["zigzag", "contiguous"]),
    mask=st.sampled_from(["none", "causal", "symmetric"]),
    window=st.none() | st.integers(1, 60),
)
def test_every_visible_pair_is_computed_once_and_no_other(
    size: int, half: int, order: Order, mask: str, window: int | None
) -> None:
    length, causal = 2 * half, mask == "causal"
    symmetric = mask == "symmetric" and window is not None
    plan = schedule(held_by_a_device(length, causal, window, symmetric), order, size)
    count = np.zeros((size * length, size * length), int)
    for step, row in enumerate(plan.table):
        for device, case in enumerate(row):
            queries = positions(order, size, device, length)
            keys = positions(order, size, (device - step) % size, length)
            for part in plan.cases[case]:
                cell = np.ix_(queries[slice(*part.rows)], keys[slice(*part.keys)])
                count[cell] += pairs_of(part, symmetric)
    distance = np.subtract.outer(np.arange(size * length), np.arange(size * length))
    wanted = np.ones(distance.shape, bool)
    if causal:
        wanted &= distance >= 0
    if window is not None:
        wanted &= distance < window
        if symmetric:
            wanted &= distance > -window
    np.testing.assert_array_equal(count, wanted)


def work(order: Order, size: int, length: int) -> Any:
    """Pairs that each device computes at each step under a causal mask: [steps, devices]."""
    call = held_by_a_device(length)
    return np.array(
        [
            [
                sum(pairs_of(p).sum() for p in step_blocks(call, order, size, d, s))
                for d in range(size)
            ]
            for s in range(size)
        ]
    )


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_zigzag_order_gives_each_device_the_same_work_at_each_step(size: int) -> None:
    pairs = work("zigzag", size, 12)
    assert np.all(pairs == pairs[:, :1])
    assert np.all(pairs[1:] == 12 * 12 // 2)
    total = size * 12 * (size * 12 + 1) // 2
    assert pairs.sum() == total
    # In plain order the first device soon waits for the last one.
    plain = work("contiguous", size, 12)
    assert plain.sum() == total
    assert plain.max(axis=1).sum() - pairs.max(axis=1).sum() == (size - 1) * 12 * 12 // 2


def test_keys_rotate_only_as_far_as_the_window() -> None:
    steps = {
        window: len(schedule(held_by_a_device(10, window=window), "contiguous", 8).table)
        for window in (1, 2, 11, 12, 71, 72)
    }
    assert steps == {1: 1, 2: 2, 11: 2, 12: 3, 71: 8, 72: 8}


def test_the_program_does_not_grow_with_the_ring() -> None:
    for order in ("zigzag", "contiguous"):
        assert len(schedule(held_by_a_device(12), order, 64).cases) == 3
    assert len(schedule(held_by_a_device(12, window=100), "zigzag", 64).cases) < 20


# --- orders ---------------------------------------------------------------------------------------


def test_zigzag_gives_each_device_an_early_and_a_late_chunk() -> None:
    assert zigzag_positions(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    x = np.arange(2 * 24 * 3).reshape(2, 24, 3)
    y = zigzag(x, 3)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, x[:, zigzag_positions(24, 3)])
    np.testing.assert_array_equal(unzigzag(y, 3), x)
    on_device = jax.jit(partial(zigzag, axis_size=3, axis=1))(jax.device_put(x))
    np.testing.assert_array_equal(jax.device_get(on_device), y)
    with pytest.raises(ValueError, match=r"got length 24 along axis 1; .* a multiple of 10"):
        zigzag(x, 5)
