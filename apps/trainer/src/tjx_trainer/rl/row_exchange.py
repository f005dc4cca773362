"""Values of rows that verifiers and environments compute, each in one process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import tjx_parallel


def own_rows(count: int) -> range:
    """Return the rows of `count` whose verifiers and environments run in this process."""
    rows = np.array_split(np.arange(count), jax.process_count())[jax.process_index()]
    return range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)


def compute_rows(count: int, compute: Callable[[range], list[Any]]) -> list[Any]:
    """Compute a value of each row in the process that owns it; return those of all rows.

    Verifiers have time limits: two processes could disagree on the same response.

    Parameters
    ----------
    count : int
        Number of rows, the same in all processes.
    compute : callable
        From rows to their values, as `tjx_parallel.exchange` takes them.
    """
    return [value for part in tjx_parallel.exchange(compute(own_rows(count))) for value in part]
