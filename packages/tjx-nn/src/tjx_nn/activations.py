"""GELU with its derivative written out.

Differentiating the formula step by step keeps several intermediate arrays for the backward pass;
the closed form keeps one and shares the costly function with the forward pass. Both modes of
differentiation work.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_CUBIC = 0.044715


@jax.custom_jvp
def gelu_erf(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return x times the standard normal's distribution function at x; computed in float32.

    Examples
    --------
    >>> print(gelu_erf(jnp.array([-1.0, 0.0, 1.0])))
    [-0.15865526  0.          0.8413447 ]
    """
    return _erf_value_and_slope(x)[0]


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return GPT-2's approximation of `gelu_erf`, with tanh; computed in float32."""
    return _tanh_value_and_slope(x)[0]


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


@gelu_erf.defjvp
def _gelu_erf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _erf_value_and_slope(primals[0])
    return value, slope * tangents[0]


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _tanh_value_and_slope(primals[0])
    return value, slope * tangents[0]
