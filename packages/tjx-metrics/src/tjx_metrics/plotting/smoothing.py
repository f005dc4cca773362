"""Centered moving average of curves."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def moving_average(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Compute a centered moving average.

    A trailing average would lag behind the evaluation curve of the same plot. Near the start, the
    window shrinks symmetrically, so that a steep start is not flattened; near the end it is only
    truncated, so that the last value is still an average. Non-finite values are ignored.

    Parameters
    ----------
    values : float array [n]
        The values.
    window : int
        Number of values in a full window.

    Returns
    -------
    float64 array [n]
        The averages; NaN if a window has no finite value.

    Examples
    --------
    >>> moving_average(np.array([9.0, 3.0, 6.0, 0.0, 0.0]), 3).tolist()
    [9.0, 6.0, 3.0, 2.0, 0.0]
    """
    index = np.arange(len(values))
    before = np.minimum(max(window - 1, 0) // 2, index)
    after = np.minimum(before, len(values) - 1 - index)
    finite = np.isfinite(values)

    def windowed_sum(terms: NDArray[Any]) -> NDArray[Any]:
        total = np.concatenate([[0.0], np.cumsum(terms, dtype=np.float64)])
        return np.asarray(total[index + after + 1] - total[index - before])

    count = windowed_sum(finite)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(windowed_sum(np.where(finite, values, 0.0)) / count)
