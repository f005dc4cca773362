"""Images: each once per epoch, deterministic augmentation, errors for damaged files."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import ImageLoader, open_images, read_idx
from tjx_data.images.augmentation import Augmentation
from tjx_data.images.image_set import Images
from tjx_data.images.mnist import InMemoryImages
from tjx_data.images.transforms import augment_images
from tjx_data.loading.samplers import derive_key

COUNT = 11
EVERYTHING = Augmentation(crop=2, flip=True, erase=0.5)


def idx(array: np.ndarray) -> bytes:
    """Encode an array in IDX format, by LeCun's specification."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mnist")
    # Image i has the value i in every pixel and the label i.
    images = np.broadcast_to(np.arange(COUNT)[:, None, None], (COUNT, 6, 4))
    for prefix in ("train", "t10k"):
        (directory / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(COUNT)))
    return directory


@pytest.fixture(scope="module")
def digits(folder: Path) -> Images:
    return open_images(folder)


@pytest.fixture(scope="module")
def noise() -> Images:
    """Images of random pixels."""
    draws = np.random.default_rng(0)

    def images(n: int) -> InMemoryImages:
        return InMemoryImages(
            "noise", draws.integers(0, 256, (n, 8, 10, 3), np.uint8), np.arange(n)
        )

    return Images(images(40), images(7))


def values(loader: ImageLoader, images: np.ndarray) -> list[int]:
    pixels = (images[:, 0, 0, 0] * loader.std[0] + loader.mean[0]) * 255
    return [round(float(pixel)) for pixel in pixels]


def test_idx_array_round_trips(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)


def test_each_epoch_has_every_image_once_with_its_label_in_a_new_order(digits: Images) -> None:
    loader = ImageLoader(digits, batch_size=4, seed=3)
    batches = [loader.batch(step) for step in range(COUNT)]  # four epochs
    assert batches[0]["images"].shape == (4, 6, 4, 1)
    seen = [value for batch in batches for value in values(loader, batch["images"])]
    assert seen == [label for batch in batches for label in batch["labels"].tolist()]
    epochs = [seen[start : start + COUNT] for start in range(0, len(seen), COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
    process_count=st.sampled_from([1, 2, 4, 8]),
)
def test_row_is_a_function_of_seed_and_row_index(
    noise: Images, seed: int, step: int, process_count: int
) -> None:
    def loader(batch_size: int = 8, **given_: Any) -> ImageLoader:
        return ImageLoader(
            noise, batch_size=batch_size, seed=seed, augmentation=EVERYTHING, **given_
        )

    whole = loader().batch(step)
    for i in range(process_count):
        part = loader(process_index=i, process_count=process_count).batch(step)
        for name, array in part.items():
            np.testing.assert_array_equal(array, np.split(whole[name], process_count)[i])
    one = loader(batch_size=1).batch(8 * step + 3)
    np.testing.assert_array_equal(one["images"][0], whole["images"][3])


def test_pixels_have_mean_0_and_variance_1_over_the_training_images(noise: Images) -> None:
    for split in ("validation", "train"):
        loader = ImageLoader(noise, split=split, batch_size=40)
        images = next(loader.evaluation_batches())["images"][: loader.n_images]
        of = getattr(noise, split).read(np.arange(loader.n_images)) / 255
        pixels = noise.train.read(np.arange(40)) / 255
        expected = (of - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
        np.testing.assert_allclose(images, expected, atol=1e-5)
    given_ = ImageLoader(noise, batch_size=40, mean=[0.0, 0.0, 0.5], std=[1.0, 0.5, 0.25])
    images, plain = (next(x.evaluation_batches())["images"] for x in (given_, loader))
    np.testing.assert_allclose(
        images,
        (plain * loader.std + np.array(loader.mean) - [0, 0, 0.5]) / [1, 0.5, 0.25],
        atol=1e-5,
    )


def test_evaluation_has_every_image_once_in_batches_of_one_shape(digits: Images) -> None:
    loader = ImageLoader(digits, split="validation", batch_size=4, augmentation=EVERYTHING)
    batches = list(loader.evaluation_batches())
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert [batch["images"].shape for batch in batches] == [(4, 6, 4, 1)] * 3
    assert labels[labels >= 0].tolist() == list(range(COUNT))
    seen = [value for batch in batches for value in values(loader, batch["images"])]
    assert seen[:COUNT] == list(range(COUNT))
    assert all((b["images"] == b["images"][:, :1, :1]).all() for b in batches)
    assert sum((b["labels"] >= 0).sum() for b in loader.evaluation_batches(5)) == 5


def changed(images: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    return augment_images(images, augmentation, derive_key(1), np.arange(len(images)))


def test_crops_shift_an_image_and_pad_with_the_mean_color() -> None:
    image = np.arange(1, 31, dtype=np.float32).reshape(5, 6, 1)
    found = changed(np.tile(image, (3000, 1, 1, 1)), Augmentation(crop=2))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    corners = {padded[y : y + 5, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    counts = dict.fromkeys(corners.values(), 0)
    for each in found:
        counts[corners[each.tobytes()]] += 1
    assert min(counts.values()) > 70  # 120 each
    assert max(counts.values()) < 180


def test_half_of_the_images_are_flipped() -> None:
    image = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    found = changed(np.tile(image, (2000, 1, 1, 1)), Augmentation(flip=True))
    flipped = (found == image[:, ::-1]).all((1, 2, 3))
    assert (flipped | (found == image).all((1, 2, 3))).all()
    assert 0.45 < flipped.mean() < 0.55


def test_erasing_takes_a_rectangle_of_the_papers_size() -> None:
    images = np.ones((2000, 40, 60, 3), np.float32)
    found = changed(images, Augmentation(erase=0.25))
    assert (images == 1).all()  # the input is unchanged
    gone = (found == 0).all(-1)
    np.testing.assert_array_equal(gone, (found == 0).any(-1))
    rows, columns = gone.any(2), gone.any(1)
    np.testing.assert_array_equal(gone, rows[:, :, None] & columns[:, None, :])
    edges = np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(int))
    assert (edges != 0).sum(1).max() == 2  # one rectangle
    area = gone.mean((1, 2))
    erased = area > 0
    assert abs(erased.mean() - 0.25) < 0.03
    assert 0.015 < area[erased].min() < 0.05
    assert 0.35 < area.max() < 0.41
    ratio = rows.sum(1)[erased] / columns.sum(1)[erased]
    assert 0.25 < ratio.min() < 0.4
    assert gone[:, 0].any()
    assert gone[:, :, -1].any()


def test_augmentation_differs_in_each_epoch(noise: Images) -> None:
    loader = ImageLoader(noise, batch_size=40, augmentation=EVERYTHING)
    seen: dict[int, set[bytes]] = {}
    for epoch in range(3):
        batch = loader.batch(epoch)
        for label, image in zip(batch["labels"].tolist(), batch["images"], strict=True):
            seen.setdefault(label, set()).add(image.tobytes())
    assert len(seen) == 40
    assert sum(map(len, seen.values())) > 110


def test_fingerprint_covers_everything_that_determines_batches(
    digits: Images, noise: Images
) -> None:
    def fingerprint(images: Images = noise, **given_: Any) -> str:
        return ImageLoader(images, **{"batch_size": 4, **given_}).fingerprint

    pixels = noise.train.read(np.arange(40))
    pixels[39, 7, 9, 2] ^= 1
    one_bit = noise._replace(train=InMemoryImages("noise", pixels, noise.train.labels))
    measured: dict[str, Any] = {
        "mean": noise.train.statistics.mean,
        "std": noise.train.statistics.std,
    }
    labels = noise._replace(
        train=InMemoryImages("noise", noise.train.read(np.arange(40)), noise.train.labels[::-1])
    )
    prints = [
        fingerprint(),
        fingerprint(digits),
        fingerprint(one_bit, **measured),
        fingerprint(labels),
        fingerprint(split="validation"),
        fingerprint(seed=1),
        fingerprint(batch_size=5),
        fingerprint(mean=[0.5, 0.5, 0.5]),
        fingerprint(augmentation=EVERYTHING),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(**measured) == fingerprint(process_index=1, process_count=2) == prints[0]


def test_invalid_arguments_are_all_reported(noise: Images) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)mean: got \[0.5\].*3 numbers.*std: got \[0.0, 1.0, 1.0\].*batch_siz"
    ):
        ImageLoader(noise, batch_size=0, mean=[0.5], std=[0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"(?s)crop: got -1.*erase: got 2"):
        Augmentation(crop=-1, erase=2.0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-3], "got 8 bytes of values"),
        (lambda data: b"\1" + data[1:], "not in IDX format"),
        (lambda data: gzip.compress(data)[:-9], "truncated or damaged"),
        (lambda _: idx(np.arange(3)), "11 images and 3 labels"),
    ],
)
def test_damaged_file_is_rejected(
    folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(damage(labels.read_bytes()))
    with pytest.raises(ValueError, match=says):
        open_images(tmp_path)


def test_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("t10k*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no train-images-idx3-ubyte"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="MNIST's files are not resized"):
        open_images(folder, image_size=(28, 28))
