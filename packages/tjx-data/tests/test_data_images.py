"""Images: MNIST's file format, every image once an epoch, any damage told."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from tjx_data import ImageLoader, read_idx

COUNT = 11


def idx(array: np.ndarray) -> bytes:
    """Write the format by hand: LeCun's page gives it byte by byte."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mnist")
    # Image i has the value i everywhere and the label i: what is seen can be told.
    images = np.broadcast_to(np.arange(COUNT)[:, None, None], (COUNT, 6, 4))
    for prefix in ("train", "t10k"):
        (directory / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(COUNT)))
    return directory


def values(images: np.ndarray) -> list[int]:
    pixels = (images[:, 0, 0, 0] * 0.3081 + 0.1307) * 255
    return [round(float(pixel)) for pixel in pixels]


def test_an_array_comes_back(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)


def test_every_image_comes_once_an_epoch_with_its_label_in_another_order(folder: Path) -> None:
    loader = ImageLoader(folder, batch_size=4, seed=3)
    batches = [loader.batch(step) for step in range(COUNT)]  # four epochs
    assert batches[0]["images"].shape == (4, 6, 4, 1)
    seen = [value for batch in batches for value in values(batch["images"])]
    assert seen == [label for batch in batches for label in batch["labels"].tolist()]
    epochs = [seen[start : start + COUNT] for start in range(0, len(seen), COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_processes_share_a_batch(folder: Path) -> None:
    whole = ImageLoader(folder, batch_size=4, seed=3).batch(5)["labels"]
    parts = [
        ImageLoader(folder, batch_size=4, seed=3, process_index=i, process_count=2).batch(5)
        for i in range(2)
    ]
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part["labels"], whole[i::2])


def test_evaluation_sees_every_image_once_in_batches_of_one_shape(folder: Path) -> None:
    loader = ImageLoader(folder, split="validation", batch_size=4)
    batches = list(loader.evaluation_batches())
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert [batch["images"].shape for batch in batches] == [(4, 6, 4, 1)] * 3
    assert labels[labels >= 0].tolist() == list(range(COUNT))
    assert sum((b["labels"] >= 0).sum() for b in loader.evaluation_batches(5)) == 5


def test_another_seed_or_batch_size_is_other_data(folder: Path) -> None:
    prints = {
        ImageLoader(folder, batch_size=size, seed=seed).fingerprint
        for size, seed in ((4, 0), (4, 1), (5, 0))
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-3], "fetch the file again"),
        (lambda data: b"\1" + data[1:], "not in IDX format"),
        (lambda data: gzip.compress(data)[:-9], "the file is not whole"),
        (lambda _: idx(np.arange(3)), "11 images and 3 labels"),
    ],
)
def test_a_damaged_file_is_told(folder: Path, tmp_path: Path, damage: object, says: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte"
    assert callable(damage)
    labels.write_bytes(damage(labels.read_bytes()))
    with pytest.raises(ValueError, match=says):
        ImageLoader(tmp_path, batch_size=2)


def test_a_folder_without_the_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no train-images-idx3-ubyte"):
        ImageLoader(tmp_path, batch_size=2)
