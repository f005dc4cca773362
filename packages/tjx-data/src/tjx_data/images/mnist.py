"""MNIST and other image sets in the IDX file format.

Names of array axes: N images, H height, W width, C channels.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.bounded_io import check_unpacked
from tjx_data.images.image_set import Images, ImageSet, Indices, Pixels

_DTYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    9: np.dtype(np.int8),
    11: np.dtype(">i2"),
    12: np.dtype(">i4"),
}
_MAX_DIMENSIONS = 8


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read an array from an IDX file, gzipped or not.

    The format of LeCun et al., "The MNIST database of handwritten digits": two zero bytes, the
    type, the number of dimensions, the dimensions as big-endian int32, the values.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    uint8, int8, int16 or int32 array
        In native byte order.

    Raises
    ------
    ValueError
        If the file is missing, truncated, of another format, or unpacks to more than
        `check_unpacked` allows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no regular file; give one of MNIST's files")
    size = path.stat().st_size
    with path.open("rb") as stream:
        is_packed = stream.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as stream:
            return _read_array(path, stream, size, is_packed=is_packed)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download it again") from error


def _read_array(path: Path, stream: Any, size: int, *, is_packed: bool) -> npt.NDArray[Any]:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES:
        raise ValueError(f"{path}: not in IDX format; give one of MNIST's files")
    dtype, n_dimensions = _DTYPES[head[2]], head[3]
    shape_bytes = stream.read(4 * n_dimensions)
    if n_dimensions > _MAX_DIMENSIONS or len(shape_bytes) != 4 * n_dimensions:
        raise ValueError(
            f"{path}: got {len(shape_bytes) // 4} of {n_dimensions} dimensions; expected all, at "
            f"most {_MAX_DIMENSIONS}; download it again"
        )
    shape = tuple(np.frombuffer(shape_bytes, ">u4").tolist())
    # Python integers do not overflow. Check the size before allocating.
    expected = math.prod(shape) * dtype.itemsize
    start = 4 + 4 * n_dimensions
    if is_packed:
        check_unpacked(path, start + expected, size)
    found = len(content := stream.read(expected + 1)) if is_packed else size - start
    if found != expected:
        more = " or more" if is_packed and found > expected else ""
        raise ValueError(
            f"{path}: got {found}{more} bytes of values; expected {expected} by its header; "
            "download it again"
        )
    content = content if is_packed else stream.read(expected)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


class InMemoryImages(ImageSet):
    """Images in memory.

    Parameters
    ----------
    name : str
        Location of the images, for error messages.
    images : uint8 [N, H, W, C]
        Pixels.
    labels : int [N]
        Class of each image.
    """

    def __init__(self, name: str, images: Pixels, labels: npt.NDArray[Any]) -> None:
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: got {len(images)} images and {len(labels)} labels; expected equal numbers"
            )
        height, width, channels = images.shape[1:]
        super().__init__(name, labels, (height, width, channels))
        self._images = images

    def read(self, indices: Indices) -> Pixels:
        """Return images by index, uint8 [R, H, W, C]."""
        return self._images[indices]


def is_mnist_folder(directory: Path) -> bool:
    """Return whether a folder holds at least one of MNIST's files."""
    return directory.is_dir() and any(directory.glob("*-idx[13]-ubyte*"))


def open_mnist(directory: Path) -> Images:
    """Read MNIST's four files; the validation split is t10k, the test images.

    Raises
    ------
    ValueError
        If a file is missing or damaged.
    """

    def read(split: str) -> InMemoryImages:
        images = read_idx(_find(directory, f"{split}-images-idx3-ubyte"))
        labels = read_idx(_find(directory, f"{split}-labels-idx1-ubyte"))
        name = f"{directory} {split}"
        if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape[1:]:
            raise ValueError(
                f"{name}: got images of {images.dtype} {list(images.shape)}; expected uint8 "
                "[images, height, width]"
            )
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise ValueError(
                f"{name}: got labels of {labels.dtype} {list(labels.shape)}; expected uint8 "
                "[images]"
            )
        return InMemoryImages(name, images[..., None], labels)

    return Images(read("train"), read("t10k"))


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{directory}: has no {name} or {name}.gz; give the folder that holds MNIST's files"
    )
