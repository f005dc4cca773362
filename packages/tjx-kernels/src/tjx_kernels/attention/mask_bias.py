"""Boolean masks and mask functions of attention, as an additive bias."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (batch index, head index, query position, key index), integer arrays that broadcast against each
# other, to a boolean array: True where the query attends to the key.
type MaskMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def mask_to_bias(
    mask: jax.Array | MaskMod,
    q: jax.Array,
    k: jax.Array,
    *,
    q_offset: int | jax.Array = 0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Return the bias with the effect of a mask: 0, or `bias`, where it is True, else -inf.

    Parameters
    ----------
    mask : bool [batch or 1, heads or 1, q_len or 1, kv_len or 1], or a function
        As for `flash_attention`.
    q, k, q_offset, bias
        Arguments of `flash_attention`; the sizes of `q` and `k` are read, not their values.

    Returns
    -------
    bias : [batch or 1, heads or 1, q_len, kv_len]
        In the dtype of `bias`, or of `q`.

    Raises
    ------
    ValueError
        If the mask is not boolean or its shape does not fit.

    Examples
    --------
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> print(mask_to_bias(lambda batch, head, query, key: key <= query, x, x)[0, 0])
    [[  0. -inf]
     [  0.   0.]]
    """
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if callable(mask):
        batch, head, query, key = (
            jax.lax.broadcasted_iota(jnp.int32, [n if a == axis else 1 for a in range(4)], axis)
            for axis, n in enumerate(sizes)
        )
        mask = mask(batch, head, query + jnp.asarray(q_offset).reshape(-1, 1, 1, 1), key)
    fits = mask.ndim == 4 and all(n in (1, size) for n, size in zip(mask.shape, sizes, strict=True))
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"mask: got {mask.dtype} of shape {mask.shape}; expected bool of shape "
            f"[batch or 1, heads or 1, q_len or 1, kv_len or 1] with sizes {list(sizes)}, True "
            "where a query attends to a key; add axes of size 1, or convert it with mask != 0"
        )
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], *sizes[2:]))
    allowed = jnp.zeros((), q.dtype) if bias is None else bias
    return jnp.where(mask, allowed, jnp.asarray(-jnp.inf, allowed.dtype))
