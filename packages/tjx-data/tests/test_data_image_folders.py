"""Image sets of `datasets`: saved sets, folders and Parquet, and their errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_data import ImageLoader, open_images

datasets = pytest.importorskip("datasets", reason="the extra 'images' is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the extra 'images' is not installed")
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures(n: int, *, height: int = 6, width: int = 4, mode: str = "RGB") -> list[Any]:
    """Return images, of which image i has the value 10 i in every pixel."""
    return [PIL_Image.new("L", (width, height), 10 * i).convert(mode) for i in range(n)]


def saved(folder: Path, held_out: str = "test", **columns: list[Any]) -> str:
    features = {
        name: datasets.Image()
        if name.startswith("im")
        else datasets.ClassLabel(names=["cat", "dog"])
        if name == "kind"
        else datasets.Value("int64")
        for name in columns
    }
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    datasets.DatasetDict({"train": rows, held_out: rows}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_saved_set_round_trips(tmp_path: Path, mode: str, channels: int) -> None:
    source = saved(tmp_path / "set", image=pictures(5, mode=mode), label=[0, 1, 2, 1, 0])
    images = open_images(source)
    assert (images.image_size, images.channels, images.n_classes) == ((6, 4), channels, 3)
    loader = ImageLoader(images, split="validation", batch_size=5)
    batch = next(loader.evaluation_batches())
    assert batch["labels"].tolist() == [0, 1, 2, 1, 0]
    pixels = (batch["images"] * loader.std + np.array(loader.mean)) * 255
    expected = np.broadcast_to(10.0 * np.arange(5)[:, None, None, None], (5, 6, 4, channels))
    np.testing.assert_allclose(pixels, expected, atol=1e-3)


def test_validation_images_come_before_test_images(tmp_path: Path) -> None:
    rows = {
        split: datasets.Dataset.from_dict(
            {"image": pictures(n), "label": list(range(n))},
            datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )
        for split, n in (("train", 5), ("test", 4), ("validation", 3))
    }
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "set"))
    assert len(open_images(tmp_path / "set").validation.labels) == 3
    for split, dataset in rows.items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        dataset.to_parquet(str(tmp_path / "parquet" / f"{split}.parquet"))
    assert len(open_images(tmp_path / "parquet").validation.labels) == 3
    del rows["train"]
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="got the splits test, validation; expected train"):
        open_images(tmp_path / "half")


def test_folder_of_images_per_class_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i, picture in enumerate(pictures(3)):
                picture.save(tmp_path / "pets" / split / name / f"{i}.png")
    images = open_images(tmp_path / "pets")
    assert images.validation.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.train.read(np.array([2, 0]))[:, 0, 0, 0].tolist() == [20, 0]


def test_images_of_another_size_or_mode_are_named_or_resized(tmp_path: Path) -> None:
    mixed = [*pictures(2), *pictures(1, height=12, width=12)]
    source = saved(tmp_path / "sizes", image=mixed, label=[0, 1, 0])
    with pytest.raises(ValueError, match="train: got 12 x 12 pixels for image 2; expected 6 x 4"):
        ImageLoader(open_images(source), batch_size=1)
    images = open_images(source, image_size=(5, 4))
    assert images.train.read(np.arange(3)).shape == (3, 5, 4, 3)
    # Resizing keeps the aspect ratio: the left and right ends of a wide image are cropped.
    wide = PIL_Image.new("RGB", (40, 10), "black")
    wide.paste((255, 255, 255), (15, 0, 25, 10))
    source = saved(tmp_path / "wide", image=[wide], label=[0])
    assert (open_images(source, image_size=(5, 5)).train.read(np.arange(1)) > 200).all()

    coloured = [*pictures(1, mode="L"), *pictures(1, mode="RGB")]
    source = saved(tmp_path / "kinds", image=coloured, label=[0, 1])
    with pytest.raises(ValueError, match="got mode 'RGB' for image 1"):
        ImageLoader(open_images(source), batch_size=1)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "set", image=pictures(2), im2=pictures(2)[::-1], kind=[0, 1], label=[5, 6]
    )
    with pytest.raises(ValueError, match=r"image_column: got None; .*: image, im2, kind"):
        open_images(source)
    images = open_images(source, image_column="im2")
    assert images.train.labels.tolist() == [0, 1]
    assert images.train.read(np.arange(2))[:, 0, 0, 0].tolist() == [10, 0]
    images = open_images(source, image_column="image", label_column="label")
    assert images.train.labels.tolist() == [5, 6]
    with pytest.raises(ValueError, match="label_column: got 'lable'"):
        open_images(source, image_column="image", label_column="lable")


def test_invalid_sources_are_rejected(tmp_path: Path) -> None:
    source = saved(tmp_path / "set", image=pictures(2), label=[0, -1])
    with pytest.raises(ValueError, match="got label -1 for image 1"):
        open_images(source)
    with pytest.raises(ValueError, match="which is no folder; expected a folder, or a name on the"):
        open_images(tmp_path / "nowhere")
