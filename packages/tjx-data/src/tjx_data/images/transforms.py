"""Random crops, flips and erasing of images, as a function of (key, row index).

Names of array axes: R images, H height, W width, C channels.
"""

import math

import numpy as np
import numpy.typing as npt

from tjx_data.images.augmentation import Augmentation
from tjx_data.loading.samplers import random_words, to_unit_interval

FloatImages = npt.NDArray[np.float32]

# Ranges of area (as a share of the image) and of height / width: Zhong et al. 2017, section 4.2.
_ERASED_AREA = (0.02, 0.4)
_ERASED_ASPECT = (0.3, 1 / 0.3)


def augment_images(
    images: FloatImages,
    augmentation: Augmentation,
    key: np.uint64,
    row_indices: npt.NDArray[np.int64],
) -> FloatImages:
    """Return randomly cropped, flipped and erased copies of images, float32 [R, H, W, C].

    Parameters
    ----------
    images : float32 [R, H, W, C]
        Normalized images: 0 is the mean color.
    augmentation : Augmentation
        Selects and parameterizes the changes.
    key : uint64
        From `samplers.derive_key`.
    row_indices : int64 [R]
        The changes of an image depend on its row index only.
    """
    words = random_words(key, row_indices, 8)
    uniform = to_unit_interval(words)
    images = images.copy()
    if augmentation.crop:
        corners = (words[:, :2] % np.uint64(2 * augmentation.crop + 1)).astype(np.int64)
        images = _crop(images, augmentation.crop, corners)
    if augmentation.flip:
        flipped = uniform[:, 2] < 0.5
        images[flipped] = images[flipped, :, ::-1]
    for row in np.flatnonzero(uniform[:, 3] < augmentation.erase):
        _erase(images[row], *uniform[row, 4:].tolist())
    return images


def _crop(images: FloatImages, padding: int, corners_R2: npt.NDArray[np.int64]) -> FloatImages:
    """Zero-pad images on all sides and crop each to its size from its own corner."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    found = np.empty_like(images)
    for row, (y, x) in enumerate(corners_R2.tolist()):
        found[row] = padded[row, y : y + height, x : x + width]
    return found


def _erase(image: FloatImages, area: float, aspect: float, top: float, left: float) -> None:
    """Set a rectangle, chosen by four numbers in [0, 1), to 0 in place."""
    height, width, _ = image.shape
    low, high = _ERASED_AREA
    pixels = (low + (high - low) * area) * height * width
    narrow, wide = map(math.log, _ERASED_ASPECT)
    ratio = math.exp(narrow + (wide - narrow) * aspect)
    h = min(max(round(math.sqrt(pixels * ratio)), 1), height)
    w = min(max(round(math.sqrt(pixels / ratio)), 1), width)
    y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
    image[y : y + h, x : x + w] = 0
