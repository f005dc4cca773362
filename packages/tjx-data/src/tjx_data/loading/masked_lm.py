"""Masked language modelling: which tokens BERT hides, and what it is to say in their place.

Names of array axes: R rows, T tokens in a row.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.stateless_rng import derive_key, draw, fractions
from tjx_data.loading.token_loader import TokenLoader

# Of the tokens that are chosen, so many become the mask, and so many a random token.
HIDDEN, REPLACED = 0.8, 0.1
_PURPOSE = int.from_bytes(b"masking")


class MaskedLoader(Loader):
    """Rows of text in which some tokens are hidden, and are to be predicted.

    Of the chosen tokens 80 % become the mask, 10 % a random token, and 10 % stay what they are, so
    that a model has to look at every token. Devlin et al. 2018, "BERT", section 3.1. What is chosen
    depends on seed and turn alone: a text that comes by again is masked anew.

    Parameters
    ----------
    loader : TokenLoader or MixtureLoader
        The text. Its batch size and processes are also those of the masked rows.
    mask_id : int
        The token that hides others.
    vocab_size : int
        Tokens are 0 to vocab_size - 1, the mask and the special ones among them.
    special_ids : sequence of int
        Tokens that are never chosen nor drawn: end of text, start, separator.
    rate : float
        Probability that a token is chosen.
    whole_words : bool [vocab_size], optional
        Whether a token starts a word (`Tokenizer.starts_word`, and an entry for the mask where the
        tokenizer has none). The tokens of a word are then chosen together or not at all, still each
        with the probability `rate`; what becomes of each is drawn by itself.
    seed : int, optional
        Decides what is hidden; the loader's where it is not given. A mixture has none.

    Raises
    ------
    ValueError
        With a line for each argument that is wrong.
    """

    def __init__(
        self,
        loader: TokenLoader | MixtureLoader,
        *,
        mask_id: int,
        vocab_size: int,
        special_ids: Sequence[int] = (),
        rate: float = 0.15,
        whole_words: npt.NDArray[np.bool_] | None = None,
        seed: int | None = None,
    ) -> None:
        never = np.unique([*special_ids, mask_id])
        super().__init__(
            batch_size=loader.batch_size,
            seed=loader.seed if seed is None else seed,
            process_index=loader.process_index,
            process_count=loader.process_count,
            problems=_problems(never, vocab_size, rate, whole_words),
        )
        self.loader, self.mask_id, self.rate = loader, mask_id, rate
        self._starts_word = whole_words
        self._key = derive_key(self.seed, _PURPOSE)
        self._is_special = np.zeros(vocab_size, bool)
        self._is_special[never] = True
        self._ordinary = np.flatnonzero(~self._is_special)

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the text, and what is hidden of it."""
        starts = self._starts_word
        return {
            **self.loader.identity,
            "mask_seed": str(self.seed),
            "mask_id": str(self.mask_id),
            "mask_rate": str(self.rate),
            "mask_vocab_size": str(len(self._is_special)),
            "never_masked": " ".join(map(str, np.flatnonzero(self._is_special))),
            "whole_words": "no" if starts is None else hashlib.sha256(starts.tobytes()).hexdigest(),
        }

    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns.

        Returns
        -------
        dict
            ``tokens`` int32 [R, T], some of them hidden; ``labels`` int32 [R, T], the token where
            it was chosen and -100 elsewhere; all else as the text's loader gives it. Padding is
            never chosen.
        """
        return self._masked(self.loader.rows(turns), turns)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the split once, the same tokens hidden every time.

        Parameters
        ----------
        limit : int, optional
            Stop after so many tokens of text, chosen or not (over all processes).
        """
        for number, batch in enumerate(self.loader.evaluation_batches(limit)):
            yield self._masked(batch, number * self.batch_size + self._rows)

    def _masked(self, rows: Batch, turns: RowIndices) -> Batch:
        tokens_RT = rows["tokens"]
        n_rows, seq_len = tokens_RT.shape
        words_R3T = draw(self._key, turns, 3 * seq_len).reshape(n_rows, 3, seq_len)
        which_RT, how_RT = fractions(words_R3T[:, 0]), fractions(words_R3T[:, 1])
        special_RT = self._is_special[tokens_RT]
        if self._starts_word is not None:
            first_RT = _word_starts(rows, special_RT, self._starts_word)
            which_RT = np.take_along_axis(which_RT, first_RT, 1)
        is_text_RT = rows["labels"] != IGNORED_LABEL  # what has no next token is padding
        chosen_RT = (which_RT < self.rate) & ~special_RT & is_text_RT
        other_RT = self._ordinary[words_R3T[:, 2] % np.uint64(len(self._ordinary))]
        hidden_RT = np.where(how_RT < HIDDEN, self.mask_id, other_RT)
        changed_RT = chosen_RT & (how_RT < HIDDEN + REPLACED)
        return {
            **rows,
            "tokens": np.where(changed_RT, hidden_RT, tokens_RT).astype(np.int32),
            "labels": np.where(chosen_RT, tokens_RT, IGNORED_LABEL).astype(np.int32),
        }


def _word_starts(
    rows: Batch, special_RT: npt.NDArray[np.bool_], starts_word: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return the column in which the word of each token starts.

    A word ends at a special token, and where another document begins. What goes on with nothing
    after a special token shares that one's column, which is never chosen itself.
    """
    starts_RT = starts_word[rows["tokens"]] | special_RT
    starts_RT[:, 0] = True
    if "segment_ids" in rows:
        starts_RT[:, 1:] |= rows["segment_ids"][:, 1:] != rows["segment_ids"][:, :-1]
    return np.maximum.accumulate(np.where(starts_RT, np.arange(starts_RT.shape[1]), 0), axis=1)


def _problems(
    never: npt.NDArray[np.int64],
    vocab_size: int,
    rate: float,
    whole_words: npt.NDArray[np.bool_] | None,
) -> list[str]:
    problems = []
    if never.min() < 0 or never.max() >= vocab_size:
        problems.append(
            f"mask_id and special_ids are from {never.min()} to {never.max()} and "
            f"vocab_size={vocab_size}: give ids from 0 to {vocab_size - 1}"
        )
    elif len(never) >= vocab_size:
        problems.append(f"vocab_size={vocab_size}: mask and special tokens leave no other")
    if not 0 < rate <= 1:
        problems.append(f"rate={rate}: give a probability above 0, at most 1")
    if whole_words is not None and (
        whole_words.shape != (vocab_size,) or whole_words.dtype != np.bool_
    ):
        problems.append(
            f"whole_words is {whole_words.dtype} {list(whole_words.shape)}: give a bool for each "
            f"token, [{vocab_size}]"
        )
    return problems
