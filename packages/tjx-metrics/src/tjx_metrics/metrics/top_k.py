"""Top-k accuracy on the device, from the rank of each label's logit. Does not sort."""

import jax
import jax.numpy as jnp

from tjx_metrics.metrics.cross_entropy import IGNORE_INDEX, check_shapes


def top_k_correct(
    logits: jax.Array,
    labels: jax.Array,
    ks: tuple[int, ...] = (1, 5, 10),
    ignore_index: int = IGNORE_INDEX,
) -> jax.Array:
    """Count the labels that are among the k highest logits, for each k.

    A label is counted if fewer than k logits are strictly greater than its own. Ties therefore
    never exclude a label: if n logits share the highest value, each of them is correct at k = 1. A
    NaN logit ranks above the label, and a label with a NaN logit is never correct.

    Parameters
    ----------
    logits : float array [..., vocab]
        Scores of the next token.
    labels : int array [...]
        Target tokens in [0, vocab), or `ignore_index`.
    ks : tuple of int
        Values of k; static under ``jax.jit``.
    ignore_index : int
        Label of positions that are not counted.

    Returns
    -------
    int32 array [len(ks)]
        Number of correct labels for each k. For several batches, add these counts and divide by
        the total number of labels that are not `ignore_index`.

    Raises
    ------
    ValueError
        If the shapes do not match or a k is below 1.

    Examples
    --------
    >>> import jax, numpy as np
    >>> logits = jax.device_put(np.array([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]))
    >>> labels = jax.device_put(np.array([1, 2, -100]))
    >>> jax.jit(top_k_correct, static_argnames="ks")(logits, labels, ks=(1, 2)).tolist()
    [1, 2]
    """
    check_shapes(logits, labels)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: got {ks}; expected at least one k, each at least 1; try (1, 5, 10)")
    counted = labels != ignore_index
    index = jnp.where(counted, labels, 0)
    label_logits = jnp.take_along_axis(logits, index[..., None], axis=-1)
    # "Not less or equal" instead of "greater": comparisons with NaN are false, and a NaN logit
    # must not improve the rank.
    rank = (~(logits <= label_logits)).sum(axis=-1)
    valid = counted & ~jnp.isnan(label_logits[..., 0])
    return jnp.stack([(valid & (rank < k)).sum(dtype=jnp.int32) for k in ks])


def top_k_accuracy(
    logits: jax.Array,
    labels: jax.Array,
    ks: tuple[int, ...] = (1, 5, 10),
    ignore_index: int = IGNORE_INDEX,
) -> jax.Array:
    """Compute the fraction of labels that are among the k highest logits, for each k.

    For several batches, add the counts of `top_k_correct` instead: a mean of batch accuracies
    weights tokens unequally.

    Parameters
    ----------
    logits, labels, ks, ignore_index
        As in `top_k_correct`.

    Returns
    -------
    float32 array [len(ks)]
        Fraction in [0, 1] for each k; NaN if every label is ignored.

    Examples
    --------
    >>> import jax, numpy as np
    >>> logits = jax.device_put(np.array([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2]]))
    >>> jax.jit(top_k_accuracy, static_argnames="ks")(
    ...     logits, jax.device_put(np.array([1, 2])), ks=(1, 2)
    ... ).tolist()
    [0.5, 1.0]
    """
    correct = top_k_correct(logits, labels, ks, ignore_index)
    return correct.astype(jnp.float32) / (labels != ignore_index).sum().astype(jnp.float32)
