"""Per-label cross-entropy from logits, for models that do not return a loss."""

import jax
import jax.numpy as jnp

IGNORE_INDEX = -100
"""Label of positions that metrics ignore."""


def cross_entropy(
    logits: jax.Array, labels: jax.Array, ignore_index: int = IGNORE_INDEX
) -> jax.Array:
    """Compute the negative log-likelihood of each label.

    Parameters
    ----------
    logits : float array [..., vocab]
        Converted to float32.
    labels : int array [...]
        Target tokens in [0, vocab), or `ignore_index`.
    ignore_index : int
        Label of positions that are not counted.

    Returns
    -------
    float32 array [...]
        Loss in nats; 0 at ignored labels.

    Raises
    ------
    ValueError
        If the shapes do not match.

    Examples
    --------
    >>> import jax, math, numpy as np
    >>> logits = jax.device_put(np.zeros((2, 256), np.float32))
    >>> losses = jax.jit(cross_entropy)(logits, jax.device_put(np.array([7, -100])))
    >>> [round(loss / math.log(2), 4) for loss in losses.tolist()]
    [8.0, 0.0]
    """
    check_shapes(logits, labels)
    counted = labels != ignore_index
    scores = logits.astype(jnp.float32)
    index = jnp.where(counted, labels, 0)
    label_scores = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(scores, axis=-1) - label_scores, 0.0)


def check_shapes(logits: jax.Array, labels: jax.Array) -> None:
    """Raise ValueError unless `labels` has the shape of `logits` without the vocabulary axis."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: got shape {labels.shape} for logits of shape {logits.shape}; expected the "
            "shape of the logits without its last axis"
        )
