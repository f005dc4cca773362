"""Image sets with labels, independent of their file format.

Names of array axes: N images of a set, R selected images, H height, W width, C channels.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

STATISTICS_BYTES = 1 << 28
"""Statistics of larger sets use this many bytes of pixels, from evenly spaced images."""
_READ_SIZE = 256  # images read at a time


class PixelStatistics(NamedTuple):
    """Statistics and hash of a set's pixels.

    Attributes
    ----------
    mean, std : tuple of float
        Per channel, over images and pixels, in units of pixel / 255.
    sha256 : str
        Hash of labels and pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str


class ImageSet(ABC):
    """Base class of one split: labeled images of one size.

    Parameters
    ----------
    name : str
        Location of the images, for error messages.
    labels : int array [N]
        Class of each image, 0 or more.
    shape : tuple of int
        Height, width and channels.

    Raises
    ------
    ValueError
        If there is no image, or a label is negative.
    """

    def __init__(self, name: str, labels: npt.NDArray[Any], shape: tuple[int, int, int]) -> None:
        if not len(labels):
            raise ValueError(f"{name}: got no images; expected at least one")
        if labels.min() < 0:
            raise ValueError(
                f"{name}: got label {labels.min()} for image {int(labels.argmin())}; expected 0, "
                "1, ...; leave out images without a label"
            )
        self.name, self.labels, self.shape = name, labels.astype(np.int32), shape

    @abstractmethod
    def read(self, indices: Indices) -> Pixels:
        """Return images by index, uint8 [R, H, W, C]."""

    @cached_property
    def statistics(self) -> PixelStatistics:
        """Pixel statistics of all images, or of a fixed subset of a large set."""
        n_images = min(len(self.labels), max(STATISTICS_BYTES // int(np.prod(self.shape)), 1))
        indices = np.arange(n_images, dtype=np.int64) * len(self.labels) // n_images
        hasher = hashlib.sha256(f"{self.shape} {len(self.labels)}\n".encode())
        hasher.update(self.labels.tobytes())
        counts = np.zeros((self.shape[2], 256), np.int64)
        for start in range(0, n_images, _READ_SIZE):
            pixels = self.read(indices[start : start + _READ_SIZE])
            hasher.update(np.ascontiguousarray(pixels))
            for channel, found in enumerate(counts):
                found += np.bincount(pixels[..., channel].ravel(), minlength=256)
        # Integer sums give the same bits on every machine.
        moments = [[int((found * np.arange(256) ** k).sum()) for k in range(3)] for found in counts]
        means = tuple(total / (255 * n) for n, total, _ in moments)
        stds = tuple(
            math.sqrt((n * squares - total**2) / (255 * n) ** 2) for n, total, squares in moments
        )
        return PixelStatistics(means, stds, hasher.hexdigest())


class Images(NamedTuple):
    """Training and validation split of an image set.

    Attributes
    ----------
    train : ImageSet
        Training images.
    validation : ImageSet
        Validation images, or test images if the set has no validation split.
    """

    train: ImageSet
    validation: ImageSet

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.shape[:2]

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return self.train.shape[2]

    @property
    def n_classes(self) -> int:
        """One more than the largest label."""
        return int(max(self.train.labels.max(), self.validation.labels.max())) + 1
