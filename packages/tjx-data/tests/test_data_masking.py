"""Masking: the shares of the paper, whole words, and deterministic masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import MaskedLoader, TokenLoader, char_tokenizer, prepare

EOT = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
TOKENIZER = char_tokenizer([LETTERS], [EOT])
END, SPACE = TOKENIZER.special_tokens[EOT], TOKENIZER.encode(" ")[0]
MASK = TOKENIZER.vocab_size
VOCAB = MASK + 1
ORDINARY = sorted(set(range(VOCAB)) - {END, MASK})
# A word is a space and the letters after it.
STARTS = np.arange(VOCAB) == SPACE


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words of 1 to 6 letters, in documents of 1 to 12 words."""
    rng = np.random.default_rng(0)

    def word() -> str:
        return " " + "".join(rng.choice(list(LETTERS[:-1]), rng.integers(1, 7)))

    texts = ["".join(word() for _ in range(rng.integers(1, 13)))[1:] for _ in range(700)]
    folder = tmp_path_factory.mktemp("masking") / "set"
    prepare(texts, TOKENIZER, folder)
    return folder


def text_loader(directory: Path, **given_: Any) -> TokenLoader:
    return TokenLoader(directory, **{"seq_len": 60, "batch_size": 8, "seed": 5, **given_})


def masked(text: TokenLoader, **given_: Any) -> MaskedLoader:
    return MaskedLoader(
        text, **{"mask_id": MASK, "vocab_size": VOCAB, "special_ids": [END], **given_}
    )


def epochs(directory: Path, n_epochs: int, **given_: Any) -> tuple[np.ndarray, ...]:
    """Return text, masked tokens and labels of some epochs."""
    text = text_loader(directory)
    row_indices = np.arange(n_epochs * text.rows_per_epoch)
    rows = masked(text, **given_).rows(row_indices)
    return text.rows(row_indices)["tokens"], rows["tokens"], rows["labels"]


def test_shares_match_the_paper(directory: Path) -> None:
    tokens, hidden, labels = epochs(directory, 10)
    chosen = labels != -100
    assert abs(chosen[tokens != END].mean() - 0.15) < 0.005
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    np.testing.assert_array_equal(hidden[~chosen], tokens[~chosen])
    was_hidden, was_kept = hidden[chosen] == MASK, hidden[chosen] == tokens[chosen]
    assert abs(was_hidden.mean() - 0.8) < 0.015
    # A random replacement equals the old token with this probability.
    assert abs(was_kept.mean() - (0.1 + 0.1 / len(ORDINARY))) < 0.01


def test_special_tokens_are_neither_selected_nor_drawn(directory: Path) -> None:
    tokens, hidden, labels = epochs(directory, 10, rate=1.0)
    np.testing.assert_array_equal(labels == -100, tokens == END)
    drawn = hidden[(hidden != MASK) & (hidden != tokens)]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert sorted(np.flatnonzero(counts)) == ORDINARY
    # Only replacements by another token are counted: slightly fewer of the common space.
    letters = counts[[i for i in ORDINARY if i != SPACE]]
    assert abs(letters / letters.mean() - 1).max() < 0.2


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
    process_count=st.sampled_from([1, 2, 4, 8]),
    packing=st.sampled_from(["windows", "documents"]),
    whole_words=st.sampled_from([None, STARTS]),
)
def test_row_is_a_function_of_seed_and_row_index(
    directory: Path,
    seed: int,
    step: int,
    process_count: int,
    packing: str,
    whole_words: np.ndarray | None,
) -> None:
    def loader(**given_: Any) -> MaskedLoader:
        return masked(
            text_loader(directory, seed=seed, packing=packing, **given_), whole_words=whole_words
        )

    whole = loader().batch(step)
    assert (whole["labels"] != -100).any()
    for i in range(process_count):
        part = loader(process_index=i, process_count=process_count).batch(step)
        for name, values in part.items():
            np.testing.assert_array_equal(values, np.split(whole[name], process_count)[i])
    one = loader(batch_size=1).batch(8 * step + 3)
    np.testing.assert_array_equal(one["tokens"][0], whole["tokens"][3])


def test_each_epoch_masks_other_tokens(directory: Path) -> None:
    def shown(chosen: np.ndarray, tokens: np.ndarray) -> dict[bytes, bytes]:
        return {text.tobytes(): row.tobytes() for text, row in zip(tokens, chosen, strict=True)}

    text = text_loader(directory, packing="documents")  # whose rows are the same in each epoch
    first, second = (np.arange(text.rows_per_epoch) + i * text.rows_per_epoch for i in (0, 1))
    loader = masked(text)
    before, after = (
        shown(loader.rows(row_indices)["labels"] != -100, text.rows(row_indices)["tokens"])
        for row_indices in (first, second)
    )
    assert before.keys() == after.keys()
    same = sum(before[row] == after[row] for row in before)
    assert same < 0.02 * len(before)


def test_words_are_selected_as_a_whole(directory: Path) -> None:
    tokens, _, labels = epochs(directory, 20, whole_words=STARTS)
    chosen = labels != -100
    ordinary = tokens != END
    assert not chosen[~ordinary].any()
    assert abs(chosen[ordinary].mean() - 0.15) < 0.01
    starts = STARTS[tokens[:, 1:]] | (tokens[:, 1:] == END) | (tokens[:, :-1] == END)
    changes = chosen[:, 1:] != chosen[:, :-1]
    assert changes[starts].any()
    assert not changes[~starts].any()
    # The end of a text ends its last word.
    ends = tokens[:, 1:-1] == END
    assert (chosen[:, 2:] != chosen[:, :-2])[ends].any()


def test_replacements_within_a_word_are_independent(directory: Path) -> None:
    tokens, hidden, labels = epochs(directory, 10, whole_words=STARTS)
    inside = ~STARTS[tokens[:, 1:]] & (labels[:, 1:] != -100) & (labels[:, :-1] != -100)
    masks = hidden == MASK
    assert abs((masks[:, 1:] == masks[:, :-1])[inside].mean() - (0.8**2 + 0.2**2)) < 0.03


def test_documents_of_a_packed_row_share_no_word(directory: Path) -> None:
    # No token starts a word, and none is special: each document is one word.
    text = text_loader(directory, packing="documents")
    row_indices = np.arange(text.rows_per_epoch)
    no_starts = np.zeros(VOCAB, bool)
    rows = masked(text, special_ids=[], whole_words=no_starts, rate=0.5).rows(row_indices)
    segments, chosen = rows["segment_ids"], rows["labels"] != -100
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(rows[name], text.rows(row_indices)[name])
    assert (segments == 0).any()
    assert not chosen[segments == 0].any()
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    changes = chosen[:, 1:] != chosen[:, :-1]
    assert not changes[same].any()
    assert 0.4 < changes[(segments[:, 1:] > 1) & ~same].mean() < 0.6


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_evaluation_masks_the_same_tokens_on_every_pass(directory: Path, packing: str) -> None:
    def rows(batch_size: int, **given_: Any) -> np.ndarray:
        text = text_loader(
            directory, split="validation", packing=packing, batch_size=batch_size, **given_
        )
        batches = list(masked(text).evaluation_batches(900))
        padding = [b["labels"] == -100 for b in text.evaluation_batches(900)]
        for batch, is_padding in zip(batches, padding, strict=True):
            assert not (batch["labels"] != -100)[is_padding].any()
        return np.concatenate([batch["labels"] for batch in batches])

    first = rows(4)
    assert 0 < (first != -100).sum() < 0.3 * 900
    np.testing.assert_array_equal(first, rows(4))
    np.testing.assert_array_equal(first[:15], rows(15)[:15])
    second_halves = first.reshape(-1, 2, 2, first.shape[1])[:, 1].reshape(-1, first.shape[1])
    np.testing.assert_array_equal(second_halves, rows(4, process_index=1, process_count=2))


def test_fingerprint_covers_everything_that_determines_masks(directory: Path) -> None:
    def fingerprint(text: dict[str, int] | None = None, **given_: Any) -> str:
        return masked(text_loader(directory, **(text or {})), **given_).fingerprint

    others: list[dict[str, Any]] = [
        {},
        {"text": {"seed": 6}},
        {"text": {"batch_size": 4}},
        {"rate": 0.2},
        {"special_ids": []},
        {"vocab_size": VOCAB + 1},
        {"mask_id": 1},
        {"whole_words": STARTS},
        {"whole_words": ~STARTS},
    ]
    assert len({fingerprint(**other) for other in others}) == len(others)
    assert fingerprint() == fingerprint({"process_index": 1, "process_count": 2})


def test_invalid_arguments_are_all_reported(directory: Path) -> None:
    text = text_loader(directory)
    with pytest.raises(ValueError, match=r"from 0 to 9; .* vocab_size=9\nrate: got 2") as error:
        masked(text, mask_id=9, vocab_size=9, special_ids=[0], rate=2.0, whole_words=STARTS)
    assert f"whole_words: got bool [{VOCAB}]; expected bool [9]" in str(error.value)
    with pytest.raises(ValueError, match="expected tokens besides the mask"):
        masked(text, mask_id=1, vocab_size=2, special_ids=[0])
