"""Loader of packed conversations, with labels on the assistant's tokens only.

Names of array axes: R rows, T tokens per row.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from tjx_data.conversations.config import ChatConfig, Truncation
from tjx_data.conversations.encoding import EncodedConversation, encode_conversation
from tjx_data.conversations.reader import report_malformed
from tjx_data.conversations.records import Conversation
from tjx_data.conversations.template import ChatTemplate
from tjx_data.corpora.documents import Malformed, SplitName
from tjx_data.loading.base import IGNORED_LABEL, Batch, Batching, Loader, RowIndices
from tjx_data.loading.samplers import EpochSampler, derive_key, permute_indices
from tjx_data.prepared.packing import Packing, pack, packed_rows
from tjx_data.tokenization.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_PACKING = int.from_bytes(b"packing")


class EncodedConversations(NamedTuple):
    """Encoded conversations, concatenated.

    Attributes
    ----------
    tokens : int32 [N]
        Token ids of all conversations.
    is_answer : bool [N]
        Whether the assistant generates the token.
    starts : int64 [conversations + 1]
        Conversation c has the tokens starts[c] to starts[c + 1] - 1.
    """

    tokens: npt.NDArray[np.int32]
    is_answer: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, encoded: Sequence[EncodedConversation]) -> "EncodedConversations":
        """Concatenate conversations.

        Parameters
        ----------
        encoded : sequence of EncodedConversation
            The conversations.

        Returns
        -------
        EncodedConversations
            Their tokens and masks in one array each.
        """
        lengths = [len(each.tokens) for each in encoded]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(each.tokens for each in encoded)]),
            np.concatenate([np.zeros(0, np.bool_), *(each.is_answer for each in encoded)]),
            np.cumsum([0, *lengths], dtype=np.int64),
        )

    @property
    def n_conversations(self) -> int:
        """Number of conversations."""
        return len(self.starts) - 1

    @property
    def sha256(self) -> str:
        """SHA-256 of the arrays."""
        return hashlib.sha256(b"".join(array.tobytes() for array in self)).hexdigest()


def encode_conversations(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    config: ChatConfig,
    *,
    seq_len: int,
) -> tuple[list[EncodedConversation], list[Malformed]]:
    """Encode conversations and truncate them to rows.

    Parameters
    ----------
    conversations : sequence of Conversation
        From `read_conversations`.
    template, tokenizer
        As of `encode_conversation`.
    config : ChatConfig
        `turns`, `truncation` and `skip_malformed` are used.
    seq_len : int
        Tokens of a row. A conversation has one more, since its last token is only a label.

    Returns
    -------
    list of EncodedConversation, and list of Malformed
        The second lists omitted conversations: rejected by the template, with `skip_malformed`,
        dropped by truncation, or without an answer after it.

    Raises
    ------
    ValueError
        If the template rejects a conversation and `skip_malformed` is false, conversations are too
        long and `truncation` is "error", or none is left.
    """
    encoded: list[EncodedConversation] = []
    rejected: list[Malformed] = []
    dropped: list[Malformed] = []
    too_long: list[str] = []
    for conversation in conversations:
        file, _, line = conversation.location.rpartition(":")
        where = file, int(line or 0)
        try:
            found = encode_conversation(template, tokenizer, conversation, turns=config.turns)
        except ValueError as error:
            rejected.append(Malformed(*where, str(error)))
            continue
        if len(found.tokens) > seq_len + 1:
            too_long.append(f"{conversation.location} ({len(found.tokens)} tokens)")
            shortened = truncate(found, seq_len + 1, config.truncation)
            if shortened is None:
                dropped.append(Malformed(*where, f"has {len(found.tokens)} tokens"))
                continue
            found = shortened
        encoded.append(found)
    report_malformed(rejected, len(encoded), skip=config.skip_malformed)
    if too_long:
        _check_truncation(too_long, len(conversations), seq_len, config.truncation)
        _log.warning(
            "%d of %d conversations have more than %d tokens: %d dropped, the others truncated",
            len(too_long), len(conversations), seq_len + 1, len(dropped),
        )  # fmt: skip
    if not encoded:
        raise ValueError(f"data.seq_len: got {seq_len}; no conversation is left; give a longer one")
    return encoded, rejected + dropped


def _check_truncation(
    too_long: Sequence[str], n_all: int, seq_len: int, truncation: Truncation
) -> None:
    if truncation == "error":
        raise ValueError(
            f"data.seq_len: got {seq_len}; {len(too_long):,} of {n_all:,} conversations are "
            f"longer, such as {', '.join(too_long[:3])}; give a longer seq_len, or truncation "
            "drop, right or left (chat.truncation)"
        )


def truncate(
    encoded: EncodedConversation, length: int, truncation: Truncation
) -> EncodedConversation | None:
    """Truncate a conversation; None if it is dropped, or no label remains.

    Parameters
    ----------
    encoded : EncodedConversation
        The conversation.
    length : int
        Tokens to keep.
    truncation : str
        As of `ChatConfig`.
    """
    if truncation not in ("left", "right"):
        return None
    cut = slice(-length, None) if truncation == "left" else slice(length)
    found = EncodedConversation(encoded.tokens[cut], encoded.is_answer[cut])
    return found if found.is_answer[1:].any() else None


def split_conversations(
    encoded: Sequence[EncodedConversation], holdout_fraction: float
) -> dict[SplitName, list[EncodedConversation]]:
    """Divide conversations into splits by the hash of their tokens.

    Those with the smallest hashes are held out, at least one, so that equal conversations are in
    one split and the result does not depend on their order.

    Parameters
    ----------
    encoded : sequence of EncodedConversation
        The conversations.
    holdout_fraction : float
        Share that is held out.

    Returns
    -------
    dict
        Lists of conversations by split, "train" and "validation".

    Raises
    ------
    ValueError
        If all conversations are equal, so that one split would be empty.
    """
    hashes = [hashlib.sha256(each.tokens.tobytes()).digest() for each in encoded]
    n_held_out = max(1, round(len(hashes) * holdout_fraction))
    last = sorted(hashes)[min(n_held_out, len(hashes)) - 1]
    splits: dict[SplitName, list[EncodedConversation]] = {"train": [], "validation": []}
    for each, key in zip(encoded, hashes, strict=True):
        splits["validation" if key <= last else "train"].append(each)
    if not splits["train"]:
        raise ValueError(
            f"data.path: got {len(set(hashes))} different conversations; expected at least 2, one "
            "of which is held out"
        )
    return splits


class ConversationLoader(Loader):
    """Rows of whole conversations, each a segment with its own positions.

    Labels are the next tokens within assistant messages, and -100 elsewhere. Conversations are
    packed by best-fit decreasing (`tjx_data.prepared.packing`). Each epoch exchanges conversations
    of equal length, and visits the rows in its own order, both functions of (seed, epoch).
    ``batch(step)`` depends on the arguments only. All conversations are held in memory: 5 bytes per
    token.

    Parameters
    ----------
    conversations : EncodedConversations
        The conversations of the split, of at most ``seq_len + 1`` tokens each.
    seq_len : int
        Tokens per row.
    **batching
        batch_size, seed, process_index and process_count, as of `Loader`.

    Raises
    ------
    ValueError
        If an argument is invalid, or a conversation is too long.

    Examples
    --------
    >>> one = EncodedConversation(np.arange(5, dtype=np.int32), np.arange(5) > 2)
    >>> loader = ConversationLoader(EncodedConversations.of([one]), seq_len=6, batch_size=1)
    >>> loader.batch(0)["labels"].tolist()
    [[-100, -100, 3, 4, -100, -100]]
    """

    def __init__(
        self,
        conversations: EncodedConversations,
        *,
        seq_len: int,
        **batching: Unpack[Batching],
    ) -> None:
        lengths = np.diff(conversations.starts) - 1  # the last token is only a label
        problems = []
        if not len(lengths):
            problems.append("conversations: got none; expected at least one")
        elif lengths.max() > seq_len or lengths.min() < 1:
            problems.append(
                f"seq_len: got {seq_len} with conversations of {lengths.min() + 1} to "
                f"{lengths.max() + 1} tokens; expected 2 to seq_len + 1; truncate them"
            )
        super().__init__(problems=problems, **batching)
        self.conversations, self.seq_len = conversations, seq_len
        self._lengths = lengths
        self._pack_epoch = lru_cache(maxsize=2)(self._pack)
        self.rows_per_epoch = self._pack_epoch(0).n_rows
        self._sampler = EpochSampler(self.rows_per_epoch, self.seed)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all conversations."""
        return len(self.conversations.tokens)

    @property
    def n_labels(self) -> int:
        """Number of tokens that are trained on in an epoch."""
        first = self.conversations.starts[:-1]
        return int(self.conversations.is_answer.sum() - self.conversations.is_answer[first].sum())

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the content of a row, by name."""
        return {
            "conversations": self.conversations.sha256,
            "seq_len": str(self.seq_len),
            "seed": str(self.seed),
        }

    def _pack(self, epoch: int) -> Packing:
        """Pack the conversations of an epoch.

        The number of rows is the same in each epoch, as it depends on the lengths only.
        """
        numbers = np.arange(len(self._lengths), dtype=np.uint64)
        key = derive_key(self.seed, epoch, _PACKING)
        order = permute_indices(numbers, len(numbers), key).astype(np.int64)
        return pack(self.conversations.starts[:-1][order], self._lengths[order], self.seq_len)

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return packed rows by index.

        Returns
        -------
        dict
            ``tokens``, ``labels``, ``segment_ids`` (from 1) and ``positions``, int32 [R, seq_len];
            padding has token 0, label -100 and segment 0.
        """
        numbers = self._sampler.offsets(row_indices).tolist()
        epochs = (row_indices // self.rows_per_epoch).tolist()
        places = [(self._pack_epoch(epoch), n) for epoch, n in zip(epochs, numbers, strict=True)]
        return packed_rows(places, self.seq_len, self._chunk)

    def _chunk(
        self, start: int, length: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the tokens and labels of a packed conversation."""
        stream = self.conversations.tokens[start : start + length + 1]
        is_answer = self.conversations.is_answer[start + 1 : start + length + 1]
        return stream[:-1], np.where(is_answer, stream[1:], IGNORED_LABEL)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield each conversation once, as `rows`; `limit` is the most tokens of rows."""
        n_rows = self.rows_per_epoch
        if limit is not None:
            n_rows = min(n_rows, -(-limit // self.seq_len))
        # Packing sorts rows by length: a limit reads a sample of all.
        order = EpochSampler(self.rows_per_epoch, 0).offsets(np.arange(self.rows_per_epoch))
        packing = self._pack_epoch(0)
        for first in range(0, n_rows, self.batch_size):
            numbers = (first + self._local_rows).tolist()
            places = [(packing, int(order[n])) if n < n_rows else None for n in numbers]
            yield packed_rows(places, self.seq_len, self._chunk)
