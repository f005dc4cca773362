"""MNIST's files: images of digits, and any others that are written in the same format.

Names of array axes: N images, H height, W width, C channels.
"""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.images.sets import Images, ImageSet, Pixels, Places

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


class ArrayImages(ImageSet):
    """Images that lie in memory.

    Parameters
    ----------
    name : str
        Where they come from, for errors.
    images : uint8 [N, H, W, C]
        Their pixels.
    labels : int [N]
        Their classes.
    """

    def __init__(self, name: str, images: Pixels, labels: npt.NDArray[Any]) -> None:
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: {len(images)} images and {len(labels)} labels; there must be as many of "
                "both"
            )
        height, width, channels = images.shape[1:]
        super().__init__(name, labels, (height, width, channels))
        self._images = images

    def read(self, places: Places) -> Pixels:
        """Return some images, uint8 [R, H, W, C]."""
        return self._images[places]


def holds_mnist(directory: Path) -> bool:
    """Tell whether a folder holds one of MNIST's files at least."""
    return directory.is_dir() and any(directory.glob("*-idx[13]-ubyte*"))


def open_mnist(directory: Path) -> Images:
    """Read MNIST's four files; "validation" is t10k, the test images.

    Raises
    ------
    ValueError
        If a file is missing or damaged.
    """

    def read(split: str) -> ArrayImages:
        images = read_idx(_find(directory, f"{split}-images-idx3-ubyte"))
        labels = read_idx(_find(directory, f"{split}-labels-idx1-ubyte"))
        name = f"{directory} {split}"
        if images.dtype != np.uint8 or images.ndim != 3:
            raise ValueError(f"{name}: {images.dtype} {list(images.shape)} are no images of bytes")
        return ArrayImages(name, images[..., None], labels)

    return Images(read("train"), read("t10k"))


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{directory}: there is no {name} or {name}.gz; give the folder that holds MNIST's files"
    )
