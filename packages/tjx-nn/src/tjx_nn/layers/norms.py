"""LayerNorm and RMSNorm over the last axis, with float32 statistics and a fused backward pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tjx_kernels.target import current_target
from tjx_nn.layout import ShardedModule, make_param


class LayerNorm(ShardedModule):
    """Layer normalization (Ba et al. 2016) with float32 parameters and statistics.

    The variance of float32 inputs is computed from centered values, in two passes: the mean of
    squares minus the squared mean cancels if the mean is large. bfloat16 inputs take one pass, as
    their rounding exceeds the cancellation.

    Parameters
    ----------
    features
        Size of the last axis.
    eps
        Added to the variance.
    bias
        Whether to add a bias.
    axis
        Logical axis of the parameters.

    Examples
    --------
    >>> from tjx_nn import LayerNorm
    >>> print(LayerNorm(4)(jnp.array([[1.0, 1.0, 3.0, 3.0]])).round(2))
    [[-1. -1.  1.  1.]]
    """

    def __init__(
        self, features: int, *, eps: float = 1e-5, bias: bool = True, axis: str = "embed"
    ) -> None:
        self.eps, self.axes = eps, (axis,)
        self.scale = make_param(jnp.ones(features, jnp.float32), (axis,))
        self.bias = make_param(jnp.zeros(features, jnp.float32), (axis,)) if bias else None

    @jax.named_scope("norm")  # profiles and the planner group operations by this scope
    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """Normalize the last axis; the output has the dtype of `x`."""
        scale = self.gather(self.scale, self.axes)
        bias = None if self.bias is None else self.gather(self.bias, self.axes)
        y: Array = _normalize(x, scale, bias, self.eps, True)
        return y


class RMSNorm(ShardedModule):
    """Root mean square normalization (Zhang and Sennrich 2019), float32 parameters and statistics.

    Parameters
    ----------
    features
        Size of the last axis.
    eps
        Added to the mean square.
    axis
        Logical axis of the scale.
    offset
        Added to the scale parameter, which starts at 1 - offset.

    Examples
    --------
    >>> from tjx_nn import RMSNorm
    >>> print(RMSNorm(2)(jnp.array([[3.0, 3.0]])).round(2))
    [[1. 1.]]
    """

    def __init__(
        self, features: int, *, eps: float = 1e-5, axis: str = "embed", offset: float = 0.0
    ) -> None:
        self.eps, self.axes, self.offset = eps, (axis,), offset
        self.scale = make_param(jnp.full(features, 1 - offset, jnp.float32), (axis,))

    @jax.named_scope("norm")  # profiles and the planner group operations by this scope
    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """Normalize the last axis; the output has the dtype of `x`."""
        scale = self.gather(self.scale, self.axes)
        if self.offset:
            scale = scale + self.offset
        y: Array = _normalize(x, scale, None, self.eps, False)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(
    x: Float[Array, "*any D"],
    scale: Float32[Array, " D"],
    bias: Float32[Array, " D"] | None,
    eps: float,
    centre: bool,
) -> Float[Array, "*any D"]:
    return _forward(x, scale, bias, eps, centre)[0]


# Residuals: x, scale, bias, and the sums of each row that determine its mean and variance. The
# backward pass recomputes the float32 arrays of the size of x.
type _NormResiduals = tuple[Array, Array, Array | None, tuple[Array, ...]]


def _forward(
    x: Array, scale: Array, bias: Array | None, eps: float, centre: bool
) -> tuple[Array, _NormResiduals]:
    sums = _materialize(_row_sums(x, centre))
    lead = (1,) * (x.ndim - 1)
    y = _standardize(x, sums, eps, centre)[0] * scale.reshape(*lead, -1)
    if bias is not None:
        y = y + bias.reshape(*lead, -1)
    return y.astype(x.dtype), (x, scale, bias, sums)


def _row_sums(x: Array, centre: bool) -> tuple[Array, ...]:
    """Return the sum of squares of each row; with `centre` the sum, then the sum of squares.

    The squares are of the centered values, or for bfloat16 of x itself, so that both sums take one
    pass: the cancellation, mean**2 * 2**-24, is below the rounding error of bfloat16 inputs, about
    mean**2 * 2**-18.
    """
    y = x.astype(jnp.float32)
    if not centre:
        return (jnp.square(y).sum(-1, keepdims=True),)
    total = y.sum(-1, keepdims=True)
    if not _uses_one_pass(x):
        y = y - total / x.shape[-1]
    return total, jnp.square(y).sum(-1, keepdims=True)


def _uses_one_pass(x: Array) -> bool:
    return bool(x.dtype == jnp.bfloat16)


def _standardize(
    x: Array, sums: tuple[Array, ...], eps: float, centre: bool
) -> tuple[Array, Array]:
    """Return rows of mean 0 (with `centre`) and variance 1, and 1 / their standard deviation."""
    y = x.astype(jnp.float32)
    variance = sums[-1] / x.shape[-1]
    if centre:
        mean = sums[0] / x.shape[-1]
        if _uses_one_pass(x):
            variance = jnp.maximum(variance - jnp.square(mean), 0)
        y = y - mean
    inverse = jax.lax.rsqrt(variance + eps)
    return y * inverse, inverse


def _materialize[T](sums: T) -> T:
    """Materialize row sums on GPUs, behind an optimization barrier.

    Without the barrier XLA:GPU recomputes the sums in every consumer, in kernels that write float32
    arrays of the size of x. On CPUs the barrier gains nothing, and collectives of a pipeline with
    sequence parallelism deadlock behind it.
    """
    if current_target().platform != "gpu":
        return sums
    barrier: T = jax.lax.optimization_barrier(sums)  # type: ignore[no-untyped-call]  # as jax is
    return barrier


def _backward(
    eps: float, centre: bool, residuals: _NormResiduals, dy: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, bias, sums = residuals
    rows = tuple(range(x.ndim - 1))
    dy = dy.astype(jnp.float32)
    normal, inverse = _standardize(x, sums, eps, centre)
    scaled = dy * scale.reshape((1,) * len(rows) + (-1,))
    sums_dx = [(scaled * normal).sum(-1, keepdims=True)]
    if centre:
        sums_dx.append(scaled.sum(-1, keepdims=True))
    means = [each / x.shape[-1] for each in _materialize(sums_dx)]
    dx = scaled - normal * means[0]
    if centre:
        dx = dx - means[1]
    dx = (dx * inverse).astype(x.dtype)
    return dx, (dy * normal).sum(rows), None if bias is None else dy.sum(rows)


_normalize.defvjp(_forward, _backward)
