"""MLP of a block and its activations: GELU with a closed-form derivative.

Automatic differentiation of GELU saves several intermediates; the closed form saves one and shares
the erf or tanh with the forward pass. On GPUs, which are bound by memory bandwidth, only the input
is saved and the derivative is recomputed. Forward and reverse mode work.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units". Axes in names: B batch, T time, D d_model.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_kernels.target import current_target
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.make_layers import linear, of_sizes

_CUBIC = 0.044715


def gelu_erf(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute exact GELU: x times the standard normal distribution function at x, in float32.

    Parameters
    ----------
    x
        Values of any shape and floating-point dtype.

    Returns
    -------
    array
        Of the shape and dtype of `x`.

    Examples
    --------
    >>> print(gelu_erf(jnp.array([-1.0, 0.0, 1.0])))
    [-0.15865526  0.          0.8413447 ]
    """
    return _for_platform(_gelu_erf)(x)


def gelu_tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute the tanh approximation of GELU that GPT-2 uses, in float32.

    Parameters
    ----------
    x
        Values of any shape and floating-point dtype.

    Returns
    -------
    array
        Of the shape and dtype of `x`.

    Examples
    --------
    >>> f"{gelu_tanh(jnp.array(1.0)):.4f}"
    '0.8412'
    """
    return _for_platform(_gelu_tanh)(x)


def gelu_tanh_of_product(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute `gelu_tanh` of a matrix product (and bias) that has no other consumer.

    XLA:GPU fuses this form into the product as a cuBLASLt epilogue, computed in float32. FP8
    products have no such epilogue.
    """
    return _for_platform(_gelu_tanh, gpu=_gelu_tanh_epilogue)(x)


def _for_platform(
    function: Callable[[Array], Array], *, gpu: Callable[[Array], Array] | None = None
) -> Callable[[Array], Array]:
    """Make the function save only its input for the backward pass on GPUs."""
    if current_target().platform != "gpu":
        return function
    # With prevent_cse=False XLA would merge both computations and save float32 intermediates.
    return jax.checkpoint(gpu or function)


@jax.custom_jvp
def _gelu_erf(x: Array) -> Array:
    return _erf_value_and_slope(x)[0]


@jax.custom_jvp
def _gelu_tanh(x: Array) -> Array:
    return _tanh_value_and_slope(x)[0]


@jax.custom_jvp
def _gelu_tanh_epilogue(x: Array) -> Array:
    """Compute GELU as XLA:GPU recognizes it as an epilogue, in the dtype of the product."""
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


def _steep_silu(x: Array) -> Array:
    """Multiply x by sigmoid(1.702 x), the sigmoid approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


# Activation functions by name; gated ones ("swiglu", ...) give the activation of the gate.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": gelu_tanh,
    "geglu_erf": gelu_erf,
    "clamped_swiglu": _steep_silu,
}
"""Activation functions by name; gated ones name the function of the gate."""


class MLP(nnx.Module):
    """Two linear layers with an activation in between.

    Parameters
    ----------
    config
        Configuration of the model: `d_model`, `d_ff`, `activation`, `bias`, `dtype`, `float8`; or
        the width `d_model` alone, with the defaults of the others.
    d_ff
        Width of the hidden layer; None is `config.ff_dim`.
    rngs
        Source of random initial values.

    Raises
    ------
    ValueError
        If `config.activation` is gated; `SwiGLU` implements those.

    Examples
    --------
    >>> from tjx_nn import MLP
    >>> mlp = MLP(12, d_ff=16, rngs=nnx.Rngs(0))
    >>> mlp(jnp.ones((1, 3, 12))).shape
    (1, 3, 12)
    """

    def __init__(
        self, config: TransformerConfig | int, *, d_ff: int | None = None, rngs: nnx.Rngs
    ) -> None:
        config = of_sizes(config)
        if config.gated and type(self) is MLP:
            raise ValueError(
                f"config.activation: got {config.activation!r} for MLP; expected an activation "
                "without a gate (gelu_tanh, gelu_erf, relu or relu2); use SwiGLU"
            )
        d, f = config.d_model, d_ff or config.ff_dim
        self.activation = ACTIVATIONS[config.activation]
        if config.activation == "gelu_tanh" and not config.float8:
            self.activation = gelu_tanh_of_product
        self.up = linear(config, ("embed", "mlp"), (d, f), rngs=rngs)
        self.down = linear(config, ("mlp", "embed"), (f, d), residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to the last axis of `x`."""
        y: Array = self.down(self.activation(self.up(x)))
        return y
