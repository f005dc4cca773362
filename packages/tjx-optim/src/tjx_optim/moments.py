"""Moments that are stored in fewer bits than they are computed in."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def stored_as(
    transformation: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """Keep the floating-point state of a transformation in another dtype.

    An update widens the state to float32, is computed, and rounds the new state to the nearest.
    The update itself is made of what is not rounded yet. DeepSeek-AI 2024, "DeepSeek-V3", section
    3.3.2, stores both moments of AdamW so.

    Parameters
    ----------
    transformation : optax.GradientTransformation
        All floating-point arrays in its state are moments.
    dtype : str
        Such as "bfloat16".
    """

    def init(params: Any) -> Any:
        return _cast(transformation.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = transformation.update(updates, _cast(state, "float32"), params)
        return updates, _cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )
