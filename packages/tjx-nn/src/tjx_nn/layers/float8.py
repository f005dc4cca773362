"""FP8 matrix product with per-tensor dynamic scaling.

Inputs and weights are quantized to e4m3, gradients of outputs to e5m2. The scale of a tensor is the
largest power of two that keeps its largest magnitude in range, recomputed for every product. As
powers of two are exact, the only other loss is underflow, below 2**-17 (e4m3) or 2**-31 (e5m2) of
the largest magnitude. XLA:GPU compiles the products to FP8 cuBLASLt calls on Ada, Hopper and later;
other devices multiply the quantized values in a wider dtype. Derivatives are reverse mode only.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning".

Axes in names: I input features, O output features.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tjx_nn.layout import ParamSharding

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

_MAX = {E4M3: 448.0, E5M2: 57344.0}
# Exponent bits of a float32; the largest scale whose inverse is a normal number.
_EXPONENT_BITS, _MAX_SCALE = 0x7F800000, 2.0**100


class ScaledTensor(NamedTuple):
    """FP8 tensor with its scale.

    Attributes
    ----------
    values
        The tensor times a power of two, in FP8.
    inverse
        Inverse of that power of two, float32.
    """

    values: Float[Array, "..."]
    inverse: Float32[Array, ""]


def quantize(x: Float[Array, "..."], dtype: Any) -> ScaledTensor:
    """Quantize a tensor to FP8 with one scale; a non-finite input yields NaN values.

    Parameters
    ----------
    x
        Tensor of any floating-point dtype.
    dtype
        `E4M3` or `E5M2`.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    ratio = jnp.minimum(_MAX[dtype] / largest, _MAX_SCALE)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.uint32) & _EXPONENT_BITS
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = jnp.where(largest > 0, power, 1.0)
    return ScaledTensor((x * scale.astype(x.dtype)).astype(dtype), 1 / scale)


def scaled_matmul(
    a: ScaledTensor, b: ScaledTensor, axes: tuple[int, int], dtype: Any
) -> Float[Array, "M N"]:
    """Contract one axis of each of two FP8 matrices; the result has `dtype`."""
    y = jax.lax.dot_general(
        a.values,
        b.values,
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=dtype,
    )
    return y * (a.inverse * b.inverse).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def float8_matmul(
    sharding: ParamSharding, x: Float[Array, "*any I"], w: Float[Array, "I O"]
) -> Float[Array, "*any O"]:
    """Multiply in FP8; otherwise as `tjx_nn.layers.linear.matmul`.

    Parameters
    ----------
    sharding
        Sharding of the weight.
    x
        Input; the result has its dtype.
    w
        Weight; its gradient is summed in float32 or `Layout.reduce_dtype`.
    """
    return _forward(sharding, x, w)[0]


def _forward(
    sharding: ParamSharding, x: Array, w: Array
) -> tuple[Array, tuple[ScaledTensor, Array]]:
    rows = quantize(x.reshape(-1, x.shape[-1]), E4M3)
    y = scaled_matmul(rows, quantize(sharding.gather(w, x.dtype), E4M3), (1, 0), x.dtype)
    return y.reshape(*x.shape[:-1], -1), (rows, w)


def _backward(
    sharding: ParamSharding, residuals: tuple[ScaledTensor, Array], dy: Array
) -> tuple[Array, Array]:
    rows, w = residuals
    dy_rows = quantize(dy.reshape(-1, dy.shape[-1]), E5M2)
    dw = scaled_matmul(rows, dy_rows, (0, 0), sharding.sum_dtype(dy))
    dx = scaled_matmul(dy_rows, quantize(sharding.gather(w, dy.dtype), E4M3), (1, 1), dy.dtype)
    return dx.reshape(*dy.shape[:-1], -1), sharding.scatter(dw, w.dtype)


float8_matmul.defvjp(_forward, _backward)
