"""Masked language modeling: BERT's 80/10/10 token masking.

Names of array axes: R rows, T tokens per row.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, RowIndices
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.samplers import derive_key, random_words, to_unit_interval
from tjx_data.loading.token_loader import TokenLoader
from tjx_data.transforms.transformed_loader import TransformedLoader

MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1
"""Shares of the selected tokens that become the mask token, or a random token."""
_PURPOSE = int.from_bytes(b"masking")


class MaskedLoader(TransformedLoader):
    """Rows of text with masked tokens, whose original ids are the labels.

    Of the selected tokens 80 % become the mask token, 10 % a random token, and 10 % stay unchanged
    (Devlin et al. 2018, "BERT", section 3.1). The selection depends on seed and row index only, so
    that each epoch masks other tokens of the same text.

    Parameters
    ----------
    loader : TokenLoader or MixtureLoader
        Source of the text. Its batch size and processes apply to the masked rows.
    mask_id : int
        Id of the mask token.
    vocab_size : int
        Number of token ids, mask and special tokens included.
    special_ids : sequence of int
        Ids that are neither selected nor drawn as replacement, such as end of text.
    rate : float
        Probability that a token is selected.
    whole_words : bool [vocab_size], optional
        Whether each token starts a word (`Tokenizer.starts_word`, with an entry for the mask if the
        tokenizer has none). All tokens of a word are then selected together, still each with
        probability `rate`; their replacements are drawn independently.
    seed : int, optional
        Seed of the masking; by default the seed of `loader`. A mixture has none.

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
        mask_id: int,
        vocab_size: int,
        special_ids: Sequence[int] = (),
        rate: float = 0.15,
        whole_words: npt.NDArray[np.bool_] | None = None,
        seed: int | None = None,
    ) -> None:
        never = np.unique([*special_ids, mask_id])
        problems = _validate(never, vocab_size, rate, whole_words)
        super().__init__(loader, seed=seed, problems=problems)
        self.mask_id, self.rate = mask_id, rate
        self._starts_word = whole_words
        self._key = derive_key(self.seed, _PURPOSE)
        self._is_special = np.zeros(vocab_size, bool)
        self._is_special[never] = True
        self._ordinary = np.flatnonzero(~self._is_special)

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the text and its masking, by name."""
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

    def transform(self, batch: Batch, row_indices: RowIndices) -> Batch:
        """Mask tokens of text rows.

        Returns
        -------
        dict
            ``tokens`` int32 [R, T] with masking applied; ``labels`` int32 [R, T], the original id
            of selected tokens and -100 elsewhere; all other arrays of `batch` unchanged. Padding is
            never selected.
        """
        tokens_RT = batch["tokens"]
        n_rows, seq_len = tokens_RT.shape
        words_R3T = random_words(self._key, row_indices, 3 * seq_len).reshape(n_rows, 3, seq_len)
        select_RT, how_RT = to_unit_interval(words_R3T[:, 0]), to_unit_interval(words_R3T[:, 1])
        special_RT = self._is_special[tokens_RT]
        if self._starts_word is not None:
            first_RT = _word_starts(batch, special_RT, self._starts_word)
            select_RT = np.take_along_axis(select_RT, first_RT, 1)
        is_text_RT = batch["labels"] != IGNORED_LABEL  # padding has no next token
        selected_RT = (select_RT < self.rate) & ~special_RT & is_text_RT
        random_RT = self._ordinary[words_R3T[:, 2] % np.uint64(len(self._ordinary))]
        masked_RT = np.where(how_RT < MASKED_SHARE, self.mask_id, random_RT)
        changed_RT = selected_RT & (how_RT < MASKED_SHARE + REPLACED_SHARE)
        return {
            **batch,
            "tokens": np.where(changed_RT, masked_RT, tokens_RT).astype(np.int32),
            "labels": np.where(selected_RT, tokens_RT, IGNORED_LABEL).astype(np.int32),
        }


def _word_starts(
    batch: Batch, special_RT: npt.NDArray[np.bool_], starts_word: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return the column in which the word of each token starts, int64 [R, T].

    Words end at special tokens and document borders. A continuation token right after a special
    token shares the column of the special token, which is never selected.
    """
    starts_RT = starts_word[batch["tokens"]] | special_RT
    starts_RT[:, 0] = True
    if "segment_ids" in batch:
        starts_RT[:, 1:] |= batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    return np.maximum.accumulate(np.where(starts_RT, np.arange(starts_RT.shape[1]), 0), axis=1)


def _validate(
    never: npt.NDArray[np.int64],
    vocab_size: int,
    rate: float,
    whole_words: npt.NDArray[np.bool_] | None,
) -> list[str]:
    problems = []
    if never.min() < 0 or never.max() >= vocab_size:
        problems.append(
            f"mask_id, special_ids: got ids from {never.min()} to {never.max()}; expected 0 to "
            f"{vocab_size - 1} with vocab_size={vocab_size}"
        )
    elif len(never) >= vocab_size:
        problems.append(
            f"vocab_size: got {vocab_size}; expected tokens besides the mask and special ones"
        )
    if not 0 < rate <= 1:
        problems.append(f"rate: got {rate}; expected a probability above 0, at most 1")
    if whole_words is not None and (
        whole_words.shape != (vocab_size,) or whole_words.dtype != np.bool_
    ):
        problems.append(
            f"whole_words: got {whole_words.dtype} {list(whole_words.shape)}; expected bool "
            f"[{vocab_size}], one entry for each token"
        )
    return problems
