"""Span corruption: the denoising objective of encoder-decoders (T5).

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", section 3.1.4. For the text ``the cat sat on the mat today`` with the spans ``cat
sat`` and ``mat`` the source is ``the <0> on the <1> today`` and the target is ``<0> cat sat <1> mat
<end>``.

Names of array axes: R rows, L tokens of text, S tokens of the source, T of the target, N tokens in
spans, K spans.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, RowIndices
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.samplers import Words, derive_key, random_words
from tjx_data.loading.token_loader import TokenLoader
from tjx_data.transforms.transformed_loader import TransformedLoader

_PURPOSE = int.from_bytes(b"spans")

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class SpanLoader(TransformedLoader):
    """Source and target pairs for span corruption.

    About ``L * rate`` of the L tokens of a text are replaced by sentinels, in spans of
    `mean_length` tokens on average. The number of tokens and spans depends on L only, so that all
    rows have one shape; the positions of the spans depend on seed and row index, so that each
    epoch corrupts other spans of the same text.

    Text keeps its ids, 0 to vocab_size - 1. They are followed by the sentinels, one for each span
    of a row, and the start, end and padding ids.

    Parameters
    ----------
    loader : TokenLoader or MixtureLoader
        Source of the text, with packing "windows". Its batch size and processes apply to the pairs.
    vocab_size : int
        Number of ids of text.
    rate : float
        Share of the tokens that is in spans.
    mean_length : float
        Mean length of a span in tokens.
    seed : int, optional
        Seed of the span positions; by default the seed of `loader`. A mixture has none.

    Attributes
    ----------
    source_len, target_len : int
        S and T, the shapes of all rows.
    n_sentinels : int
        Spans of a full row; their ids are vocab_size, vocab_size + 1, ...
    start_id, end_id, pad_id : int
        First decoder input, last label, and padding.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """

    loader: TokenLoader | MixtureLoader

    def __init__(
        self,
        loader: TokenLoader | MixtureLoader,
        *,
        vocab_size: int,
        rate: float = 0.15,
        mean_length: float = 3.0,
        seed: int | None = None,
    ) -> None:
        first_row = loader.rows(np.zeros(1, np.int64))
        problems = _validate(first_row, vocab_size, rate, mean_length)
        super().__init__(loader, seed=seed, problems=problems)
        self.vocab_size, self.rate, self.mean_length = vocab_size, rate, mean_length
        self._key = derive_key(self.seed, _PURPOSE)
        self.seq_len = first_row["tokens"].shape[1]
        n_noise, self.n_sentinels = self._span_counts(self.seq_len)
        self.source_len = self.seq_len - n_noise + self.n_sentinels
        self.target_len = n_noise + self.n_sentinels + 1
        self.start_id = vocab_size + self.n_sentinels
        self.end_id, self.pad_id = self.start_id + 1, self.start_id + 2

    @property
    def n_ids(self) -> int:
        """Number of ids, the rows of an embedding table for source and target."""
        return self.pad_id + 1

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the text and its spans, by name."""
        return {
            **self.loader.identity,
            "span_seed": str(self.seed),
            "first_sentinel": str(self.vocab_size),
            "span_rate": str(self.rate),
            "span_mean_length": str(self.mean_length),
        }

    def _span_counts(self, length: int) -> tuple[int, int]:
        """Return the number of tokens in spans and of spans; both are monotone in the length."""
        n_noise = min(max(round(length * self.rate), 1), length - 1)
        # At least one token of text separates two spans.
        n_spans = min(max(round(n_noise / self.mean_length), 1), n_noise, length - n_noise + 1)
        return n_noise, n_spans

    def transform(self, batch: Batch, row_indices: RowIndices) -> Batch:
        """Make source and target pairs of text rows.

        Returns
        -------
        dict
            ``source`` int32 [R, S], text with a sentinel for each span, then padding;
            ``source_mask`` bool [R, S], False at padding; ``tokens`` int32 [R, T], the start id and
            each sentinel followed by its span; ``labels`` int32 [R, T], the token after each, the
            end id, then -100. Training rows have no padding.
        """
        n_rows = len(row_indices)
        source_RS = np.full((n_rows, self.source_len), self.pad_id, np.int32)
        tokens_RT = np.full((n_rows, self.target_len), self.pad_id, np.int32)
        labels_RT = np.full_like(tokens_RT, IGNORED_LABEL)
        lengths = (batch["labels"] != IGNORED_LABEL).sum(1)
        for length in np.unique(lengths):
            if length < 2:  # too short for a span and text around it
                continue
            same = lengths == length
            source, target = self._corrupt(batch["tokens"][same, :length], row_indices[same])
            source_RS[same, : source.shape[1]] = source
            tokens_RT[same, 0] = self.start_id
            tokens_RT[same, 1 : target.shape[1]] = target[:, :-1]
            labels_RT[same, : target.shape[1]] = target
        return {
            "source": source_RS,
            "source_mask": source_RS != self.pad_id,
            "tokens": tokens_RT,
            "labels": labels_RT,
        }

    def _corrupt(self, tokens_RL: Tokens, row_indices: RowIndices) -> tuple[Tokens, Tokens]:
        """Return source [R, S] and target [R, T], without start id, of texts of one length."""
        n_rows, length = tokens_RL.shape
        n_noise, n_spans = self._span_counts(length)
        words_RL = random_words(self._key, row_indices, length)
        is_noise_RL, is_first_RL = _random_spans(words_RL, n_noise, n_spans)
        sentinels_RK = self.vocab_size + np.tile(np.arange(n_spans, dtype=np.int32), (n_rows, 1))

        source_RL = tokens_RL.copy()
        source_RL[is_first_RL] = sentinels_RK.ravel()
        source_RS = source_RL[~is_noise_RL | is_first_RL].reshape(n_rows, -1)

        # In the target a sentinel precedes each span.
        first_RN = is_first_RL[is_noise_RL].reshape(n_rows, n_noise)
        columns_RN = np.arange(n_noise) + np.cumsum(first_RN, 1)
        target_RT = np.full((n_rows, n_noise + n_spans + 1), self.end_id, np.int32)
        np.put_along_axis(target_RT, columns_RN, tokens_RL[is_noise_RL].reshape(n_rows, -1), 1)
        columns_RK = columns_RN[first_RN].reshape(n_rows, n_spans) - 1
        np.put_along_axis(target_RT, columns_RK, sentinels_RK, 1)
        return source_RS, target_RT


def _random_spans(words_RL: Words, n_noise: int, n_spans: int) -> tuple[Flags, Flags]:
    """Return which tokens are in spans and which start one, bool [R, L], uniform over all ways."""
    noise_RK = _random_lengths(words_RL[:, : n_noise - 1], n_spans)
    # Text before the first and after the last span may be empty: draw one more token, take it off.
    text_RK = _random_lengths(words_RL[:, n_noise - 1 :], n_spans + 1)[:, :-1]
    ends_RK = np.cumsum(text_RK + noise_RK, 1) - 1
    edges_RL = np.zeros((len(words_RL), words_RL.shape[1] + 1), np.int8)
    np.put_along_axis(edges_RL, ends_RK - noise_RK, 1, 1)
    is_first_RL = edges_RL[:, :-1] == 1
    np.put_along_axis(edges_RL, ends_RK, -1, 1)
    return np.cumsum(edges_RL[:, :-1], 1, dtype=np.int8) == 1, is_first_RL


def _random_lengths(words_RN: Words, n_parts: int) -> npt.NDArray[np.int64]:
    """Split N + 1 items into `n_parts` non-empty parts, uniform over all ways; [R, n_parts]."""
    n_rows, n_gaps = words_RN.shape
    # The gaps with the smallest words are the cuts.
    cuts = np.sort(np.argsort(words_RN, axis=1, kind="stable")[:, : n_parts - 1], axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=0)
    edges[:, -1] = n_gaps + 1
    assert edges.shape == (n_rows, n_parts + 1)
    return np.diff(edges, axis=1)


def _validate(first_row: Batch, vocab_size: int, rate: float, mean_length: float) -> list[str]:
    problems = []
    if vocab_size < 1:
        problems.append(f"vocab_size: got {vocab_size}; expected the number of ids of text")
    if not 0 < rate < 1:
        problems.append(f"rate: got {rate}; expected a share between 0 and 1")
    if not mean_length >= 1:
        problems.append(f"mean_length: got {mean_length}; expected at least 1 token")
    if (seq_len := first_row["tokens"].shape[1]) < 2:
        problems.append(f"seq_len: got {seq_len}; expected at least 2, a span and text around it")
    if "segment_ids" in first_row:
        problems.append(
            "packing: got 'documents'; span corruption needs consecutive text; choose windows"
        )
    return problems
