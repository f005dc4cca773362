"""GELU with its derivative written out.

Differentiating the formula step by step keeps several intermediate arrays for the backward pass;
the closed form keeps one and shares the costly function with the forward pass. On GPUs, where
memory bandwidth costs more than arithmetic, only the input is kept and the derivative is computed
from it in the backward pass. Both modes of differentiation work.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tjx_kernels.target import current_target

_CUBIC = 0.044715


def gelu_erf(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return x times the standard normal's distribution function at x; computed in float32.

    Examples
    --------
    >>> print(gelu_erf(jnp.array([-1.0, 0.0, 1.0])))
    [-0.15865526  0.          0.8413447 ]
    """
    return _for_platform(_gelu_erf)(x)


def gelu_tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return GPT-2's approximation of `gelu_erf`, with tanh; computed in float32."""
    return _for_platform(_gelu_tanh)(x)


def gelu_tanh_of_product(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return `gelu_tanh` of a matrix product, with or without a bias, that is used nowhere else.

    XLA:GPU makes it an epilogue of the product, which cuBLASLt computes in float32 without another
    pass over memory. Products of 8-bit floats have no such epilogue.
    """
    return _for_platform(_gelu_tanh, gpu=_gelu_tanh_epilogue)(x)


def _for_platform(
    function: Callable[[Array], Array], *, gpu: Callable[[Array], Array] | None = None
) -> Callable[[Array], Array]:
    """Return a function that keeps only its input for the backward pass on GPUs."""
    if current_target().platform != "gpu":
        return function
    # Without prevent_cse XLA merges both computations and keeps float32 intermediates.
    return jax.checkpoint(gpu or function)


@jax.custom_jvp
def _gelu_erf(x: Array) -> Array:
    return _erf_value_and_slope(x)[0]


@jax.custom_jvp
def _gelu_tanh(x: Array) -> Array:
    return _tanh_value_and_slope(x)[0]


@jax.custom_jvp
def _gelu_tanh_epilogue(x: Array) -> Array:
    """Return GELU in the form that XLA:GPU recognizes, which has the type of the product."""
    inner = math.sqrt(2 / math.pi) * (x + _CUBIC * (x * (x * x)))
    return x * (0.5 * (1 + jnp.tanh(inner)))


def _erf_value_and_slope(x: Array) -> tuple[Array, Array]:
    y = x.astype(jnp.float32)
    distribution = 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5)))
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * y * y)
    return (y * distribution).astype(x.dtype), (distribution + y * density).astype(x.dtype)


def _tanh_value_and_slope(x: Array) -> tuple[Array, Array]:
    y = x.astype(jnp.float32)
    steepness = math.sqrt(2 / math.pi)
    t = jnp.tanh(steepness * (y + _CUBIC * y * y * y))
    gate = 0.5 * (1 + t)
    gate_slope = 0.5 * (1 - t * t) * steepness * (1 + 3 * _CUBIC * y * y)
    return (y * gate).astype(x.dtype), (gate + y * gate_slope).astype(x.dtype)


@_gelu_erf.defjvp
def _gelu_erf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _erf_value_and_slope(primals[0])
    return value, slope * tangents[0]


@_gelu_tanh_epilogue.defjvp
def _gelu_tanh_epilogue_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,) = primals
    return _gelu_tanh_epilogue(x), _tanh_value_and_slope(x)[1] * tangents[0]


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _tanh_value_and_slope(primals[0])
    return value, slope * tangents[0]
