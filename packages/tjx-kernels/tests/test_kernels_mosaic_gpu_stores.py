"""Store addresses of the Hopper kernels, replayed without a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_stores import Store, replay

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


def _replay(which: str, head_dim: int, q_len: int, kv_len: int) -> tuple[AttentionCall, Any]:
    q, k = (_spec(jnp.bfloat16, 2, n, h, head_dim) for n, h in ((q_len, 4), (kv_len, 2)))
    described = describe_call(q=q, k=k, v=k, causal=True, interpret=True)
    call = replace(described, interpret=False, platform="gpu", architecture="sm_90")

    def forward(q: Any, k: Any) -> Any:
        return mosaic_gpu_forward.forward(call, bind_arguments(q=q, k=k, v=k)[1])

    def backward(q: Any, k: Any) -> Any:
        rows = jnp.zeros((2, 4, q_len), jnp.float32)
        operands = bind_arguments(q=q, k=k, v=k)[1]
        return mosaic_gpu_backward.backward(call, operands, BackwardInputs(q, rows, rows))[:3]

    return call, replay({"forward": forward, "backward": backward}[which], q, k)


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


@pytest.mark.parametrize(
    ("head_dim", "q_len", "kv_len"),
    # Every remainder matters: T % 128 below and above 64, T % 128 = 64, one block, less than one.
    [(64, 1001, 777), (64, 192, 320), (64, 40, 56), (64, 1, 1), (128, 330, 200), (256, 200, 333)],
)
@pytest.mark.parametrize(("which", "outputs"), [("forward", 2), ("backward", 3)])
def test_every_cell_is_stored_once_by_its_own_block(
    which: str,
    outputs: int,
    head_dim: int,
    q_len: int,
    kv_len: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Few persistent thread blocks, and sections of 3 key heads, of which the last one has fewer.
    monkeypatch.setitem(tile_order.PROCESSORS, "sm_90", 3)
    monkeypatch.setattr(tile_order, "L2_BYTES", 3 * 4 * kv_len * head_dim)
    call, stores = _replay(which, head_dim, q_len, kv_len)
    found = _by_output(stores)
    assert len(found) == outputs
    for name, parts in found.items():
        for part in parts:
            np.testing.assert_array_equal(part.written, part.meant, err_msg=str(name))
        shape = parts[0].shape
        cells = np.concatenate([part.written for part in parts])
        times = np.bincount(cells[cells >= 0], minlength=int(np.prod(shape))).reshape(shape)
        axis, rows = _row_axis(call, shape)
        assert np.all(np.take(times, np.arange(rows), axis) == 1), name
        assert np.all(times <= 1), name
