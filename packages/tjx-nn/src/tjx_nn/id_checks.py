"""Validation of token ids, positions and labels."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

# Label that the loss ignores.
IGNORE_INDEX = -100


def check_ids(
    name: str,
    ids: Int[Array | np.ndarray, "*any"],
    limit: int,
    limit_name: str,
    *,
    traced: bool = False,
) -> None:
    """Check that all ids are in [0, limit).

    Parameters
    ----------
    name, limit_name
        Names of the ids and of the limit in the error message.
    ids
        Token ids, token types or positions.
    limit
        Number of valid ids.
    traced
        Also check traced ids, by a callback at run time that raises a `JaxRuntimeError` with the
        same message. By default traced ids are not checked.

    Raises
    ------
    ValueError
        If a concrete id is out of range.
    """

    def check(least: Any, largest: Any) -> None:
        low, high = (int(np.asarray(value)) for value in (least, largest))
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name}: got values from {low} to {high}; expected 0 to {limit - 1} "
                f"({limit_name} is {limit}); correct the ids or increase {limit_name}"
            )

    if ids.size == 0:
        return
    if not isinstance(ids, jax.core.Tracer):
        values = np.asarray(jax.device_get(ids))
        check(values.min(), values.max())
    elif traced:
        jax.debug.callback(check, ids.min(), ids.max())


def check_labels(labels: Int[Array | np.ndarray, "*any"], count: int) -> None:
    """Check that all labels are in [0, count) or -100; traced labels are not checked.

    Raises
    ------
    ValueError
        If a label is out of range.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(jax.device_get(labels))
    wrong = values[((values < 0) | (values >= count)) & (values != IGNORE_INDEX)]
    if wrong.size:
        raise ValueError(
            f"labels: got values from {values.min()} to {values.max()}; expected 0 to "
            f"{count - 1}, or {IGNORE_INDEX} to ignore a position; correct the labels"
        )
