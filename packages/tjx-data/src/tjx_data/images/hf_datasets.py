"""Image sets in the format of Hugging Face `datasets`: folders, and names on the hub."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.hub import load_rows
from tjx_data.images.image_set import Images, ImageSet, Pixels, Places

EXTRA = "pip install 'tjx-data[images]'"
_GREY = ("1", "L")
_COLOURED = ("P", "RGB", "RGBA", "CMYK", "YCbCr")


class DatasetImages(ImageSet):
    """One split of an image set, whose images are decoded when they are read.

    Parameters
    ----------
    name : str
        Where it lies, for errors.
    rows : datasets.Dataset
        Its rows.
    image_column : str
        The column of the images.
    labels : int [N]
        Their classes.
    channels : int
        1, grey, or 3, red, green and blue.
    image_size : tuple of int
        Height and width that all images have.
    resize : bool
        Whether images of another size are scaled to it, and what stands out on two sides cut off.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        *,
        image_column: str,
        labels: npt.NDArray[Any],
        channels: int,
        image_size: tuple[int, int],
        resize: bool,
    ) -> None:
        super().__init__(name, labels, (*image_size, channels))
        self._rows, self._column, self._resize = rows, image_column, resize

    def read(self, places: Places) -> Pixels:
        """Return some images, uint8 [R, H, W, C].

        Raises
        ------
        ValueError
            If one has another size or other channels than the set.
        """
        images = self._decoded(places)
        found = np.empty((len(places), *self.shape), np.uint8)
        for i, (place, image) in enumerate(zip(places.tolist(), images, strict=True)):
            found[i] = self._pixels(place, image)
        return found

    def _decoded(self, places: Places) -> Any:
        from PIL import Image

        try:
            return self._rows[places.tolist()][self._column]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.name}: one of the images {places.min()} to {places.max()} is damaged, no "
                f"image, or larger than any ({error}); leave it out"
            ) from error

    def _pixels(self, place: int, image: Any) -> Pixels:
        from PIL import Image, ImageOps

        height, width, channels = self.shape
        allowed = _GREY if channels == 1 else (*_GREY, *_COLOURED)
        if image is None or image.mode not in allowed:
            kind = "missing" if image is None else f"of the kind {image.mode!r}"
            raise ValueError(
                f"{self.name}: image {place} is {kind}; with {channels} channels there may be "
                f"{', '.join(allowed)}"
            )
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            if not self._resize:
                raise ValueError(
                    f"{self.name}: image {place} has {image.height} x {image.width} pixels, others "
                    f"have {height} x {width}; give an image_size that all are scaled to"
                )
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, np.uint8).reshape(self.shape)


def open_dataset(
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """Open an image set; parameters and errors as of `open_images`."""
    try:
        import datasets  # noqa: F401  looked for before anything is read
        import PIL  # noqa: F401  as datasets: it decodes the images, and is missed late
    except ImportError as error:
        raise ValueError(
            f"{source}: images other than MNIST's files need the extra: {EXTRA}"
        ) from error
    train, validation = _load_splits(source)
    image_column = _column(source, train, "image", image_column)
    label_column = _column(source, train, "label", label_column)
    if not len(train):
        raise ValueError(f"{source} train: there are no images; give a set that holds some")
    first = train[0][image_column]
    shape = image_size or (first.height, first.width)

    def images(split: str, rows: Any) -> DatasetImages:
        return DatasetImages(
            f"{source} {split}",
            rows,
            image_column=image_column,
            labels=_labels(f"{source} {split}", rows, label_column),
            channels=1 if first.mode in _GREY else 3,
            image_size=shape,
            resize=image_size is not None,
        )

    return Images(images("train", train), images("validation", validation))


def _load_splits(source: str) -> tuple[Any, Any]:
    """Return the rows to train on and those held out."""
    folder = Path(source).expanduser()
    if (folder / "dataset_dict.json").is_file():
        import datasets.load

        found: Any = datasets.load.load_from_disk(str(folder))
        held_out = next((name for name in ("validation", "test") if name in found), None)
        if "train" not in found or held_out is None:
            raise ValueError(
                f"{source}: there are the splits {', '.join(found)}; a set needs train, and "
                "validation or test"
            )
        return found["train"], found[held_out]
    repo, _, revision = source.partition("@")
    if not folder.is_dir() and not revision:
        raise ValueError(
            f"{source}: there is no such folder; give one, or a name on the hub with the commit "
            "that is meant, NAME@COMMIT"
        )

    def load(split: str) -> Any:
        return load_rows(
            source,
            str(folder) if folder.is_dir() else repo,
            None,
            split,
            revision=None if folder.is_dir() else revision,
            streamed=False,
            licence="its page on the hub tells",
        )

    try:
        held_out = load("validation")
    except ValueError as error:
        if "Unknown split" not in f"{error} {error.__cause__}":
            raise
        held_out = load("test")
    return load("train"), held_out


def _column(source: str, rows: Any, what: str, given: str | None) -> str:
    """Return the column of images or labels: the one that was named, or the only one there is."""
    import datasets

    kind = datasets.Image if what == "image" else datasets.ClassLabel
    found: list[str] = [name for name, held in rows.features.items() if isinstance(held, kind)]
    if not found and what in rows.features:
        found = [what]
    if given is None and len(found) == 1:
        return found[0]
    if given is None or given not in rows.features:
        raise ValueError(
            f"{what}_column={given!r}: {source} has the columns {', '.join(rows.features)}; name "
            f"the one that holds the {what}s"
        )
    return given


def _labels(name: str, rows: Any, column: str) -> npt.NDArray[np.int64]:
    labels = rows.with_format("numpy")[column][:]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: column {column!r} holds {labels.dtype} {list(labels.shape)}; labels are "
            "whole numbers, one an image"
        )
    return np.asarray(labels, np.int64)
