"""Changes to images that leave what they show: more to learn from, as a function of (seed, turn).

Names of array axes: R images, H height, W width, C channels.
"""

import math

import numpy as np
import numpy.typing as npt

from tjx_data.images.augmentation import Augmentation
from tjx_data.loading.stateless_rng import draw, fractions

FloatImages = npt.NDArray[np.float32]

# Shares of an image's area, and the range of height / width: Zhong et al. 2017, section 4.2.
_ERASED_AREA = (0.02, 0.4)
_ERASED_SHAPE = (0.3, 1 / 0.3)


def augment_images(
    images: FloatImages, augmentation: Augmentation, key: np.uint64, turns: npt.NDArray[np.int64]
) -> FloatImages:
    """Return changed images.

    Parameters
    ----------
    images : float32 [R, H, W, C]
        Normalised: 0 is the mean colour.
    augmentation : Augmentation
        What may be done to them.
    key : uint64
        From `draws.key_of`.
    turns : int64 [R]
        What is done to an image depends on its turn alone.
    """
    words = draw(key, turns, 8)
    chance = fractions(words)
    images = images.copy()
    if augmentation.crop:
        corners = (words[:, :2] % np.uint64(2 * augmentation.crop + 1)).astype(np.int64)
        images = _cropped(images, augmentation.crop, corners)
    if augmentation.flip:
        flipped = chance[:, 2] < 0.5
        images[flipped] = images[flipped, :, ::-1]
    for row in np.flatnonzero(chance[:, 3] < augmentation.erase):
        _erase(images[row], *chance[row, 4:].tolist())
    return images


def _cropped(images: FloatImages, by: int, corners_R2: npt.NDArray[np.int64]) -> FloatImages:
    """Pad images with 0 on all sides, and cut them out again, each from a corner of its own."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
    found = np.empty_like(images)
    for row, (y, x) in enumerate(corners_R2.tolist()):
        found[row] = padded[row, y : y + height, x : x + width]
    return found


def _erase(image: FloatImages, area: float, shape: float, top: float, left: float) -> None:
    """Erase a rectangle that four numbers of [0, 1) choose."""
    height, width, _ = image.shape
    low, high = _ERASED_AREA
    pixels = (low + (high - low) * area) * height * width
    narrow, wide = map(math.log, _ERASED_SHAPE)
    ratio = math.exp(narrow + (wide - narrow) * shape)
    h = min(max(round(math.sqrt(pixels * ratio)), 1), height)
    w = min(max(round(math.sqrt(pixels / ratio)), 1), width)
    y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
    image[y : y + h, x : x + w] = 0
