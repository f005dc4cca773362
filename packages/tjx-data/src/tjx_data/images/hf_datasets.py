"""Image sets in the format of Hugging Face `datasets`: local folders and hub repositories."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.hub import load_rows
from tjx_data.images.image_set import Images, ImageSet, Indices, Pixels

_GRAY_MODES = ("1", "L")
_COLOR_MODES = ("P", "RGB", "RGBA", "CMYK", "YCbCr")


class DatasetImages(ImageSet):
    """One split of a `datasets` image set, decoded on access.

    Parameters
    ----------
    name : str
        Location of the images, for error messages.
    rows : datasets.Dataset
        Rows of the split.
    image_column : str
        Column of the images.
    labels : int [N]
        Class of each image.
    channels : int
        1 (grayscale) or 3 (RGB).
    image_size : tuple of int
        Height and width of the images that `read` returns.
    resize : bool
        Whether images of another size are scaled and center-cropped to it; else they are an error.
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

    def read(self, indices: Indices) -> Pixels:
        """Return decoded images by index, uint8 [R, H, W, C].

        Raises
        ------
        ValueError
            If an image is damaged, or has another size or mode than the set.
        """
        images = self._decode(indices)
        found = np.empty((len(indices), *self.shape), np.uint8)
        for i, (index, image) in enumerate(zip(indices.tolist(), images, strict=True)):
            found[i] = self._to_pixels(index, image)
        return found

    def _decode(self, indices: Indices) -> Any:
        from PIL import Image

        try:
            return self._rows[indices.tolist()][self._column]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.name}: one of the images {indices.min()} to {indices.max()} is damaged, no "
                f"image, or too large ({error}); leave it out"
            ) from error

    def _to_pixels(self, index: int, image: Any) -> Pixels:
        from PIL import Image, ImageOps

        height, width, channels = self.shape
        allowed = _GRAY_MODES if channels == 1 else (*_GRAY_MODES, *_COLOR_MODES)
        if image is None or image.mode not in allowed:
            found = "no image" if image is None else f"mode {image.mode!r}"
            raise ValueError(
                f"{self.name}: got {found} for image {index}; expected one of {', '.join(allowed)} "
                f"with {channels} channels"
            )
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            if not self._resize:
                raise ValueError(
                    f"{self.name}: got {image.height} x {image.width} pixels for image {index}; "
                    f"expected {height} x {width}; give image_size to resize all images"
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
    """Open an image set with the `datasets` library; arguments and errors as of `open_images`."""
    try:
        import datasets  # noqa: F401  imported before any file is read
        import PIL  # noqa: F401  as above: datasets imports it only to decode
    except ImportError as error:
        raise ValueError(
            f"{source}: images other than MNIST's files need the extra: pip install "
            "'tjx-data[images]'"
        ) from error
    train, validation = _load_splits(source)
    image_column = _find_column(source, train, "image", image_column)
    label_column = _find_column(source, train, "label", label_column)
    if not len(train):
        raise ValueError(f"{source} train: got no images; expected at least one")
    first = train[0][image_column]
    shape = image_size or (first.height, first.width)

    def images(split: str, rows: Any) -> DatasetImages:
        return DatasetImages(
            f"{source} {split}",
            rows,
            image_column=image_column,
            labels=_read_labels(f"{source} {split}", rows, label_column),
            channels=1 if first.mode in _GRAY_MODES else 3,
            image_size=shape,
            resize=image_size is not None,
        )

    return Images(images("train", train), images("validation", validation))


def _load_splits(source: str) -> tuple[Any, Any]:
    """Return the rows of the training split and of the validation or test split."""
    folder = Path(source).expanduser()
    if (folder / "dataset_dict.json").is_file():
        import datasets.load

        found: Any = datasets.load.load_from_disk(str(folder))
        held_out = next((name for name in ("validation", "test") if name in found), None)
        if "train" not in found or held_out is None:
            raise ValueError(
                f"{source}: got the splits {', '.join(found)}; expected train, and validation or "
                "test"
            )
        return found["train"], found[held_out]
    repo, _, revision = source.partition("@")
    if not folder.is_dir() and not revision:
        raise ValueError(
            f"path: got {source!r}, which is no folder; expected a folder, or a name on the "
            "Hugging Face hub with its commit, NAME@COMMIT"
        )

    def load(split: str) -> Any:
        return load_rows(
            source,
            str(folder) if folder.is_dir() else repo,
            None,
            split,
            revision=None if folder.is_dir() else revision,
            streamed=False,
            licence="see its page on the hub",
        )

    try:
        held_out = load("validation")
    except ValueError as error:
        if "Unknown split" not in f"{error} {error.__cause__}":
            raise
        held_out = load("test")
    return load("train"), held_out


def _find_column(source: str, rows: Any, content: str, given: str | None) -> str:
    """Return the column of images or labels: the given one, or the only candidate."""
    import datasets

    feature_type = datasets.Image if content == "image" else datasets.ClassLabel
    found: list[str] = [
        name for name, feature in rows.features.items() if isinstance(feature, feature_type)
    ]
    if not found and content in rows.features:
        found = [content]
    if given is None and len(found) == 1:
        return found[0]
    if given is None or given not in rows.features:
        raise ValueError(
            f"{content}_column: got {given!r}; expected a column of {source} with the {content}s: "
            f"{', '.join(rows.features)}"
        )
    return given


def _read_labels(name: str, rows: Any, column: str) -> npt.NDArray[np.int64]:
    labels = rows.with_format("numpy")[column][:]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: got {labels.dtype} {list(labels.shape)} in column {column!r}; expected one "
            "integer label for each image"
        )
    return np.asarray(labels, np.int64)
