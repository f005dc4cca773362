"""The matrix product of linear layers.

The weight is cast to the type of the computation, and gathered from the devices that keep it, in
the forward pass and again in the backward pass: nothing of that is kept. Its gradient is summed
over tokens in float32 (or what the layout says), also over those of other devices.

XLA for CPUs multiplies at half speed when the large operand is the transposed one, and fuses
transposed copies into whatever made an operand. On a CPU the weight gradient is therefore arranged
so that the narrower operand is transposed, and its operands are materialised first. Other platforms
get the plain gradient. Reverse mode only.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tjx_nn.layout import Layout


class ParamSharding(NamedTuple):
    """How a weight is kept.

    Attributes
    ----------
    layout
        On which devices.
    axes
        The logical names of its dimensions.
    """

    layout: Layout
    axes: tuple[str | None, ...]

    def used(self, w: Array, dtype: Any) -> Array:
        """Return the weight as a product wants it."""
        return self.layout.all_gathered(w.astype(dtype), self.axes)

    def gradient(self, dw: Array, dtype: Any) -> Array:
        """Return the gradient as the weight is kept."""
        return self.layout.reduce_scattered(dw, self.axes).astype(dtype)

    def sum_dtype(self, x: Array) -> Any:
        """Return the type in which the gradient is summed over tokens and devices."""
        return jnp.promote_types(x.dtype, self.layout.reduce_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(
    kept: ParamSharding, x: Float[Array, "*any I"], w: Float[Array, "I O"]
) -> Float[Array, "*any O"]:
    """Multiply the last axis of `x` with the first of `w`, in the dtype of `x`."""
    return x @ kept.used(w, x.dtype)


def _forward(kept: ParamSharding, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kept.used(w, x.dtype), (x, w)


def _backward(
    kept: ParamSharding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    dtype = kept.sum_dtype(x)
    dw: Array = jax.lax.platform_dependent(
        x,
        dy,
        cpu=partial(_weight_gradient_cpu, dtype),
        default=partial(_weight_gradient, dtype),
    )
    return dy @ kept.used(w, x.dtype).T, kept.gradient(dw, w.dtype)


matmul.defvjp(_forward, _backward)


def _weight_gradient(dtype: Any, x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=dtype)


def _weight_gradient_cpu(dtype: Any, x: Array, dy: Array) -> Array:
    x, dy = _materialised(x), _materialised(dy)
    if x.shape[-1] <= dy.shape[-1]:
        return _weight_gradient(dtype, x, dy)
    return _materialised(_weight_gradient(dtype, dy, x)).T


def _materialised(x: Array) -> Array:
    y: Array = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]  # as jax is
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_bias(
    kept: ParamSharding, y: Float[Array, "*any O"], b: Float[Array, " O"]
) -> Float[Array, "*any O"]:
    """Add a bias to the last axis, in the dtype of `y`."""
    return y + kept.used(b, y.dtype)[(None,) * (y.ndim - 1)]


def _add_forward(kept: ParamSharding, y: Array, b: Array) -> tuple[Array, Array]:
    return add_bias(kept, y, b), b


def _add_backward(kept: ParamSharding, b: Array, dy: Array) -> tuple[Array, Array]:
    db = dy.sum(tuple(range(dy.ndim - 1)), dtype=kept.sum_dtype(dy))
    return dy, kept.gradient(db, b.dtype)


add_bias.defvjp(_add_forward, _add_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_matmul(
    kept: ParamSharding, x: Float[Array, "E G C I"], w: Float[Array, "E I O"]
) -> Float[Array, "E G C O"]:
    """Multiply the rows of each expert with its matrix, in the dtype of `x`."""
    return jnp.einsum("egci,eio->egco", x, kept.used(w, x.dtype))


def _expert_forward(kept: ParamSharding, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return expert_matmul(kept, x, w), (x, w)


def _expert_backward(
    kept: ParamSharding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    dw = jnp.einsum("egci,egco->eio", x, dy, preferred_element_type=kept.sum_dtype(x))
    dx = jnp.einsum("egco,eio->egci", dy, kept.used(w, x.dtype))
    return dx, kept.gradient(dw, w.dtype)


expert_matmul.defvjp(_expert_forward, _expert_backward)
