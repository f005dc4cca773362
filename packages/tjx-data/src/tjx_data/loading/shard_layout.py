"""Layout of a token stream in files: order, sizes and dtype of the shards."""

from typing import Any, NamedTuple

import numpy as np

from tjx_data.corpora.documents import SplitName
from tjx_data.prepared.index import HEADER_BYTES, FileEntry, Index
from tjx_data.prepared.integrity import PREPARE_AGAIN


class ShardLayout(NamedTuple):
    """Files of a token stream, and the position of the tokens in them.

    Attributes
    ----------
    files : tuple[FileEntry, ...]
        The shards in order.
    n_tokens : int
        Length of the stream.
    shard_tokens : int
        Tokens in every shard but the last.
    dtype : numpy.dtype
        Unsigned dtype of a stored token.
    header_bytes : int
        Bytes before the first token of a shard.
    vocab_size : int
        Ids are below it.
    fix : str
        What the user can do about a damaged shard, for error messages.
    """

    files: tuple[FileEntry, ...]
    n_tokens: int
    shard_tokens: int
    dtype: np.dtype[Any]
    header_bytes: int
    vocab_size: int
    fix: str = PREPARE_AGAIN


def prepared_layout(index: Index, split: SplitName) -> ShardLayout:
    """Return the layout of one split of a prepared set."""
    return ShardLayout(
        files=index.splits[split].shards,
        n_tokens=index.splits[split].n_tokens,
        shard_tokens=index.shard_tokens,
        dtype=np.dtype(index.dtype).newbyteorder("<"),
        header_bytes=HEADER_BYTES,
        vocab_size=index.vocab_size,
    )
