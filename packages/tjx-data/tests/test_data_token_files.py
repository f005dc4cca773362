"""Token ids of the user: arrays, memmaps, .npy files and .bin files, and damage to each of them."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tjx_data import DataConfig, DataError, TokenLoader, find_token_files, open_token_split
from tjx_data.corpora import file_scan
from tjx_data.loading import shard_reader
from tjx_data.prepared.dataset_cache import find_problems

VOCAB = 700
IDS: npt.NDArray[np.uint16] = (np.arange(4000) * 37 % VOCAB).astype(np.uint16)


def loader_of(tokens: npt.ArrayLike | str | Path, **choices: object) -> TokenLoader:
    settings = {"vocab_size": VOCAB, "seq_len": 16, "batch_size": 4, "seed": 3, **choices}
    return TokenLoader.from_tokens(tokens, **settings)  # type: ignore[arg-type]


def write_bin(file: Path, ids: npt.NDArray[np.integer] = IDS, dtype: str = "<u2") -> Path:
    ids.astype(dtype).tofile(file)
    return file


def write_npy(file: Path, ids: npt.NDArray[np.integer] = IDS) -> Path:
    np.save(file, ids)
    return file


def write_llmc(file: Path) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    file.write_bytes(header.tobytes() + IDS.tobytes())
    return file


@pytest.mark.parametrize("windows", ["shifted", "random", "aligned"])
def test_every_kind_of_source_gives_the_same_batches(tmp_path: Path, windows: str) -> None:
    wide = write_bin(tmp_path / "wide.bin", dtype="<u4")
    raw = write_bin(tmp_path / "raw.bin")
    expected = [loader_of(IDS, windows=windows).batch(step) for step in (0, 5, 300)]
    sources: list[tuple[npt.ArrayLike | Path, str]] = [
        (IDS.astype(np.int64), "auto"),
        (np.repeat(IDS, 2)[::2], "auto"),  # not contiguous
        (np.memmap(raw, np.uint16, "r"), "auto"),
        (raw, "auto"),
        (wide, "uint32"),
        (write_npy(tmp_path / "short.npy"), "auto"),
        (write_npy(tmp_path / "long.npy", IDS.astype(">i8")), "auto"),
        (write_llmc(tmp_path / "llmc.bin"), "auto"),
    ]
    for source, dtype in sources:
        loader = loader_of(source, windows=windows, id_dtype=dtype)
        loader.source.verify()
        for step, batch in zip((0, 5, 300), expected, strict=True):
            found = loader.batch(step)
            assert found["tokens"].dtype == np.int32
            for name, values in batch.items():
                np.testing.assert_array_equal(found[name], values)
    assert (expected[0]["labels"] == np.roll(expected[0]["tokens"], -1, 1))[:, :-1].all()


def test_evaluation_reads_each_label_once(tmp_path: Path) -> None:
    loader = loader_of(write_bin(tmp_path / "a.bin"))
    labels = np.concatenate([batch["labels"].ravel() for batch in loader.evaluation_batches()])
    np.testing.assert_array_equal(labels[labels >= 0], IDS[1:])


def test_identity_follows_content_and_vocabulary(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "a.bin")
    changed = IDS.copy()
    changed[9] += 1
    for make in (lambda ids: ids, lambda ids: write_bin(tmp_path / "b.bin", ids)):
        first, same, other = loader_of(make(IDS)), loader_of(make(IDS)), loader_of(make(changed))
        assert first.identity == same.identity
        assert first.identity["tokens"] != other.identity["tokens"]
    assert loader_of(file).identity != loader_of(file, vocab_size=VOCAB + 1).identity


def test_scan_of_an_unchanged_file_is_cached_unless_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_scan, "MIN_CACHED_BYTES", 1)
    write_bin(tmp_path / "val.bin")
    file = write_bin(tmp_path / "train.bin")
    os.utime(file, ns=(10**18, 10**18))
    before = loader_of(file).identity
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(10**18, 10**18))
    assert loader_of(file).identity == before  # same size and time
    config = DataConfig(path=str(tmp_path))
    files = find_token_files(config)
    assert files is not None
    source = open_token_split(config, files, "train", vocab_size=VOCAB)
    assert source.identity["tokens"] != before["tokens"]


def overwrite(position: int, content: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with file.open("r+b") as stream:
            stream.seek(position)
            stream.write(content)

    return change


def truncate(n_bytes: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, file.stat().st_size - n_bytes)


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (write_bin, truncate(1), "expected a multiple of 2 for uint16"),
        (write_bin, truncate(2 * len(IDS)), "is empty"),
        (write_bin, overwrite(50, b"\xff\xff"), "got token id 65535 as uint16; expected ids below"),
        (write_npy, truncate(3), "by its header; it is truncated"),
        (write_npy, truncate(8100), "not a .npy file, or damaged"),
        (write_npy, overwrite(0, b"NUMPY"), "not a .npy file, or damaged"),
        (write_npy, overwrite(1000, b"\xff\xff"), "got token id 65535"),
        (write_npy, lambda f: np.save(f, IDS.reshape(-1, 2)), "expected a vector of integers"),
        (write_npy, lambda f: np.save(f, IDS / 2), "expected a vector of integers"),
        (write_npy, lambda f: np.save(f, np.array([{}]), allow_pickle=True), "vector of integers"),
        (write_npy, lambda f: np.save(f, IDS[:0]), "is empty"),
        (write_llmc, truncate(2), "by its header; it is truncated"),
        (write_llmc, overwrite(2000, b"\xff\xff"), "got token id 65535"),
        (write_bin, lambda f: f.unlink(), "cannot be read: No such file"),
        (write_bin, lambda f: write_bin(f, dtype="<u4"), "looks like uint32"),
    ],
)  # fmt: skip
def test_damaged_file_is_a_clear_error(
    tmp_path: Path,
    write: Callable[[Path], Path],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    file = tmp_path / ("train.npy" if write is write_npy else "train.bin")
    write(file)
    loader_of(file).batch(0)
    damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        loader_of(file).batch(0)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (IDS.reshape(2, -1), "expected a vector of integers"),
        (IDS[:0], "expected a vector of integers"),
        (IDS / 2, "expected a vector of integers"),
        (IDS > 3, "expected a vector of integers"),
        (IDS.astype(np.int32) - 1, "got id 4294967295"),
        (IDS + np.uint16(1), "got id 700"),
        ("tokens.txt", "expected token ids in a .bin or .npy file"),
    ],
)
def test_wrong_array_is_a_clear_error(
    tmp_path: Path, tokens: npt.NDArray[np.generic] | str, message: str
) -> None:
    source: npt.ArrayLike | Path = tokens
    if isinstance(tokens, str):
        source = tmp_path / tokens
        source.write_text("text")
    with pytest.raises(ValueError, match=message):
        list(loader_of(source).evaluation_batches())


def test_wrong_arguments_are_clear_errors(tmp_path: Path) -> None:
    wide = write_bin(tmp_path / "wide.bin", dtype="<u4")
    with pytest.raises(ValueError, match="id_dtype: got 'int8'"):
        loader_of(wide, id_dtype="int8")
    with pytest.raises(ValueError, match="vocab_size: got 0"):
        loader_of(IDS, vocab_size=0)
    with pytest.raises(ValueError, match=r"or --data.id_dtype uint16 if that is its dtype"):
        loader_of(write_bin(tmp_path / "narrow.bin"), id_dtype="uint32").batch(0)
    with pytest.raises(ValueError, match="tokens without document borders"):
        TokenLoader(loader_of(IDS).source, seq_len=4, batch_size=1, packing="documents")
    with pytest.raises(ValueError, match="tokens without document borders"):
        loader_of(IDS).document(0)


def test_file_that_changes_during_a_run_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_CHECK_INTERVAL", 0.0)
    file = write_bin(tmp_path / "train.bin")
    loader = loader_of(file)
    loader.batch(0)
    write_bin(file, IDS[::-1])
    with pytest.raises(DataError, match=r"SHA-256 is .*restore the file"):
        loader.batch(1)
    write_bin(file)
    loader.batch(2)  # the right content again
    os.truncate(file, 2000)
    with pytest.raises(DataError, match=r"got 2000 bytes; expected 8000 .*restore the file"):
        loader.batch(3)


def test_a_path_that_is_too_long_for_a_file_names_no_tokens() -> None:
    assert not DataConfig(path="a" * 5000).reads_tokens


def test_splits_are_the_files_of_prepare_py_or_the_end_of_one_file(tmp_path: Path) -> None:
    train, val = write_bin(tmp_path / "train.bin"), write_bin(tmp_path / "val.bin", IDS[:500])
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(_Bomb(str(tmp_path / "boom"))))

    def lengths(**settings: object) -> list[int]:
        config = DataConfig(**settings)  # type: ignore[arg-type]
        assert config.reads_tokens
        assert find_problems(config) == []
        files = find_token_files(config)
        assert files is not None
        return [
            open_token_split(config, files, split, vocab_size=VOCAB).n_tokens
            for split in ("train", "validation")
        ]

    assert lengths(path=str(tmp_path)) == [4000, 500]
    assert lengths(path=str(train)) == [4000, 500]
    assert lengths(path=str(train), max_tokens=300) == [300, 500]
    tail = DataConfig(path=str(train), holdout="tail", holdout_fraction=0.25)
    files = find_token_files(tail)
    assert files is not None
    held_out = open_token_split(tail, files, "validation", vocab_size=VOCAB)
    np.testing.assert_array_equal(held_out.reader.read(0, 1000), IDS[3000:])
    assert lengths(path=str(train), holdout="tail", holdout_fraction=0.25) == [3000, 1000]
    val.rename(tmp_path / "shard_val_0.bin")
    train.rename(tmp_path / "shard_train_0.bin")
    assert lengths(path=str(tmp_path / "shard_train_0.bin")) == [4000, 500]
    assert not (tmp_path / "boom").exists()


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.file,)


def test_settings_that_need_text_are_problems(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin")

    def problems(**settings: object) -> str:
        return "\n".join(map(str, find_problems(DataConfig(**settings))))  # type: ignore[arg-type]

    path = str(tmp_path)
    assert "without val.bin or validation.bin beside it" in problems(path=path)
    write_bin(tmp_path / "val.bin")
    assert "packing: got 'documents'" in problems(path=path, packing="documents")
    assert "max_documents: got 3 with token ids" in problems(path=path, max_documents=3)
    assert "subset: got 0.5 with token ids" in problems(path=path, subset=0.5)
    assert "tokenizer: got 'char'" in problems(path=path, tokenizer="char")
    assert "no such file" in problems(path=f"{path}/none.bin").lower()
    write_npy(tmp_path / "train.npy")
    assert "has train.bin and train.npy" in problems(path=path)
    with pytest.raises(ValueError, match=r"give files of token ids by data\.path"):
        DataConfig(mixture=f"{path}/train.bin=1")
