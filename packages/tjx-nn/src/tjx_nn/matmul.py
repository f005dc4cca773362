"""The matrix product of linear layers, with a weight gradient that suits the CPU.

XLA for CPUs multiplies at half speed when the large operand is the transposed one, and fuses
transposed copies into whatever made an operand. On a CPU the weight gradient is therefore arranged
so that the narrower operand is transposed, and its operands are materialised first. Other platforms
get the plain gradient. Reverse mode only.
"""

import jax
from jaxtyping import Array, Float


def dot_general(
    x: Float[Array, "*any I"],
    w: Float[Array, "I O"],
    dimension_numbers: tuple[object, object],
    precision: None = None,
    out_sharding: None = None,
) -> Float[Array, "*any O"]:
    """Multiply the last axis of `x` with the first of `w`; what `nnx.Linear` calls."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    assert precision is None
    assert out_sharding is None
    product: Array = _matmul(x, w)
    return product


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    dw: Array = jax.lax.platform_dependent(
        x, dy, cpu=_weight_gradient_cpu, default=_weight_gradient
    )
    return dy @ w.T, dw


_matmul.defvjp(_forward, _backward)


def _weight_gradient(x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


def _weight_gradient_cpu(x: Array, dy: Array) -> Array:
    x, dy = _materialised(x), _materialised(dy)
    if x.shape[-1] <= dy.shape[-1]:
        return _weight_gradient(x, dy)
    return _materialised(_weight_gradient(dy, x)).T


def _materialised(x: Array) -> Array:
    y: Array = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]  # as jax is
    return y
