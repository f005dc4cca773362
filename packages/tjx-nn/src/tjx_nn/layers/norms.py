"""Normalisation of the last axis: LayerNorm and RMSNorm.

Statistics are float32 whatever the input's dtype.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from tjx_kernels.target import current_target
from tjx_nn.config import TransformerConfig
from tjx_nn.layout import ShardedModule


class LayerNorm(ShardedModule):
    """Normalise to mean 0 and variance 1, then scale and shift. Ba et al. 2016.

    The variance is that of the centred values, as the cheaper mean of squares cancels badly when
    the mean is large; of bfloat16, which is coarser than what cancels, it is the cheaper one.
    """

    def __init__(
        self, features: int, *, eps: float = 1e-5, bias: bool = True, axis: str = "embed"
    ) -> None:
        self.eps, self.axes = eps, (axis,)
        self.scale = nnx.Param(jnp.ones(features, jnp.float32), logical_axes=(axis,))
        shift = nnx.Param(jnp.zeros(features, jnp.float32), logical_axes=(axis,))
        self.bias = shift if bias else None

    @jax.named_scope("norm")  # as profiles and plans name it
    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """Return the normalised `x`, in its dtype."""
        scale = self.table(self.scale, self.axes)
        bias = None if self.bias is None else self.table(self.bias, self.axes)
        y: Array = _normalise(x, scale, bias, self.eps, True)
        return y


class RMSNorm(ShardedModule):
    """Divide by the root of the mean square, then scale. Zhang and Sennrich 2019."""

    def __init__(self, features: int, *, eps: float = 1e-5, axis: str = "embed") -> None:
        self.eps, self.axes = eps, (axis,)
        self.scale = nnx.Param(jnp.ones(features, jnp.float32), logical_axes=(axis,))

    @jax.named_scope("norm")  # as profiles and plans name it
    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """Return the normalised `x`, in its dtype."""
        scale = self.table(self.scale, self.axes)
        y: Array = _normalise(x, scale, None, self.eps, False)
        return y


def make_norm(
    config: TransformerConfig, features: int | None = None, *, axis: str = "embed"
) -> LayerNorm | RMSNorm:
    """Return the norm that the configuration asks for, over the residual stream by default."""
    features = config.d_model if features is None else features
    if config.norm == "rmsnorm":
        return RMSNorm(features, eps=config.norm_eps, axis=axis)
    return LayerNorm(features, eps=config.norm_eps, bias=config.bias, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: Float[Array, "*any D"],
    scale: Float32[Array, " D"],
    bias: Float32[Array, " D"] | None,
    eps: float,
    centre: bool,
) -> Float[Array, "*any D"]:
    return _forward(x, scale, bias, eps, centre)[0]


# What the backward pass keeps: x, the scale, the bias, and of each row the sums that its mean and
# its deviation follow from. The float32 arrays of x's size are computed again.
type _NormResiduals = tuple[Array, Array, Array | None, tuple[Array, ...]]


def _forward(
    x: Array, scale: Array, bias: Array | None, eps: float, centre: bool
) -> tuple[Array, _NormResiduals]:
    sums = _computed(_sums(x, centre))
    lead = (1,) * (x.ndim - 1)
    y = _standardised(x, sums, eps, centre)[0] * scale.reshape(*lead, -1)
    if bias is not None:
        y = y + bias.reshape(*lead, -1)
    return y.astype(x.dtype), (x, scale, bias, sums)


def _sums(x: Array, centre: bool) -> tuple[Array, ...]:
    """Return the sum of squares of each row; with `centre` the sum, then that of the squares.

    The squares are those of the distances to the mean, but of bfloat16 those of x: both sums then
    take one pass. What the difference of squares loses in float32, mean**2 * 2**-24, is less than
    what rounding to bfloat16 has done to the variance, about mean**2 * 2**-18.
    """
    y = x.astype(jnp.float32)
    if not centre:
        return (jnp.square(y).sum(-1, keepdims=True),)
    total = y.sum(-1, keepdims=True)
    if not _in_one_pass(x):
        y = y - total / x.shape[-1]
    return total, jnp.square(y).sum(-1, keepdims=True)


def _in_one_pass(x: Array) -> bool:
    return bool(x.dtype == jnp.bfloat16)


def _standardised(
    x: Array, sums: tuple[Array, ...], eps: float, centre: bool
) -> tuple[Array, Array]:
    """Return the rows with mean 0 (with `centre`) and deviation 1, and 1 / their deviation."""
    y = x.astype(jnp.float32)
    variance = sums[-1] / x.shape[-1]
    if centre:
        mean = sums[0] / x.shape[-1]
        if _in_one_pass(x):
            variance = jnp.maximum(variance - jnp.square(mean), 0)
        y = y - mean
    inverse = jax.lax.rsqrt(variance + eps)
    return y * inverse, inverse


def _computed[T](sums: T) -> T:
    """Return sums over rows, on GPUs as arrays of their own.

    Without the barrier XLA:GPU computes them again wherever they are used, in kernels that write
    float32 arrays of x's size. What follows from them costs less than a kernel of its own. On CPUs
    it gains nothing, and the collectives of a pipeline whose stream is divided over devices
    deadlock behind it.
    """
    if current_target().platform != "gpu":
        return sums
    found: T = jax.lax.optimization_barrier(sums)  # type: ignore[no-untyped-call]  # as jax is
    return found


def _backward(
    eps: float, centre: bool, residuals: _NormResiduals, dy: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, bias, sums = residuals
    rows = tuple(range(x.ndim - 1))
    dy = dy.astype(jnp.float32)
    normal, inverse = _standardised(x, sums, eps, centre)
    scaled = dy * scale.reshape((1,) * len(rows) + (-1,))
    found = [(scaled * normal).sum(-1, keepdims=True)]
    if centre:
        found.append(scaled.sum(-1, keepdims=True))
    means = [each / x.shape[-1] for each in _computed(found)]
    dx = scaled - normal * means[0]
    if centre:
        dx = dx - means[1]
    dx = (dx * inverse).astype(x.dtype)
    return dx, (dy * normal).sum(rows), None if bias is None else dy.sum(rows)


_normalise.defvjp(_forward, _backward)
