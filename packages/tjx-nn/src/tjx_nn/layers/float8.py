"""The matrix product of linear layers in 8-bit floats, with a scale for each operand.

Inputs and weights are rounded to e4m3, gradients of outputs to e5m2. The scale is the largest power
of two with which an operand's largest magnitude, found anew for each product, stays in range. A
power of two rounds nothing itself: beside the rounding to 8 bits, values are only lost below 2**-17
(e4m3) or 2**-31 (e5m2) of the largest. XLA:GPU compiles the products to FP8 calls of cuBLASLt on
devices that have these (Ada, Hopper and later); elsewhere the rounded operands are multiplied in
more bits. Reverse mode only.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning".

Axes in names: I features of the input, O of the output.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tjx_nn.layers.matmul import ParamSharding

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

_LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# The exponent of a float32, and the largest scale, whose inverse is a normal number.
_EXPONENT, _LARGEST_SCALE = 0x7F800000, 2.0**100


class ScaledTensor(NamedTuple):
    """A tensor in 8-bit floats.

    Attributes
    ----------
    values
        The tensor, multiplied by a power of two and rounded.
    inverse
        1 / that power.
    """

    values: Float[Array, "..."]
    inverse: Float32[Array, ""]


def quantize(x: Float[Array, "..."], dtype: Any) -> ScaledTensor:
    """Round a tensor to 8-bit floats; a value that is not finite makes NaN of some.

    Parameters
    ----------
    x
        The tensor, of any floating-point type.
    dtype
        `E4M3` or `E5M2`.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    ratio = jnp.minimum(_LARGEST[dtype] / largest, _LARGEST_SCALE)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.uint32) & _EXPONENT
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = jnp.where(largest > 0, power, 1.0)
    return ScaledTensor((x * scale.astype(x.dtype)).astype(dtype), 1 / scale)


def scaled_matmul(
    a: ScaledTensor, b: ScaledTensor, axes: tuple[int, int], dtype: Any
) -> Float[Array, "M N"]:
    """Multiply two matrices over one axis of each; the result has `dtype`."""
    y = jax.lax.dot_general(
        a.values,
        b.values,
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=dtype,
    )
    return y * (a.inverse * b.inverse).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def float8_matmul(
    kept: ParamSharding, x: Float[Array, "*any I"], w: Float[Array, "I O"]
) -> Float[Array, "*any O"]:
    """Multiply the last axis of `x` with the first of `w`, as `matmul` does, in 8-bit floats.

    Parameters
    ----------
    kept
        How the weight is kept.
    x
        The input; the result has its dtype.
    w
        The weight. Its gradient is summed in float32, or what the layout says.
    """
    return _forward(kept, x, w)[0]


def _forward(kept: ParamSharding, x: Array, w: Array) -> tuple[Array, tuple[ScaledTensor, Array]]:
    rows = quantize(x.reshape(-1, x.shape[-1]), E4M3)
    y = scaled_matmul(rows, quantize(kept.used(w, x.dtype), E4M3), (1, 0), x.dtype)
    return y.reshape(*x.shape[:-1], -1), (rows, w)


def _backward(
    kept: ParamSharding, residuals: tuple[ScaledTensor, Array], dy: Array
) -> tuple[Array, Array]:
    rows, w = residuals
    dy_rows = quantize(dy.reshape(-1, dy.shape[-1]), E5M2)
    dw = scaled_matmul(rows, dy_rows, (0, 0), kept.sum_dtype(dy))
    dx = scaled_matmul(dy_rows, quantize(kept.used(w, dy.dtype), E4M3), (1, 1), dy.dtype)
    return dx.reshape(*dy.shape[:-1], -1), kept.gradient(dw, w.dtype)


float8_matmul.defvjp(_forward, _backward)
