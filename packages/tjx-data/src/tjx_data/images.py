"""Images with labels: MNIST's files, and batches of them.

Names of array axes: B images, H height, W width, C channels.
"""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tjx_data.epochs import EpochOrder
from tjx_data.loader import IGNORED_LABEL, check_numbers

_PREFIX = {"train": "train", "validation": "t10k"}
_DTYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    9: np.dtype(np.int8),
    11: np.dtype(">i2"),
    12: np.dtype(">i4"),
}


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read an array from a file in MNIST's IDX format, gzipped or not.

    LeCun et al., "The MNIST database of handwritten digits": two zero bytes, the type, the number
    of dimensions, the dimensions as big-endian int32, the values.

    Raises
    ------
    ValueError
        If the file is not whole, or is no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: the file is not whole ({error}); fetch it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise ValueError(f"{path}: not in IDX format; give one of MNIST's files")
    dtype, dimensions, start = _DTYPES[data[2]], data[3], 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">i4"))
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(shape) != dimensions or len(data) - start != wanted:
        raise ValueError(
            f"{path}: the header says {wanted} bytes of values and there are {len(data) - start}; "
            "fetch the file again"
        )
    return np.frombuffer(data[start:], dtype).reshape(shape).astype(dtype.newbyteorder("="))


class ImageLoader:
    """Batches of images from a folder with MNIST's four files.

    Each epoch visits the images in an order of its own, drawn from (seed, epoch), and batches go on
    from one epoch into the next. There is no state: ``batch(step)`` depends on the arguments alone.

    Parameters
    ----------
    directory : str or Path
        Folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each
        gzipped (.gz) or not.
    split : {"train", "validation"}
        Which part; "validation" is t10k, the test images.
    batch_size : int
        Images in a batch over all processes.
    seed : int
        Decides the order, with the epoch; 0 to 2**64 - 1.
    process_index, process_count : int
        This process reads the rows process_index, process_index + process_count, ... of each
        batch.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or a number is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        split: Literal["train", "validation"] = "train",
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_numbers(batch_size, seed, process_index, process_count)
        self.directory, self.split = Path(directory), split
        self._images = read_idx(_find(self.directory, f"{_PREFIX[split]}-images-idx3-ubyte"))
        self._labels = read_idx(_find(self.directory, f"{_PREFIX[split]}-labels-idx1-ubyte"))
        if len(self._images) != len(self._labels) or not len(self._labels):
            raise ValueError(
                f"{directory}: {len(self._images)} images and {len(self._labels)} labels in "
                f"{split}; there must be as many of both, and one at least"
            )
        # Over the training images the pixels then have about mean 0 and variance 1.
        self._mean, self._std = 0.1307, 0.3081
        self.batch_size, self.seed = batch_size, seed
        self._rows = np.arange(process_index, batch_size, process_count)
        self._order = EpochOrder(len(self._labels), seed)

    @property
    def n_images(self) -> int:
        """Images in the split."""
        return len(self._labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._images.shape[1], self._images.shape[2]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what ``batch(step)`` is."""
        parts = [self._images.tobytes(), self._labels.tobytes()]
        parts += [f"{self.split} {self.batch_size} {self.seed}".encode()]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def batch(self, step: int) -> dict[str, npt.NDArray[Any]]:
        """Return this process's rows of the batch of a step.

        Returns
        -------
        dict
            ``images`` float32 [batch_size / process_count, height, width, 1], normalised, and
            ``labels`` int32 [batch_size / process_count].
        """
        return self._gather(self._order.places(step * self.batch_size, self._rows))

    def evaluation_batches(
        self, max_images: int | None = None
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Yield every image once, in batches of one shape; labels beyond the end are -100."""
        count = self.n_images if max_images is None else min(max_images, self.n_images)
        for first in range(0, count, self.batch_size):
            places = first + self._rows
            batch = self._gather(np.minimum(places, count - 1))
            batch["labels"][places >= count] = IGNORED_LABEL
            yield batch

    def _gather(self, places: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        pixels = self._images[places].astype(np.float32)[..., None] / 255
        images = ((pixels - self._mean) / self._std).astype(np.float32)
        return {"images": images, "labels": self._labels[places].astype(np.int32)}


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{directory}: there is no {name} or {name}.gz; give the folder that holds MNIST's files"
    )
