"""The loss of each label from logits: for models whose own loss is not at hand."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, ignore_index: int = -100) -> jax.Array:
    """Compute the negative log-likelihood of each label.

    Parameters
    ----------
    logits : float array [..., vocab]
        Scores of the next token; computed with in float32.
    labels : int array [...]
        The tokens that came, each in [0, vocab) or `ignore_index`.
    ignore_index : int
        Label of a position that counts nowhere.

    Returns
    -------
    float32 array [...]
        Nats; 0 where the label is ignored.

    Raises
    ------
    ValueError
        When the shapes do not fit.

    Examples
    --------
    >>> import jax, math, numpy as np
    >>> logits = jax.device_put(np.zeros((2, 256), np.float32))
    >>> losses = jax.jit(cross_entropy)(logits, jax.device_put(np.array([7, -100])))
    >>> [round(loss / math.log(2), 4) for loss in losses.tolist()]
    [8.0, 0.0]
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}: must be the shape "
            "of the logits without its last axis"
        )
    counted = labels != ignore_index
    scores = logits.astype(jnp.float32)
    index = jnp.where(counted, labels, 0)
    own = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(scores, axis=-1) - own, 0.0)
