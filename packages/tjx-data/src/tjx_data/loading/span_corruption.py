"""Span corruption: what an encoder-decoder learns from plain text.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (T5), section 3.1.4. Of ``the cat sat on the mat today`` with the spans ``cat sat`` and
``mat`` the source is ``the <0> on the <1> today`` and the target ``<0> cat sat <1> mat <end>``.

Names of array axes: R rows, L tokens of text, S tokens of the source, T of the target, N tokens in
spans, K spans.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.stateless_rng import Words, derive_key, draw
from tjx_data.loading.token_loader import TokenLoader

_PURPOSE = int.from_bytes(b"spans")

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class SpanLoader(Loader):
    """Rows of text without some spans, and the spans that belong there.

    A text of L tokens loses about L * rate of them, in spans of `mean_length` on average: how many
    tokens and how many spans depends on L alone, so that all rows have one shape; where the spans
    lie depends on seed and turn, and is another each time that a text comes by.

    Ids: text keeps its own, 0 to vocab_size - 1. After them come the sentinels, one for each span
    of a row, then the start, the end and the padding.

    Parameters
    ----------
    loader : TokenLoader or MixtureLoader
        The text, in windows. Its batch size and processes are also those of the pairs.
    vocab_size : int
        Tokens of text are 0 to vocab_size - 1.
    rate : float
        Share of the tokens that is in spans.
    mean_length : float
        Tokens of a span, on average.
    seed : int, optional
        Decides where the spans lie; the loader's where it is not given. A mixture has none.

    Attributes
    ----------
    source_len, target_len : int
        S and T: the shapes of all rows.
    n_sentinels : int
        Spans of a full row; their ids are vocab_size, vocab_size + 1, ...
    start_id, end_id, pad_id : int
        Before and after the target, and where a row that is not full holds nothing.

    Raises
    ------
    ValueError
        With a line for each argument that is wrong.
    """

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
        super().__init__(
            batch_size=loader.batch_size,
            seed=loader.seed if seed is None else seed,
            process_index=loader.process_index,
            process_count=loader.process_count,
            problems=_problems(first_row, vocab_size, rate, mean_length),
        )
        self.loader, self.vocab_size = loader, vocab_size
        self.rate, self.mean_length = rate, mean_length
        self._key = derive_key(self.seed, _PURPOSE)
        self.seq_len = first_row["tokens"].shape[1]
        n_noise, self.n_sentinels = self._sizes(self.seq_len)
        self.source_len = self.seq_len - n_noise + self.n_sentinels
        self.target_len = n_noise + self.n_sentinels + 1
        self.start_id = vocab_size + self.n_sentinels
        self.end_id, self.pad_id = self.start_id + 1, self.start_id + 2

    @property
    def n_ids(self) -> int:
        """Rows that a table of embeddings needs: all ids are 0 to n_ids - 1."""
        return self.pad_id + 1

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the text, and which spans it loses."""
        return {
            **self.loader.identity,
            "span_seed": str(self.seed),
            "first_sentinel": str(self.vocab_size),
            "span_rate": str(self.rate),
            "span_mean_length": str(self.mean_length),
        }

    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns.

        Returns
        -------
        dict
            ``source`` int32 [R, S], text with a sentinel for each span, then padding;
            ``source_mask`` bool [R, S], False where that is; ``tokens`` int32 [R, T], the start and
            each sentinel with its span; ``labels`` int32 [R, T], the token after each, the end at
            last, then -100. Rows of training hold no padding.
        """
        return self._pairs(self.loader.rows(turns), turns)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the split once, with the same spans every time.

        Parameters
        ----------
        limit : int, optional
            Stop after so many tokens of text (over all processes).
        """
        for number, batch in enumerate(self.loader.evaluation_batches(limit)):
            yield self._pairs(batch, number * self.batch_size + self._rows)

    def _sizes(self, length: int) -> tuple[int, int]:
        """Return tokens in spans, and spans, of a text; both grow with it, or stay."""
        n_noise = min(max(round(length * self.rate), 1), length - 1)
        # Text stands between any two spans.
        n_spans = min(max(round(n_noise / self.mean_length), 1), n_noise, length - n_noise + 1)
        return n_noise, n_spans

    def _pairs(self, text: Batch, turns: RowIndices) -> Batch:
        n_rows = len(turns)
        source_RS = np.full((n_rows, self.source_len), self.pad_id, np.int32)
        tokens_RT = np.full((n_rows, self.target_len), self.pad_id, np.int32)
        labels_RT = np.full_like(tokens_RT, IGNORED_LABEL)
        lengths = (text["labels"] != IGNORED_LABEL).sum(1)
        for length in np.unique(lengths):
            if length < 2:  # the end of the text: too little for a span and what is around it
                continue
            same = lengths == length
            source, target = self._corrupt(text["tokens"][same, :length], turns[same])
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

    def _corrupt(self, tokens_RL: Tokens, turns: RowIndices) -> tuple[Tokens, Tokens]:
        """Return source and target (without a start) of texts of one length."""
        n_rows, length = tokens_RL.shape
        n_noise, n_spans = self._sizes(length)
        is_noise_RL, is_first_RL = _place_spans(draw(self._key, turns, length), n_noise, n_spans)
        sentinels_RK = self.vocab_size + np.tile(np.arange(n_spans, dtype=np.int32), (n_rows, 1))

        source_RL = tokens_RL.copy()
        source_RL[is_first_RL] = sentinels_RK.ravel()
        source_RS = source_RL[~is_noise_RL | is_first_RL].reshape(n_rows, -1)

        # In the target a sentinel stands before each span.
        first_RN = is_first_RL[is_noise_RL].reshape(n_rows, n_noise)
        places_RN = np.arange(n_noise) + np.cumsum(first_RN, 1)
        target_RT = np.full((n_rows, n_noise + n_spans + 1), self.end_id, np.int32)
        np.put_along_axis(target_RT, places_RN, tokens_RL[is_noise_RL].reshape(n_rows, -1), 1)
        places_RK = places_RN[first_RN].reshape(n_rows, n_spans) - 1
        np.put_along_axis(target_RT, places_RK, sentinels_RK, 1)
        return source_RS, target_RT


def _place_spans(words_RL: Words, n_noise: int, n_spans: int) -> tuple[Flags, Flags]:
    """Tell which tokens are in spans, and which are the first of one; all ways equally likely."""
    noise_RK = _random_lengths(words_RL[:, : n_noise - 1], n_spans)
    # The text before the first span and after the last may be none: hence one more, taken off.
    text_RK = _random_lengths(words_RL[:, n_noise - 1 :], n_spans + 1)[:, :-1]
    ends_RK = np.cumsum(text_RK + noise_RK, 1) - 1
    edges_RL = np.zeros((len(words_RL), words_RL.shape[1] + 1), np.int8)
    np.put_along_axis(edges_RL, ends_RK - noise_RK, 1, 1)
    is_first_RL = edges_RL[:, :-1] == 1
    np.put_along_axis(edges_RL, ends_RK, -1, 1)
    return np.cumsum(edges_RL[:, :-1], 1, dtype=np.int8) == 1, is_first_RL


def _random_lengths(words_RN: Words, n_parts: int) -> npt.NDArray[np.int64]:
    """Cut N + 1 things into parts of one at least, every way equally likely; [R, n_parts]."""
    n_rows, n_gaps = words_RN.shape
    # The gaps with the smallest words are the cuts.
    cuts = np.sort(np.argsort(words_RN, axis=1, kind="stable")[:, : n_parts - 1], axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=0)
    edges[:, -1] = n_gaps + 1
    assert edges.shape == (n_rows, n_parts + 1)
    return np.diff(edges, axis=1)


def _problems(first_row: Batch, vocab_size: int, rate: float, mean_length: float) -> list[str]:
    problems = []
    if vocab_size < 1:
        problems.append(f"vocab_size={vocab_size}: give the number of tokens that text has")
    if not 0 < rate < 1:
        problems.append(f"rate={rate}: give a share between 0 and 1")
    if not mean_length >= 1:
        problems.append(f"mean_length={mean_length}: a span has at least 1 token")
    if (seq_len := first_row["tokens"].shape[1]) < 2:
        problems.append(f"seq_len={seq_len}: a span and the text around it need 2 tokens")
    if "segment_ids" in first_row:
        problems.append(
            "packing='documents': spans are taken from a stretch of text; choose windows"
        )
    return problems
