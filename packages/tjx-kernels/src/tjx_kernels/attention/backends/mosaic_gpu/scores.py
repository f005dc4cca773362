"""Score tiles and shared-memory tiles of the forward and backward kernels for Hopper.

A score tile is q k^T [queries, keys], transposed in the kernel for dk and dv. It is stored in the
registers of one warpgroup, in the output layout of the tensor cores (WGMMA).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention.call import AttentionCall, make_mask

plgpu: Any = mosaic_gpu  # JAX gives most of it no types

LOG2_E = math.log2(math.e)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector with one element per row of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

# --- memory ---------------------------------------------------------------------------------------


def tile(shape: tuple[int, ...], dtype: Any, summed: int = 64) -> Any:
    """Return the type of tiles [..., rows, head_dim] in shared memory for both wgmma and TMA.

    Both read rows in pieces of 128, 64 or 32 bytes whose 16-byte parts are swizzled to avoid bank
    conflicts; the widest piece that divides the row is used. Rows are a multiple of 8 and head_dim
    of 16. `summed` is the smallest contraction length of a product, which a piece must divide.
    """
    itemsize = jnp.dtype(dtype).itemsize
    divides = math.gcd(shape[-1], summed) * itemsize
    width = next(width for width in (128, 64, 32) if divides % width == 0)
    transforms = (
        plgpu.TilingTransform((8, width // itemsize)),
        plgpu.SwizzleTransform(width),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def padded(x: jax.Array, axis: int = 1, multiple: int = 8) -> jax.Array:
    """Zero-pad an axis of rows or keys to a multiple of 8, or of another number.

    TMA copies tiles in pieces of 8 rows and vectors in steps of 16 bytes. Beyond the padded length
    it reads zeros and writes nothing. A length that is a multiple needs no copy.
    """
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def interpret_params(call: AttentionCall) -> Any:
    """Return the `interpret` argument of the kernel."""
    return plgpu.InterpretGPUParams() if call.interpret else None


def first_position(call: AttentionCall, offset_B: Any, batch: Any) -> Any:
    """Return the position of a batch row's first query, static or from device memory."""
    return offset_B[batch] if call.q_offset is None else call.q_offset


# --- scores ---------------------------------------------------------------------------------------


def base2(call: AttentionCall, raw: jax.Array) -> tuple[jax.Array, float]:
    """Apply the soft cap to the products q k^T and return x and a factor > 0.

    x * factor are the scores in units of log 2, for exp2. The caller multiplies, so that
    multiplication and subtraction fuse into one instruction.
    """
    if call.soft_cap is not None:
        cap = call.soft_cap * LOG2_E
        return cap * _tanh(raw * (call.scale / call.soft_cap), call.dtype), 1.0
    # A factor <= 0 would turn the maximum into a minimum and masked scores (-inf) into NaN.
    if call.scale <= 0:
        return raw * (call.scale * LOG2_E), 1.0
    return raw, call.scale * LOG2_E


def slope(call: AttentionCall, x: jax.Array) -> jax.Array | float:
    """Return the derivative of the soft cap; `x` is the unmasked result of `base2`."""
    if call.soft_cap is None:
        return 1.0
    capped = x * (1 / (call.soft_cap * LOG2_E))
    return 1.0 - capped * capped


def _tanh(x: jax.Array, dtype: str) -> jax.Array:
    """Compute tanh with the accuracy of the inputs' dtype.

    With `approx_math` jnp.tanh is one instruction with a relative error of 2^-11: below the
    rounding error of bfloat16 (2^-9), above that of float16 (2^-12).
    """
    if dtype == "bfloat16":
        return jnp.tanh(x)
    # 1 - 2 / (1 + e^2x), with rsqrt squared: one instruction instead of a division's dozen.
    root: jax.Array = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


def masked(
    call: AttentionCall,
    x: jax.Array,
    position: Any,
    first_key: Any,
    *,
    q_axis: int,
    keys: int | None = None,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
) -> jax.Array:
    """Set masked scores to -inf, including keys past the end.

    `position` is the position of the first query of the tile, `first_key` the index of its first
    key, `q_axis` the axis of queries, `keys` the keys of a block, if it has several tiles. Segment
    ids are vectors in the layout of their axis (ROWS or COLUMNS).
    """
    # Mosaic GPU infers layouts from uses, so every value must be used.
    placed = call.causal or call.window is not None
    ragged = call.kv_len % (keys or x.shape[1 - q_axis]) != 0  # the last block passes the end
    key = _along(x, 1 - q_axis, first_key) if placed or ragged else None
    query = _along(x, q_axis, position) if placed else None
    if q_ids is not None and kv_ids is not None:
        q_ids = lax.broadcast_in_dim(q_ids, x.shape, [q_axis])
        kv_ids = lax.broadcast_in_dim(kv_ids, x.shape, [1 - q_axis])
    seen = make_mask(call, query, key, q_ids, kv_ids)
    if ragged:
        assert key is not None
        within = key < call.kv_len
        seen = within if seen is None else seen & within
    return x if seen is None else jnp.where(seen, x, -jnp.inf)


def _along(x: jax.Array, axis: int, first: Any) -> jax.Array:
    """Return the indices along an axis of a tile, from `first` on.

    Broadcasting a vector takes far fewer registers than an iota of the whole tile.
    """
    layout = (ROWS, COLUMNS)[axis]
    numbers = plgpu.broadcasted_iota(jnp.int32, x.shape[axis : axis + 1], 0, layout=layout)
    return lax.broadcast_in_dim(numbers + first, x.shape, [axis])
