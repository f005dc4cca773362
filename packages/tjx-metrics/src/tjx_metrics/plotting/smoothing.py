"""Smoothing of curves without a lag."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def moving_average(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Average each value with its neighbours on both sides.

    A trailing average would lag behind the evaluation it is drawn with. Near the start the window
    narrows on both sides, so that a steep start is not drawn too low; near the end it loses only
    what is not there, so that the last value is no single noisy one. Values that are not finite are
    left out.

    Parameters
    ----------
    values : float array [n]
        The values.
    window : int
        Number of values in a full window.

    Returns
    -------
    float64 array [n]
        The averages; NaN where a window holds nothing finite.

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
