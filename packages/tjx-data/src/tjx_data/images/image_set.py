"""Sets of images with labels, in whatever files they lie.

Names of array axes: N images of a set, R of them, H height, W width, C channels.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

# Of larger sets, so many bytes of pixels are looked at: images at even distances.
STATISTICS_BYTES = 1 << 28
_AT_ONCE = 256


class PixelStatistics(NamedTuple):
    """What was seen when a set was looked at.

    Attributes
    ----------
    mean, std : tuple of float
        Of each channel, over images and pixels, in the units of pixel / 255.
    sha256 : str
        Of labels and pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str


class ImageSet(ABC):
    """Images of one size, with labels.

    Parameters
    ----------
    name : str
        Where they lie, for errors.
    labels : int array [N]
        The class of each image, 0 or more.
    shape : tuple of int
        Height, width and channels.

    Raises
    ------
    ValueError
        If there is no image, or a label is negative.
    """

    def __init__(self, name: str, labels: npt.NDArray[Any], shape: tuple[int, int, int]) -> None:
        if not len(labels):
            raise ValueError(f"{name}: there are no images; give a set that holds some")
        if labels.min() < 0:
            raise ValueError(
                f"{name}: image {int(labels.argmin())} has the label {labels.min()}; labels are "
                "0, 1, ...: leave images without a label out"
            )
        self.name, self.labels, self.shape = name, labels.astype(np.int32), shape

    @abstractmethod
    def read(self, places: Places) -> Pixels:
        """Return some images, uint8 [R, H, W, C]."""

    @cached_property
    def statistics(self) -> PixelStatistics:
        """What the images are like; all of them in a small set, a fixed choice in a large one."""
        n_seen = min(len(self.labels), max(STATISTICS_BYTES // int(np.prod(self.shape)), 1))
        places = np.arange(n_seen, dtype=np.int64) * len(self.labels) // n_seen
        hasher = hashlib.sha256(f"{self.shape} {len(self.labels)}\n".encode())
        hasher.update(self.labels.tobytes())
        counts = np.zeros((self.shape[2], 256), np.int64)
        for start in range(0, n_seen, _AT_ONCE):
            pixels = self.read(places[start : start + _AT_ONCE])
            hasher.update(np.ascontiguousarray(pixels))
            for channel, found in enumerate(counts):
                found += np.bincount(pixels[..., channel].ravel(), minlength=256)
        # In whole numbers, so that the last bit is the same everywhere.
        moments = [[int((found * np.arange(256) ** k).sum()) for k in range(3)] for found in counts]
        means = tuple(total / (255 * n) for n, total, _ in moments)
        stds = tuple(
            math.sqrt((n * squares - total**2) / (255 * n) ** 2) for n, total, squares in moments
        )
        return PixelStatistics(means, stds, hasher.hexdigest())


class Images(NamedTuple):
    """The two splits of a set of images.

    Attributes
    ----------
    train, validation : ImageSet
        To train on, and held out: a set's validation images, or its test images where it has no
        others.
    """

    train: ImageSet
    validation: ImageSet

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.shape[:2]

    @property
    def channels(self) -> int:
        """1 or 3."""
        return self.train.shape[2]

    @property
    def n_classes(self) -> int:
        """One more than the highest label."""
        return int(max(self.train.labels.max(), self.validation.labels.max())) + 1
