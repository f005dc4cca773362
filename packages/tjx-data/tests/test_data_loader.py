"""The loader: a pure function of (seed, step), exact over epochs, shards and processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import TokenLoader, batch_bytes, char_tokenizer, prepare, train_bpe
from tjx_data.loading import token_loader

EOT = "<|endoftext|>"
ALPHABET = "".join(chr(0x4E00 + i) for i in range(3000))
# All tokens of the stream are distinct, so that a batch shows its positions in the stream.
DISTINCT = char_tokenizer([ALPHABET])


def _distinct_set(directory: Path, n_tokens: int, shard_tokens: int) -> Path:
    """Make a set whose training stream is 0, 1, 2, ..., n_tokens - 1."""
    text = ALPHABET[: n_tokens + 1]
    prepare(
        [text],
        DISTINCT,
        directory / "set",
        holdout="tail",
        holdout_fraction=0.5 / (n_tokens + 1),
        shard_tokens=shard_tokens,
    )
    return directory / "set"


sizes = st.tuples(
    st.integers(2, 120),  # tokens
    st.integers(1, 12),  # seq_len
    st.integers(1, 9),  # batch_size
    st.integers(6, 60),  # shard_tokens
    st.integers(0, 2**64 - 1),  # seed
).filter(lambda size: size[0] > size[1])


@given(sizes)
@settings(max_examples=50)
def test_every_epoch_has_every_label_once_after_its_own_token(
    tmp_path_factory: pytest.TempPathFactory, size: tuple[int, int, int, int, int]
) -> None:
    n_tokens, seq_len, batch_size, shard_tokens, seed = size
    directory = _distinct_set(tmp_path_factory.mktemp("loader"), n_tokens, shard_tokens)
    loader = TokenLoader(directory, seq_len=seq_len, batch_size=batch_size, seed=seed)
    n = loader.rows_per_epoch
    assert n == -(-(n_tokens - 1) // seq_len)
    batches = [loader.batch(step) for step in range(-(-3 * n // batch_size))]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, tokens + 1)  # the stream counts: the next token is +1
    for epoch in range(3):
        of_epoch = labels[epoch * n : (epoch + 1) * n].ravel()
        counts = np.bincount(of_epoch, minlength=n_tokens)
        assert counts[0] == 0
        assert set(counts[1:].tolist()) <= {1, 2}
        assert (counts == 2).sum() == n * seq_len - (n_tokens - 1)


def _starts(directory: Path, windows: str, n_turns: int, seq_len: int = 7) -> list[int]:
    loader = TokenLoader(directory, seq_len=seq_len, batch_size=1, seed=3, windows=windows)  # type: ignore[arg-type]  # a parameter
    starts: list[int] = loader.rows(np.arange(n_turns))["tokens"][:, 0].tolist()
    return starts


@pytest.mark.parametrize("n_tokens", [99, 100, 102])  # 98 labels are whole windows of 7
def test_shifted_windows_start_uniformly_for_any_remainder(tmp_path: Path, n_tokens: int) -> None:
    directory = _distinct_set(tmp_path, n_tokens, 40)
    counts = np.bincount(_starts(directory, "shifted", 15 * 400), minlength=n_tokens)
    assert counts[n_tokens - 1] == 0
    expected = counts.sum() / (n_tokens - 1)  # about 60
    assert abs(counts[:-1] - expected).max() < 5 * np.sqrt(expected)


def test_random_windows_are_independent_and_uniform(tmp_path: Path) -> None:
    directory = _distinct_set(tmp_path, 99, 40)
    starts = _starts(directory, "random", 6000)
    counts = np.bincount(starts, minlength=99)
    assert not counts[92:].any()  # a window with its labels ends within the text
    assert abs(counts[:92] - 6000 / 92).max() < 5 * np.sqrt(6000 / 92)
    assert len(set(starts[:14])) < 14  # independent draws repeat within an epoch
    rows = TokenLoader(directory, seq_len=7, batch_size=1, seed=3, windows="random")
    alone = rows.rows(np.array([41]))
    assert alone["tokens"][0, 0] == starts[41]
    np.testing.assert_array_equal(alone["labels"], alone["tokens"] + 1)


# The first windows of seed 3 as tjx-data 0.1.0 gave them.
OLD_STARTS = [
    91, 84, 14, 0, 35, 70, 63, 56, 28, 77, 42, 7, 21, 49,
    28, 35, 63, 91, 77, 7, 84, 0, 14, 21, 70, 42, 49, 56, 78, 36, 57, 50,
]  # fmt: skip


def test_aligned_windows_are_those_of_version_0_1(tmp_path: Path) -> None:
    directory = _distinct_set(tmp_path, 100, 40)
    assert _starts(directory, "aligned", 32) == OLD_STARTS
    loader = TokenLoader(directory, seq_len=7, batch_size=1, seed=3, windows="aligned")
    assert "windows" not in loader.identity
    assert loader.fingerprint == "05acb1213a734fc2d01259700866acde20e0778c02e80a996e5b383a6a8bcdfa"
    shifted = TokenLoader(directory, seq_len=7, batch_size=1, seed=3)
    assert shifted.identity["windows"] == "shifted"


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _distinct_set(tmp_path_factory.mktemp("counting"), 1000, 130)


def test_epochs_and_seeds_have_different_orders(counting: Path) -> None:
    loader = TokenLoader(counting, seq_len=9, batch_size=111, seed=1)
    assert loader.rows_per_epoch == 111
    first, second = (loader.batch(step)["tokens"][:, 0] for step in (0, 1))
    other = TokenLoader(counting, seq_len=9, batch_size=111, seed=2).batch(0)["tokens"][:, 0]
    for order in (second, other, np.sort(first)):
        assert (first // 9 == order // 9).mean() < 0.1
    offsets = {int(starts[0]) % 9 for starts in (first, second, other)}
    assert len(offsets) > 1


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
@settings(max_examples=30)
def test_batch_is_a_function_of_seed_and_step(counting: Path, steps: list[int]) -> None:
    walked = TokenLoader(counting, seq_len=16, batch_size=12, seed=5)
    for step in steps:
        fresh = TokenLoader(counting, seq_len=16, batch_size=12, seed=5)
        for name, array in walked.batch(step).items():
            np.testing.assert_array_equal(array, fresh.batch(step)[name])


@given(st.integers(0, 500), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=40)
def test_rows_of_processes_make_up_the_global_batch(counting: Path, step: int, n: int) -> None:
    alone = TokenLoader(counting, seq_len=16, batch_size=8, seed=5)
    together = [
        TokenLoader(counting, seq_len=16, batch_size=8, seed=5, process_index=i, process_count=n)
        for i in range(n)
    ]
    assert {loader.fingerprint for loader in together} == {alone.fingerprint}
    parts = [loader.batch(step) for loader in together]
    for name, array in alone.batch(step).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@given(sizes, st.sampled_from([1, 2]), st.none() | st.integers(1, 150))
@settings(max_examples=40)
def test_evaluation_visits_each_label_once(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int, int, int, int],
    process_count: int,
    max_tokens: int | None,
) -> None:
    n_tokens, seq_len, batch_size, shard_tokens, _ = size
    directory = _distinct_set(tmp_path_factory.mktemp("loader"), n_tokens, shard_tokens)
    seen: list[int] = []
    n_batches = set()
    for i in range(process_count):
        loader = TokenLoader(
            directory,
            seq_len=seq_len,
            batch_size=batch_size * process_count,
            process_index=i,
            process_count=process_count,
        )
        batches = list(loader.evaluation_batches(max_tokens))
        n_batches.add(len(batches))
        for batch in batches:
            assert batch["tokens"].shape == batch["labels"].shape == (batch_size, seq_len)
            counted = batch["labels"] != -100
            np.testing.assert_array_equal(batch["labels"][counted], batch["tokens"][counted] + 1)
            seen += batch["labels"][counted].tolist()
    last = n_tokens - 1 if max_tokens is None else min(max_tokens, n_tokens - 1)
    assert sorted(seen) == list(range(1, last + 1))
    assert len(n_batches) == 1


@pytest.mark.parametrize("limit_seconds", [0.0, 3600.0], ids=["slow-disk", "fast-disk"])
def test_batches_in_any_order_are_the_rows_of_their_step(
    limit_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of consecutive steps are read together, unless the disk is slow."""
    monkeypatch.setattr(token_loader, "_MAX_BLOCK_SECONDS", limit_seconds)
    monkeypatch.setattr(token_loader, "_MAX_BLOCK_BYTES", 1000)
    tokens = np.arange(1000, dtype=np.uint16)
    loader = TokenLoader.from_tokens(
        tokens, vocab_size=1000, seq_len=9, batch_size=4, process_index=1, process_count=2
    )
    steps_read = []
    windows = loader.source.reader.windows

    def count(starts: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.unsignedinteger]:
        steps_read.append(len(starts) // 2)
        return windows(starts, width)

    monkeypatch.setattr(loader.source.reader, "windows", count)
    n_wrapped = 0
    for step in [*range(100), 7, 8, 9, 3, 500, 501]:
        batch = loader.batch(step)
        rows = np.arange(4 * step + 2, 4 * step + 4)
        expected = TokenLoader.from_tokens(tokens, vocab_size=1000, seq_len=9, batch_size=4)
        for name, array in expected.rows(rows).items():
            np.testing.assert_array_equal(batch[name], array, err_msg=f"{name} of step {step}")
        n_wrapped += int((np.diff(batch["tokens"]) < 0).any())
    assert n_wrapped
    if limit_seconds:  # 40 bytes a step, so that at most 25 fit
        assert steps_read == [1, 2, 4, 8, 16, 25, 25, 25, 1, 2, 1, 1, 2]
    else:
        assert set(steps_read) == {1}


def test_batch_bytes_add_up_to_the_bytes_of_the_text(tmp_path: Path) -> None:
    texts = [f"Größe {i}: the cat sat on the mat 日本.\n" * (i % 3 + 1) for i in range(40)]
    tokenizer = train_bpe(texts, 290)
    index = prepare(texts, tokenizer, tmp_path / "set", holdout_fraction=0.3)
    for split, entry in index.splits.items():
        loader = TokenLoader(tmp_path / "set", split=split, seq_len=7, batch_size=3)
        n_bytes = sum(
            batch_bytes(batch["labels"], tokenizer.token_byte_lengths)
            for batch in loader.evaluation_batches()
        )
        assert n_bytes == entry.n_text_bytes == loader.n_text_bytes


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    directory = _distinct_set(tmp_path, 500, 200)
    TokenLoader(directory, seq_len=8, batch_size=2).verify()
    shard = directory / "train_00001.bin"
    whole = shard.read_bytes()

    _flip(shard)  # only the hash detects it
    with pytest.raises(ValueError, match=r"train_00001\.bin: SHA-256 is"):
        TokenLoader(directory, seq_len=8, batch_size=2).verify()
    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"train_00001\.bin: got 462 bytes; expected 464"):
        TokenLoader(directory, seq_len=8, batch_size=2)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train_00001\.bin: missing"):
        TokenLoader(directory, seq_len=8, batch_size=2)
    shard.write_bytes(whole)

    for name, old, new, message in (
        ("tokenizer.json", "<unk>", "<ukn>", "SHA-256 is"),
        ("index.json", "uint16", "uint32", "damaged"),
        ("index.json", "{", "", "damaged"),
        ("index.json", "tjx-data 2", "tjx-data 1", "expected 'tjx-data 2'"),
    ):
        content = (directory / name).read_text()
        (directory / name).write_text(content.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            TokenLoader(directory, seq_len=8, batch_size=2)
        (directory / name).write_text(content)
    TokenLoader(directory, seq_len=8, batch_size=2).verify()
    (directory / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json is missing"):
        TokenLoader(directory, seq_len=8, batch_size=2)


def test_another_tokenizer_is_rejected(tmp_path: Path) -> None:
    directory = _distinct_set(tmp_path, 100, 200)
    other = char_tokenizer([ALPHABET[:-1]])
    TokenLoader(directory, seq_len=8, batch_size=2, tokenizer=DISTINCT)
    with pytest.raises(ValueError, match=other.fingerprint[:16]) as error:
        TokenLoader(directory, seq_len=8, batch_size=2, tokenizer=other)
    assert DISTINCT.fingerprint[:16] in str(error.value)


def test_fingerprint_covers_what_determines_batches(counting: Path, tmp_path: Path) -> None:
    other = _distinct_set(tmp_path, 999, 130)

    def fingerprint(directory: Path, seq_len: int, batch_size: int, seed: int) -> str:
        loader = TokenLoader(directory, seq_len=seq_len, batch_size=batch_size, seed=seed)
        return loader.fingerprint

    one = (counting, 8, 2, 0)
    assert fingerprint(*one) == fingerprint(*one)
    changed = [(counting, 9, 2, 0), (counting, 8, 4, 0), (counting, 8, 2, 1), (other, 8, 2, 0)]
    assert len({fingerprint(*settings) for settings in [one, *changed]}) == 5


def test_invalid_arguments_are_all_reported(counting: Path) -> None:
    with pytest.raises(ValueError, match="seq_len: got 0") as error:
        TokenLoader(counting, seq_len=0, batch_size=5, seed=-1, process_index=2, process_count=2)
    assert len(str(error.value).splitlines()) == 4
    with pytest.raises(ValueError, match="expected less than the 1000 tokens"):
        TokenLoader(counting, seq_len=1000, batch_size=1)


def test_importing_the_config_imports_no_numpy_and_no_jax() -> None:
    program = (
        "import sys; from tjx_data import DataConfig; DataConfig(); "
        "print([m for m in ('numpy', 'jax', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]", done.stderr
