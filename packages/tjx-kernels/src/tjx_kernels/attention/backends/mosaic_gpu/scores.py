"""What the forward and backward kernels for Hopper share: tiles of scores and of shared memory.

A tile of scores is q k^T [queries, keys], or in the kernel for dk and dv its transpose. It lies in
the registers of one warpgroup in the layout that the tensor cores leave it in (WGMMA).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from tjx_kernels.attention.masks import visible
from tjx_kernels.attention.types import AttentionCall

plgpu: Any = mosaic_gpu  # JAX gives most of it no types

LOG2_E = math.log2(math.e)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector with one number for each row of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

# --- memory ---------------------------------------------------------------------------------------


def tile(shape: tuple[int, ...], dtype: Any, summed: int = 64) -> Any:
    """Describe tiles [..., rows, head_dim] in shared memory that wgmma and TMA both read.

    Both take a row in pieces of 128, 64 or 32 bytes whose 16-byte parts are exchanged (swizzled)
    so that no two parts that are read together lie in the same bank: the widest that divides the
    row. Rows are multiples of 8, head_dim of 16 numbers. `summed` is the fewest rows that a product
    sums over, which wgmma takes in as many at once as a piece has numbers.
    """
    itemsize = jnp.dtype(dtype).itemsize
    divides = math.gcd(shape[-1], summed) * itemsize
    width = next(width for width in (128, 64, 32) if divides % width == 0)
    transforms = (
        plgpu.TilingTransform((8, width // itemsize)),
        plgpu.SwizzleTransform(width),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def padded(x: jax.Array, axis: int = 1) -> jax.Array:
    """Lengthen an axis of rows or keys to a multiple of 8 with zeros.

    Tiles are copied in pieces of 8 rows, and vectors in steps of 16 bytes. Nothing is copied where
    the length is such a multiple; beyond it TMA reads zeros and writes nothing.
    """
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % 8)
    return jnp.pad(x, widths) if widths[axis][1] else x


def interpret_params(call: AttentionCall) -> Any:
    """Give the kernel's `interpret` argument."""
    return plgpu.InterpretGPUParams() if call.interpret else None


def first_position(call: AttentionCall, offset_B: Any, batch: Any) -> Any:
    """Read the position of a batch row's first query: static, or from device memory."""
    return offset_B[batch] if call.q_offset is None else call.q_offset


# --- scores ---------------------------------------------------------------------------------------


def base2(call: AttentionCall, raw: jax.Array) -> tuple[jax.Array, float]:
    """Scale and cap the products q k^T.

    Gives x and a factor > 0: x * factor are the scores in units of log 2, so that exp2 is the
    exponential. The factor is left to the caller, who can multiply and subtract in one instruction.
    """
    if call.soft_cap is not None:
        cap = call.soft_cap * LOG2_E
        return cap * _tanh(raw * (call.scale / call.soft_cap), call.dtype), 1.0
    # A factor <= 0 would exchange what is largest, and make NaN of masked scores, which are -inf.
    if call.scale <= 0:
        return raw * (call.scale * LOG2_E), 1.0
    return raw, call.scale * LOG2_E


def slope(call: AttentionCall, x: jax.Array) -> jax.Array | float:
    """Differentiate the capped scores by the uncapped; `x` is `base2`'s, not masked."""
    if call.soft_cap is None:
        return 1.0
    capped = x * (1 / (call.soft_cap * LOG2_E))
    return 1.0 - capped * capped


def _tanh(x: jax.Array, dtype: str) -> jax.Array:
    """Compute tanh as exactly as the inputs' dtype is worth.

    With `approx_math` jnp.tanh is one instruction with a relative error of 2^-11: less than what
    rounding to bfloat16 (2^-9) costs a score, more than rounding to float16 (2^-12).
    """
    if dtype == "bfloat16":
        return jnp.tanh(x)
    # 1 - 2 / (1 + e^2x); the square of rsqrt, one instruction, where a division takes a dozen.
    root: jax.Array = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


def masked(
    call: AttentionCall,
    x: jax.Array,
    position: Any,
    first_key: Any,
    *,
    q_axis: int,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
) -> jax.Array:
    """Set to -inf what a query does not see, keys past the end included.

    `position` is that of the tile's first query, `first_key` the index of its first key, `q_axis`
    the axis of queries. Segment ids are vectors in the layout of their axis (ROWS or COLUMNS).
    """
    # Layouts are inferred from how a value is used: none may be left unused.
    placed = call.causal or call.window is not None
    ragged = call.kv_len % x.shape[1 - q_axis] != 0  # the last block reaches past the end
    key = _along(x, 1 - q_axis, first_key) if placed or ragged else None
    query = _along(x, q_axis, position) if placed else None
    if q_ids is not None and kv_ids is not None:
        q_ids = lax.broadcast_in_dim(q_ids, x.shape, [q_axis])
        kv_ids = lax.broadcast_in_dim(kv_ids, x.shape, [1 - q_axis])
    seen = visible(call, query, key, q_ids, kv_ids)
    if ragged:
        assert key is not None
        within = key < call.kv_len
        seen = within if seen is None else seen & within
    return x if seen is None else jnp.where(seen, x, -jnp.inf)


def _along(x: jax.Array, axis: int, first: Any) -> jax.Array:
    """Give a tile's rows or columns their numbers, from `first` on.

    A vector, then broadcast: it takes far fewer registers than the numbers of a whole tile.
    """
    layout = (ROWS, COLUMNS)[axis]
    numbers = plgpu.broadcasted_iota(jnp.int32, x.shape[axis : axis + 1], 0, layout=layout)
    return lax.broadcast_in_dim(numbers + first, x.shape, [axis])
