"""MNIST's files: images of digits, and any others that are written in the same format.

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
from tjx_data.images.image_set import Images, ImageSet, Pixels, Places

_DTYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    9: np.dtype(np.int8),
    11: np.dtype(">i2"),
    12: np.dtype(">i4"),
}
_MOST_DIMENSIONS = 8


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read an array from a file in MNIST's IDX format, gzipped or not.

    LeCun et al., "The MNIST database of handwritten digits": two zero bytes, the type, the number
    of dimensions, the dimensions as big-endian int32, the values.

    Raises
    ------
    ValueError
        If there is no such file, or it is not whole, of another format, or unpacks to far more than
        images do.
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
        raise ValueError(f"{path}: the file is not whole ({error}); fetch it again") from error


def _read_array(path: Path, stream: Any, size: int, *, is_packed: bool) -> npt.NDArray[Any]:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES:
        raise ValueError(f"{path}: not in IDX format; give one of MNIST's files")
    dtype, dimensions = _DTYPES[head[2]], head[3]
    sizes = stream.read(4 * dimensions)
    if dimensions > _MOST_DIMENSIONS or len(sizes) != 4 * dimensions:
        raise ValueError(
            f"{path}: the header says {dimensions} dimensions; there are {len(sizes) // 4}, and "
            f"{_MOST_DIMENSIONS} at most can be read; fetch the file again"
        )
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    # By Python's numbers, which do not overflow; and before anything of that size is made.
    wanted = math.prod(shape) * dtype.itemsize
    start = 4 + 4 * dimensions
    if is_packed:
        check_unpacked(path, start + wanted, size)
    there = len(content := stream.read(wanted + 1)) if is_packed else size - start
    if there != wanted:
        more = " or more" if is_packed and there > wanted else ""
        raise ValueError(
            f"{path}: the header says {wanted} bytes of values and there are {there}{more}; "
            "fetch the file again"
        )
    content = content if is_packed else stream.read(wanted)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


class InMemoryImages(ImageSet):
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


def is_mnist_folder(directory: Path) -> bool:
    """Tell whether a folder holds one of MNIST's files at least."""
    return directory.is_dir() and any(directory.glob("*-idx[13]-ubyte*"))


def open_mnist(directory: Path) -> Images:
    """Read MNIST's four files; "validation" is t10k, the test images.

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
            raise ValueError(f"{name}: {images.dtype} {list(images.shape)} are no images of bytes")
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise ValueError(f"{name}: {labels.dtype} {list(labels.shape)} are no labels of bytes")
        return InMemoryImages(name, images[..., None], labels)

    return Images(read("train"), read("t10k"))


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{directory}: there is no {name} or {name}.gz; give the folder that holds MNIST's files"
    )
