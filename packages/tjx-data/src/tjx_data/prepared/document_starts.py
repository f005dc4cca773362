"""Where the documents of a split start in its stream of tokens."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.errors import DataError
from tjx_data.prepared.index import Index, check_size


def read_starts(directory: Path, index: Index, split: SplitName) -> npt.NDArray[np.int64]:
    """Return the position of each document's first token, int64 [documents].

    Raises
    ------
    DataError
        If the file has another size than the index says, or positions are not in order and within
        the stream.
    """
    entry, n_tokens = index.splits[split].starts, index.splits[split].n_tokens
    check_size(directory, entry)
    starts = np.fromfile(directory / entry.name, "<u8")
    n_eot = 0 if index.eot_id is None else 1  # one stands before the first, and after each
    in_order = not starts.size or (
        starts[0] == n_eot
        and starts.max() <= n_tokens
        and (np.diff(starts.astype(np.int64), append=n_tokens) >= n_eot).all()
    )
    if not in_order:
        raise DataError(
            f"{directory / entry.name}: documents do not start one after the other within the "
            f"{n_tokens} tokens of the split; it is damaged; prepare the data again"
        )
    return starts.astype(np.int64)
