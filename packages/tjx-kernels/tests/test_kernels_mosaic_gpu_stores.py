"""Store addresses of the Hopper kernels, replayed without a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_stores import Store, Wait, replay

from tjx_kernels.attention.backend import BackwardInputs
from tjx_kernels.attention.backends.mosaic_gpu import (
    backward as mosaic_gpu_backward,
)
from tjx_kernels.attention.backends.mosaic_gpu import (
    forward as mosaic_gpu_forward,
)
from tjx_kernels.attention.backends.mosaic_gpu import (
    tile_order,
)
from tjx_kernels.attention.call import AttentionCall, bind_arguments, describe_call


def _spec(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]  # jax's


def _replay(
    which: str, head_dim: int, q_len: int, kv_len: int, *, in_order: bool = False, **options: Any
) -> tuple[AttentionCall, list[Store], list[Wait]]:
    q, k = (_spec(jnp.bfloat16, 2, n, h, head_dim) for n, h in ((q_len, 4), (kv_len, 2)))
    described = describe_call(q=q, k=k, v=k, causal=True, interpret=True, **options)
    call = replace(
        described, interpret=False, platform="gpu", architecture="sm_90", deterministic=in_order
    )

    def forward(q: Any, k: Any) -> Any:
        return mosaic_gpu_forward.forward(call, bind_arguments(q=q, k=k, v=k)[1])

    def backward(q: Any, k: Any) -> Any:
        rows = jnp.zeros((2, 4, q_len), jnp.float32)
        operands = bind_arguments(q=q, k=k, v=k)[1]
        return mosaic_gpu_backward.backward(call, operands, BackwardInputs(q, rows, rows))[:3]

    return call, *replay({"forward": forward, "backward": backward}[which], q, k)


def _by_output(stores: list[Store]) -> dict[tuple[str, int], list[Store]]:
    outputs: dict[tuple[str, int], list[Store]] = {}
    for store in stores:
        outputs.setdefault(store.output, []).append(store)
    return outputs


def _row_axis(call: AttentionCall, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the axis of an output's rows, and how many of them the caller keeps."""
    if len(shape) == 3:  # the LSE, [batch, heads, rows]
        return 2, call.q_len
    return 1, call.q_len if shape[2] == call.heads else call.kv_len


def _parts_of_dq(call: AttentionCall, queries: int = 128, keys: int = 128) -> np.ndarray:
    """Return how many blocks of keys the block of each query attends to: its dq has so many parts.

    `queries` and `keys` are those of a step and of a thread block, as the table has them.
    """
    seen = np.tri(call.q_len, call.kv_len, dtype=bool)
    if call.window is not None:
        seen &= ~np.tri(call.q_len, call.kv_len, -call.window, dtype=bool)
    blocks = [(0, -n % size) for n, size in zip(seen.shape, (queries, keys), strict=True)]
    tiles = np.pad(seen, blocks).reshape(-(-call.q_len // queries), queries, -1, keys)
    return np.repeat(tiles.any((1, 3)).sum(1), queries)[: call.q_len]


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few persistent thread blocks, and sections of few key heads."""
    monkeypatch.setitem(tile_order.PROCESSORS, "sm_90", 3)
    monkeypatch.setattr(tile_order, "L2_BYTES", 3 * 4 * 777 * 64)


@pytest.mark.parametrize(
    ("head_dim", "q_len", "kv_len"),
    # Every remainder matters: T % 128 below and above 64, T % 128 = 64, one block, less than one.
    [(64, 1001, 777), (64, 192, 320), (64, 40, 56), (64, 1, 1), (128, 330, 200), (256, 200, 333)],
)
@pytest.mark.parametrize(("which", "outputs"), [("forward", 2), ("backward", 3)])
def test_every_cell_is_stored_once_by_its_own_block(
    which: str, outputs: int, head_dim: int, q_len: int, kv_len: int
) -> None:
    """Also: every block of keys adds its part of dq to every cell once."""
    call, stores, waits = _replay(which, head_dim, q_len, kv_len)
    found = _by_output(stores)
    assert len(found) == outputs
    for name, parts in found.items():
        for part in parts:
            np.testing.assert_array_equal(part.written, part.meant, err_msg=str(name))
        shape = parts[0].shape
        cells = np.concatenate([part.written for part in parts])
        times = np.bincount(cells[cells >= 0], minlength=int(np.prod(shape))).reshape(shape)
        axis, rows = _row_axis(call, shape)
        kept = np.take(times, np.arange(rows), axis)
        if {part.reduction for part in parts} == {"add"}:
            wanted = _parts_of_dq(call)[:, None, None]
        else:
            assert {part.reduction for part in parts} == {None}
            assert np.all(times <= 1), name
            wanted = np.array(1)
        np.testing.assert_array_equal(kept, np.broadcast_to(wanted, kept.shape), str(name))
    assert not waits


@pytest.mark.parametrize("window", [None, 200])
def test_thread_blocks_add_in_the_order_of_their_keys(window: int | None) -> None:
    """No thread block waits for a later one, which would be a hang, or adds before an earlier."""
    call, stores, waits = _replay("backward", 64, 700, 777, in_order=True, window=window)
    assert all(wait.value == wait.signals for wait in waits)
    assert max(wait.value for wait in waits) == (5 if window is None else 2)
    added = [store for store in stores if store.reduction == "add"]
    shares = 2 * _parts_of_dq(call)[::128].sum()  # each of two warpgroups has one
    assert len(waits) == len(added) == call.batch * call.heads * shares
