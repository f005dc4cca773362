"""Gradients of several microbatches that equal those of one large batch.

The loss of a batch is (sum of the losses of its real tokens) / (number of real tokens). With
unequal counts the mean over microbatches of their mean losses differs from it, so this module
accumulates sums and divides once, at the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LossSum = Callable[[Any, Any], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]
"""(params, microbatch) -> (sum of losses, (number of real tokens, other sums by name)), scalars."""


class AccumulatedGradients(NamedTuple):
    """Gradients, loss and metrics of a batch, averaged over its real tokens.

    Attributes
    ----------
    gradients : pytree like the parameters, at least float32
        Gradient of ``loss``.
    loss : float32 scalar
        Mean loss over the real tokens of all microbatches; 0 without real tokens.
    token_count : scalar of the dtype the loss function returns
        Number of real tokens in all microbatches.
    means : dict of float32 scalars
        The other sums of the loss function, divided by the number of real tokens.
    """

    gradients: Any
    loss: jax.Array
    token_count: jax.Array
    means: dict[str, jax.Array]


def accumulate_gradients(
    loss_sum: LossSum,
    params: Any,
    microbatches: Any,
    *,
    loss_scale: jax.Array | None = None,
) -> AccumulatedGradients:
    """Compute loss and gradients over k microbatches with the memory of one.

    The result equals that of one large batch, up to the order of float32 sums, for any numbers of
    real tokens per microbatch; without real tokens loss and gradients are 0. With k = 1 the cost is
    that of ``jax.value_and_grad``.

    Parameters
    ----------
    loss_sum : callable
        From (params, microbatch) to (sum of the token losses, (number of real tokens, sums)). The
        first is differentiated; `sums`, scalars by name, are averaged in the result. The number
        must not depend on the parameters.
    params : pytree
        Differentiated argument of `loss_sum`.
    microbatches : pytree of arrays [k, ...]
        Second arguments of `loss_sum`, stacked: tokens, labels, dropout keys.
    loss_scale : float32 scalar, optional
        Factor of the loss during differentiation, for float16, where small gradients underflow
        (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). Results are unscaled;
        with a power of two they have the same bits.

    Returns
    -------
    AccumulatedGradients
        Means over the real tokens. Gradients are not finite if the scaled gradient overflows.

    Raises
    ------
    ValueError
        If the leaves of `microbatches` do not share a first axis of at least 1.

    Examples
    --------
    >>> import jax, numpy as np
    >>> def loss(scale, batch):
    ...     return (scale * batch["x"] * batch["real"]).sum(), (batch["real"].sum(), {})
    >>> batch = {"x": np.array([[1.0, 2.0], [6.0, 9.0]]), "real": np.array([[1, 1], [1, 0]])}
    >>> step = jax.jit(lambda scale, batch: accumulate_gradients(loss, scale, batch))
    >>> out = step(*jax.device_put((np.float32(1.0), batch)))  # (1 + 2 + 6) / 3
    >>> float(out.loss), float(out.gradients), int(out.token_count)
    (3.0, 3.0, 3)
    """
    scale = 1.0 if loss_scale is None else loss_scale
    gradients, totals = gradient_sums(loss_sum, params, microbatches, loss_scale=scale)
    return mean_gradients(gradients, totals, loss_scale=scale)


class LossTotals(NamedTuple):
    """Sums over all microbatches.

    Attributes
    ----------
    loss : float32 scalar
        Sum of the token losses.
    token_count : scalar
        Number of real tokens.
    sums : dict of float32 scalars
        The other sums of the loss function.
    """

    loss: jax.Array
    token_count: jax.Array
    sums: dict[str, jax.Array]


def gradient_sums(
    loss_sum: LossSum, params: Any, microbatches: Any, *, loss_scale: jax.Array | float
) -> tuple[Any, LossTotals]:
    """Sum loss and gradients over k microbatches; `accumulate_gradients` without the division.

    Parameters
    ----------
    loss_sum, params, microbatches, loss_scale
        As for `accumulate_gradients`.

    Returns
    -------
    gradients : pytree like the parameters, at least float32
        Gradient of the sum of the token losses times ``loss_scale``.
    totals : LossTotals
        Unscaled sums. `mean_gradients` divides both, also after adding those of other devices.
    """
    k = _leading_size(microbatches)

    def scaled(params: Any, microbatch: Any) -> tuple[jax.Array, Any]:
        loss, (count, sums) = loss_sum(params, microbatch)
        return at_least_float32(loss) * loss_scale, (loss, count, sums)

    gradient = jax.grad(scaled, has_aux=True)

    def sums_of(microbatch: Any) -> tuple[Any, Any]:
        gradients, (loss, count, sums) = gradient(params, microbatch)
        scalars = (at_least_float32(loss), jnp.asarray(count), jax.tree.map(at_least_float32, sums))
        return scalars, jax.tree.map(at_least_float32, gradients)

    def add_to(totals: Any, microbatch: Any) -> tuple[Any, Any]:
        scalars, gradients = sums_of(microbatch)
        with jax.named_scope("gradients"):  # the planner finds its operations by this name
            return jax.tree.map(jnp.add, totals, gradients), scalars

    if k == 1:
        scalars, totals = sums_of(jax.tree.map(lambda leaf: leaf[0], microbatches))
    else:
        with jax.named_scope("gradients"):
            zeros = jax.tree.map(lambda leaf: jnp.zeros_like(at_least_float32(leaf)), params)
        totals, scalars = jax.lax.scan(add_to, zeros, microbatches)
        scalars = jax.tree.map(jnp.sum, scalars)
    return totals, LossTotals(*scalars)


@jax.named_scope("gradients")
def mean_gradients(
    gradients: Any, totals: LossTotals, *, loss_scale: jax.Array | float
) -> AccumulatedGradients:
    """Divide sums over all microbatches by the number of real tokens.

    Parameters
    ----------
    gradients, totals, loss_scale
        Results and loss scale of `gradient_sums`.

    Returns
    -------
    AccumulatedGradients
        Gradients, loss and other sums per real token; zeros without real tokens.
    """
    loss, count, sums = totals
    # Sums over no tokens are 0, and 0 / 1 = 0: a batch of padding changes nothing.
    divisor = jnp.where(count > 0, count, 1).astype(jnp.float32)
    # Unscaled here, before clipping: the norm of scaled gradients is another one.
    unscale = divisor * loss_scale
    gradients = jax.tree.map(lambda leaf: leaf / unscale.astype(leaf.dtype), gradients)
    means = {name: total / divisor for name, total in sums.items()}
    return AccumulatedGradients(gradients, loss / divisor, count, means)


def split_microbatches(batch: Any, k: int) -> Any:
    """Split a batch into k microbatches along its first axis.

    Microbatch j holds the rows j, j + k, j + 2k, ... If the rows are sharded over devices in
    contiguous blocks, each device then holds rows of every microbatch and no data moves.

    Parameters
    ----------
    batch : pytree of arrays [batch, ...]
        Host or device arrays.
    k : int
        Number of microbatches; must divide the batch.

    Returns
    -------
    pytree of arrays [k, batch / k, ...]
        Input of `accumulate_gradients`.

    Raises
    ------
    ValueError
        If `k` is not positive or does not divide the batch.

    Examples
    --------
    >>> import numpy as np
    >>> split_microbatches({"tokens": np.arange(6)}, 2)["tokens"].tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    rows = _leading_size(batch)
    if k < 1 or rows % k:
        raise ValueError(
            f"accumulation: got {k}; expected a divisor of the batch of {rows} sequences; "
            "change one of the two"
        )
    return jax.tree.map(
        lambda leaf: leaf.reshape(rows // k, k, *leaf.shape[1:]).swapaxes(0, 1), batch
    )


def _leading_size(tree: Any) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"microbatches: got arrays of shapes {shapes}; expected a common first axis of at "
            "least 1; stack per-microbatch values such as dropout keys"
        )
    return int(sizes.pop())


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widen an array that is narrower than float32, for sums of many small terms."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
