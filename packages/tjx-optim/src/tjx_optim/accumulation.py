"""Gradients of several microbatches that equal those of one large batch.

The loss of a batch is (sum of the losses of its real tokens) / (number of real tokens). With
unequal counts the mean of the microbatches' means is another number, so sums are accumulated and
divided once, at the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tjx_optim.norms import widened

# (params, microbatch) -> (sum of the losses, (number of real tokens, other sums by name)), scalars.
LossSum = Callable[[Any, Any], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


class AccumulatedGradients(NamedTuple):
    """What a batch gives, however many microbatches it was computed in.

    Attributes
    ----------
    gradients : pytree like the parameters, at least float32
        Gradient of ``loss``.
    loss : float32 scalar
        Mean loss of the real tokens of all microbatches; 0 where there is none.
    token_count : scalar of the dtype the loss function returns
        Number of real tokens in all microbatches.
    means : dict of float32 scalars
        The other sums of the loss function, over all microbatches, by the number of real tokens.
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
    """Compute loss and gradients over k microbatches in the memory of one.

    Equal to one large batch, up to the order of float32 sums, whatever the numbers of real tokens.
    A batch without any real token has loss 0 and gradients 0. The compiled step depends on the
    shapes alone, k among them. k = 1 costs nothing over ``jax.value_and_grad``.

    Parameters
    ----------
    loss_sum : callable
        From (params, microbatch) to (sum of the token losses, (number of real tokens, sums)): what
        is differentiated, and what is only reported. `sums` are scalars by name, of which the
        result has the means. The count must not depend on the parameters.
    params : pytree
        What is differentiated.
    microbatches : pytree of arrays [k, ...]
        Whatever the loss function takes, with k in front: tokens, labels, a dropout key each, ...
    loss_scale : float32 scalar, optional
        Factor of the sum of the losses while it is differentiated, for computing in float16, where
        small gradients would be 0 (Micikevicius et al. 2018, "Mixed Precision Training", section
        3.2). Nothing that is returned is scaled; a power of two changes no bit of it.

    Returns
    -------
    AccumulatedGradients
        Gradients (float32, or wider where the parameters are), loss, count and means. Where the
        scaled gradient overflows, the gradients are not finite.

    Raises
    ------
    ValueError
        When the leaves of `microbatches` do not share a first axis of at least 1.

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
    k = _leading_size(microbatches)
    scale = jnp.float32(1) if loss_scale is None else loss_scale

    def scaled(params: Any, microbatch: Any) -> tuple[jax.Array, Any]:
        loss, (count, sums) = loss_sum(params, microbatch)
        return widened(loss) * scale, (loss, count, sums)

    gradient = jax.grad(scaled, has_aux=True)

    def sums_of(microbatch: Any) -> tuple[Any, Any]:
        gradients, (loss, count, sums) = gradient(params, microbatch)
        scalars = (widened(loss), jnp.asarray(count), jax.tree.map(widened, sums))
        return scalars, jax.tree.map(widened, gradients)

    def add_to(totals: Any, microbatch: Any) -> tuple[Any, Any]:
        scalars, gradients = sums_of(microbatch)
        with jax.named_scope("gradients"):  # as plans name it
            return jax.tree.map(jnp.add, totals, gradients), scalars

    if k == 1:
        scalars, totals = sums_of(jax.tree.map(lambda leaf: leaf[0], microbatches))
    else:
        with jax.named_scope("gradients"):
            zeros = jax.tree.map(lambda leaf: jnp.zeros_like(widened(leaf)), params)
        totals, scalars = jax.lax.scan(add_to, zeros, microbatches)
        scalars = jax.tree.map(jnp.sum, scalars)
    return mean_gradients(totals, LossTotals(*scalars), loss_scale=scale)


class LossTotals(NamedTuple):
    """What was counted over all microbatches.

    Attributes
    ----------
    loss : float32 scalar
        Sum of the token losses.
    token_count : scalar
        Number of real tokens.
    sums : dict of float32 scalars
        The other sums.
    """

    loss: jax.Array
    token_count: jax.Array
    sums: dict[str, jax.Array]


@jax.named_scope("gradients")
def mean_gradients(
    gradients: Any, totals: LossTotals, *, loss_scale: jax.Array | float
) -> AccumulatedGradients:
    """Make means of the sums over all microbatches.

    Parameters
    ----------
    gradients : pytree, at least float32
        Of the sum of the token losses times ``loss_scale``.
    totals : Totals
        What was counted; nothing of it is scaled.
    loss_scale : float32 scalar
        Factor of the sum while it was differentiated.

    Returns
    -------
    AccumulatedGradients
        Gradients, loss and other sums by the number of real tokens; zeros where there is none.
    """
    loss, count, sums = totals
    # Sums over no tokens are 0, and 0 / 1 = 0: a batch of padding changes nothing.
    divisor = jnp.where(count > 0, count, 1).astype(jnp.float32)
    # Before anything looks at them: a clip of scaled gradients would clip at another norm.
    unscale = divisor * loss_scale
    gradients = jax.tree.map(lambda leaf: leaf / unscale.astype(leaf.dtype), gradients)
    means = {name: total / divisor for name, total in sums.items()}
    return AccumulatedGradients(gradients, loss / divisor, count, means)


def split_microbatches(batch: Any, k: int) -> Any:
    """Cut a batch into k microbatches along its first axis.

    Microbatch j holds the rows j, j + k, j + 2k, ...: where rows are spread over devices in
    contiguous blocks, each device then holds a share of every microbatch and nothing moves.

    Parameters
    ----------
    batch : pytree of arrays [batch, ...]
        Host or device arrays.
    k : int
        Number of microbatches; must divide the batch.

    Returns
    -------
    pytree of arrays [k, batch / k, ...]
        The microbatches, for `accumulate_gradients`.

    Raises
    ------
    ValueError
        When `k` is not positive or does not divide the batch.

    Examples
    --------
    >>> import numpy as np
    >>> split_microbatches({"tokens": np.arange(6)}, 2)["tokens"].tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    rows = _leading_size(batch)
    if k < 1 or rows % k:
        raise ValueError(
            f"accumulation={k}: must be at least 1 and divide the batch of {rows} sequences; "
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
            f"arrays of shapes {shapes}: all must share a first axis of at least 1; "
            "stack what differs for each part, such as dropout keys"
        )
    return int(sizes.pop())
