"""Sequence packing: every label once, rows of bounded length, separate documents."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import TokenLoader, char_tokenizer, prepare
from tjx_data.prepared.packing import open_packing, pack, packing_file

EOT = "<|endoftext|>"
ALPHABET = "".join(chr(0x4E00 + i) for i in range(2000))
# Apart from end of text all tokens are distinct.
DISTINCT = char_tokenizer([ALPHABET], special_tokens=(EOT,))
WITHOUT_EOT = char_tokenizer([ALPHABET])

lengths = st.lists(st.integers(1, 40), min_size=4, max_size=40)


def _documents(sizes: list[int]) -> list[str]:
    ends = np.cumsum(sizes)
    return [ALPHABET[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@given(lengths, st.integers(1, 24), st.booleans())
@settings(max_examples=40)
def test_every_label_occurs_once_in_its_own_document(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_len: int, has_eot: bool
) -> None:
    directory = tmp_path_factory.mktemp("packing") / "set"
    tokenizer = DISTINCT if has_eot else WITHOUT_EOT
    texts = _documents([*sizes, 3, 2])
    prepare(texts, tokenizer, directory, holdout="tail", holdout_fraction=2.5 / len("".join(texts)))
    index = {i: d for d, text in enumerate(texts) for i in tokenizer.encode(text)}
    loader = TokenLoader(directory, seq_len=seq_len, batch_size=3, packing="documents")
    rows = loader.rows(np.arange(loader.rows_per_epoch))
    seen: list[int] = []
    for tokens, labels, segments, positions in zip(
        rows["tokens"], rows["labels"], rows["segment_ids"], rows["positions"], strict=True
    ):
        used = segments > 0
        assert (labels[~used] == -100).all()
        assert (np.diff(segments[used]) >= 0).all()
        assert not used[int(used.sum()) :].any()  # padding is at the end
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            of = {index[i] for i in (*tokens[here], *labels[here]) if i in index}
            assert len(of) <= 1
            np.testing.assert_array_equal(tokens[here][1:], labels[here][:-1])
        seen += labels[used].tolist()
    stream = loader.read(0, loader.n_tokens).tolist()
    expected = stream[1:]  # each token of each document, and the end after it
    if not has_eot:
        firsts = {tokenizer.encode(text)[0] for text in texts}
        expected = [i for i in stream if i not in firsts]
    assert sorted(seen) == sorted(expected)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=80), st.integers(1, 30))
@settings(max_examples=100)
def test_no_two_rows_fit_into_one(sizes: list[int], seq_len: int) -> None:
    lengths = np.array(sizes)
    packing = pack(np.cumsum(lengths), lengths, seq_len)
    fill = [
        int(packing.lengths[first:last].sum())
        for first, last in zip(packing.rows[:-1], packing.rows[1:], strict=True)
    ]
    assert sum(fill) == sum(sizes)
    assert all(0 < n <= seq_len for n in fill)
    if len(fill) > 1:
        least, second = sorted(fill)[:2]
        assert least + second > seq_len


def test_best_fit_takes_the_row_of_least_room() -> None:
    lengths = np.array([6, 7, 3, 1])
    packing = pack(np.array([0, 100, 200, 300]), lengths, 10)
    rows = [
        packing.starts[a:b].tolist() for a, b in zip(packing.rows, packing.rows[1:], strict=False)
    ]
    assert rows == [[100, 200], [0, 300]]


def test_text_of_usual_lengths_fills_the_rows() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).astype(np.int64) + 1
    packing = pack(np.cumsum(lengths), lengths, 1024)
    assert lengths.sum() / (packing.n_rows * 1024) > 0.99


def test_packing_is_stored_and_damage_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    prepare(_documents([5, 9, 3, 7, 2, 8] * 5), DISTINCT, directory, holdout_fraction=0.3)
    first = open_packing(directory, "train", 16)
    file = packing_file(directory, "train", 16)
    stamp = file.stat().st_mtime_ns
    again = open_packing(directory, "train", 16)
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(before, after)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"packing_train_16\.npz: damaged"):
        TokenLoader(directory, seq_len=16, batch_size=2, packing="documents")


def test_processes_share_packed_batches_and_evaluation_is_complete(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    prepare(_documents([5, 9, 3, 7, 2, 8, 30] * 4), DISTINCT, directory, holdout_fraction=0.2)
    alone = TokenLoader(directory, seq_len=16, batch_size=4, packing="documents", seed=3)
    for n in (2, 4):
        shares = [
            TokenLoader(
                directory, seq_len=16, batch_size=4, packing="documents", seed=3,
                process_index=i, process_count=n,
            )
            for i in range(n)
        ]  # fmt: skip
        for step in (0, 3, 50):
            for name, whole in alone.batch(step).items():
                for i, share in enumerate(shares):
                    np.testing.assert_array_equal(share.batch(step)[name], np.split(whole, n)[i])
    labels = np.concatenate([batch["labels"] for batch in alone.evaluation_batches()])
    stream = alone.read(1, alone.n_tokens - 1)
    assert sorted(labels[labels != -100].tolist()) == sorted(stream.tolist())
    few = list(alone.evaluation_batches(32))
    assert len(few) == 1
    assert (few[0]["segment_ids"].max(axis=1) > 0).sum() == 2
