"""Token ids in arrays and memmaps, and the source of tokens that a user names."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError
from tjx_data.errors import DataError
from tjx_data.loading.shard_reader import Tokens
from tjx_data.loading.token_files import FileTokens, IdDtype
from tjx_data.loading.token_source import TokenSource

_BLOCK_TOKENS = 1 << 22


def open_tokens(
    tokens: npt.ArrayLike | str | Path, *, vocab_size: int, id_dtype: IdDtype = "auto"
) -> TokenSource:
    """Open token ids as a source of `TokenLoader`, which documents the arguments.

    Raises
    ------
    ValueError
        If an argument is invalid, or the file is damaged or of another format.
    """
    problems = []
    if not 1 <= vocab_size <= 1 << 31:
        problems.append(f"vocab_size: got {vocab_size}; expected 1 to 2**31")
    if id_dtype not in get_args(IdDtype):
        choices = ", ".join(get_args(IdDtype))
        problems.append(f"id_dtype: got {id_dtype!r}; expected one of {choices}")
    if problems:
        raise ConfigError(problems)
    if isinstance(tokens, str | Path):
        return FileTokens(Path(tokens), vocab_size=vocab_size, id_dtype=id_dtype)
    return ArrayTokens(np.asanyarray(tokens), vocab_size=vocab_size)


class ArrayTokens(TokenSource):
    """Token ids in an array or a memmap.

    Parameters
    ----------
    tokens : array of int [n_tokens]
        The ids; not copied.
    vocab_size : int
        Ids are below it.

    Raises
    ------
    ValueError
        If the array is empty, not a vector, or not of integers.
    """

    name = "the token array"

    def __init__(self, tokens: npt.NDArray[Any], *, vocab_size: int) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise ValueError(
                f"tokens: got an array of {tokens.dtype} with shape {tokens.shape}; expected a "
                "vector of integers that is not empty"
            )
        self.n_tokens, self._vocab_size = len(tokens), vocab_size
        # Negative ids become large ones, which the check of the vocabulary finds.
        self._tokens: Tokens = tokens.view(tokens.dtype.str.replace("i", "u"))
        self.reader = self

    def windows(self, starts: npt.NDArray[np.int64], width: int) -> Tokens:
        """Return `width` tokens from each start position, [R, width]."""
        return self._checked(self._tokens[starts[:, None] + np.arange(width)])

    def read(self, start: int, length: int) -> Tokens:
        """Return tokens ``start`` to ``start + length - 1``."""
        return self._checked(self._tokens[start : start + length])

    def check_unchanged(self) -> None:
        """Do nothing: the caller owns the array."""

    def verify(self) -> None:
        """Check that all ids are in the vocabulary."""
        for start in range(0, self.n_tokens, _BLOCK_TOKENS):
            self.read(start, _BLOCK_TOKENS)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """SHA-256 of the ids and their dtype, computed on first access."""
        hasher = hashlib.sha256(self._tokens.dtype.str.encode())
        for start in range(0, self.n_tokens, _BLOCK_TOKENS):
            hasher.update(self.read(start, _BLOCK_TOKENS).tobytes())
        return {"tokens": hasher.hexdigest(), "vocab_size": str(self._vocab_size)}

    def _checked(self, ids: Tokens) -> Tokens:
        if ids.size and (largest := int(ids.max())) >= self._vocab_size:
            raise DataError(
                f"tokens: got id {largest} (a negative id counts as a large one); expected ids "
                f"below vocab_size={self._vocab_size}"
            )
        return ids
