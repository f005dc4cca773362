"""Boolean masks and mask functions of attention.

Backends evaluate an elementwise function of the indices tile by tile. Every other mask becomes an
additive bias, which is stored whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (batch index, head index, query position, key index), int32 arrays that broadcast against each
# other, to a boolean array: True where the query attends to the key.
type MaskMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Primitives whose value at an index depends on their operands at this index alone.
_ELEMENTWISE = {
    *("abs", "add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "div", "eq", "ge"),
    *("gt", "integer_pow", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem"),
    *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "square"),
    *("sub", "xor"),
}


def split_mask(
    mask: jax.Array | MaskMod | None,
    q: jax.Array,
    k: jax.Array,
    *,
    q_offset: int | jax.Array = 0,
    bias: jax.Array | None = None,
) -> tuple[MaskMod | None, jax.Array | None]:
    """Return the function that a backend evaluates, or None, and the bias with any other mask.

    Parameters
    ----------
    mask, q, k, q_offset, bias
        Arguments of `flash_attention`.

    Raises
    ------
    ValueError
        If the mask is not boolean or its shape does not fit.
    """
    if mask is None:
        return None, bias
    if callable(mask) and is_elementwise(mask):
        sizes = _sizes(q, k)
        _check(jax.eval_shape(mask, *map(_spec, _shapes(sizes))), sizes)
        return mask, bias
    return None, mask_to_bias(mask, q, k, q_offset=q_offset, bias=bias)


def is_elementwise(mask: MaskMod) -> bool:
    """Return whether a mask function computes each value from the indices of this value alone.

    Examples
    --------
    >>> is_elementwise(lambda batch, head, query, key: key // 64 <= query // 64)
    True
    >>> lengths = jnp.array([3, 5])
    >>> is_elementwise(lambda batch, head, query, key: key < lengths[batch])
    False
    """
    found = jax.make_jaxpr(mask)(*map(_spec, _shapes((2, 2, 2, 2))))
    return not found.consts and _names(found.jaxpr) <= _ELEMENTWISE


def mask_sizes(mask: MaskMod, batch: int, heads: int) -> tuple[int, int]:
    """Return the sizes of a function's mask along batch and heads, 1 if it ignores their index.

    Examples
    --------
    >>> mask_sizes(lambda batch, head, query, key: key <= query + head, 2, 4)
    (1, 4)
    """
    of_batch, of_heads = jax.eval_shape(mask, *map(_spec, _shapes((2, 2, 2, 2)))).shape[:2]
    return batch if of_batch > 1 else 1, heads if of_heads > 1 else 1


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
    sizes = _sizes(q, k)
    if callable(mask):
        batch, head, query, key = (
            jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            for axis, shape in enumerate(_shapes(sizes))
        )
        mask = mask(batch, head, query + jnp.asarray(q_offset).reshape(-1, 1, 1, 1), key)
    _check(mask, sizes)
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], *sizes[2:]))
    allowed = jnp.zeros((), q.dtype) if bias is None else bias
    return jnp.where(mask, allowed, jnp.asarray(-jnp.inf, allowed.dtype))


def _sizes(q: Any, k: Any) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[1], k.shape[1]


def _shapes(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shape of each index: its size along its own axis, 1 along the others."""
    return [tuple(n if a == axis else 1 for a in range(4)) for axis, n in enumerate(sizes)]


def _spec(shape: tuple[int, ...]) -> Any:
    spec: Any = jax.ShapeDtypeStruct  # which has no types
    return spec(shape, jnp.int32)


def _names(jaxpr: Any) -> set[str]:
    """Return the names of all primitives of a program; a call counts as what it calls."""
    names: set[str] = set()
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        names |= {equation.primitive.name} if inner is None else _names(inner.jaxpr)
    return names


def _check(mask: Any, sizes: tuple[int, ...]) -> None:
    fits = mask.ndim == 4 and all(n in (1, size) for n, size in zip(mask.shape, sizes, strict=True))
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"mask: got {mask.dtype} of shape {mask.shape}; expected bool of shape "
            f"[batch or 1, heads or 1, q_len or 1, kv_len or 1] with sizes {list(sizes)}, True "
            "where a query attends to a key; add axes of size 1, or convert it with mask != 0"
        )
