"""Top-k accuracy on the device, by the rank of the label's logit: no sort of the vocabulary."""

import jax
import jax.numpy as jnp


def top_k_correct(
    logits: jax.Array,
    labels: jax.Array,
    ks: tuple[int, ...] = (1, 5, 10),
    ignore_index: int = -100,
) -> jax.Array:
    """Count the labels that are among the k highest logits.

    The rank of a label is the number of logits strictly greater than its own, and it counts where
    that is below k. So equal logits never push a label out: among n logits of equal, highest
    value each label is right at k = 1. A NaN among the logits ranks above the label, and a label
    whose own logit is NaN is never right.

    Parameters
    ----------
    logits : float array [..., vocab]
        Scores of the next token.
    labels : int array [...]
        The tokens that came, each in [0, vocab) or `ignore_index`.
    ks : tuple of int
        The values of k; static under ``jax.jit``.
    ignore_index : int
        Label of a position that counts nowhere.

    Returns
    -------
    int32 array [len(ks)]
        Number of right labels for each k. Sums of several batches divide by the sum of their
        counts of labels that are not `ignore_index`.

    Raises
    ------
    ValueError
        When the shapes do not fit, or a k is below 1.

    Examples
    --------
    >>> import jax, numpy as np
    >>> logits = jax.device_put(np.array([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]))
    >>> labels = jax.device_put(np.array([1, 2, -100]))
    >>> jax.jit(top_k_correct, static_argnames="ks")(logits, labels, ks=(1, 2)).tolist()
    [1, 2]
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}: must be the shape "
            "of the logits without its last axis"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={ks}: must hold at least one k, each at least 1; try (1, 5, 10)")
    counted = labels != ignore_index
    index = jnp.where(counted, labels, 0)
    own = jnp.take_along_axis(logits, index[..., None], axis=-1)
    # Not "greater": with NaN every comparison is false, and NaN must not look like a good rank.
    rank = (~(logits <= own)).sum(axis=-1)
    possible = counted & ~jnp.isnan(own[..., 0])
    return jnp.stack([(possible & (rank < k)).sum(dtype=jnp.int32) for k in ks])


def top_k_accuracy(
    logits: jax.Array,
    labels: jax.Array,
    ks: tuple[int, ...] = (1, 5, 10),
    ignore_index: int = -100,
) -> jax.Array:
    """Compute the share of labels that are among the k highest logits.

    For several batches add `top_k_correct` instead: a mean of shares weighs tokens unequally.

    Parameters
    ----------
    logits, labels, ks, ignore_index
        As in `top_k_correct`.

    Returns
    -------
    float32 array [len(ks)]
        Share in [0, 1] for each k; NaN where every label is ignored.

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
