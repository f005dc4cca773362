"""Image sizes, class names and the patch kernel of vision encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tjx_nn.hf.family import LARGEST_SIZE, ComputedFields, Json, TensorTransform
from tjx_nn.models.vit_config import ViTConfig


def image_sizes(patch_size: int, *, square: bool = False) -> ComputedFields:
    """Map image and patch size (one number or a pair each).

    Parameters
    ----------
    patch_size
        Default of the patch size; that of the image size is 224.
    square
        Whether the family has square images only.
    """

    def read(config_json: Json) -> dict[str, Any]:
        image, patch = (
            _pair(config_json, "image_size", 224),
            _pair(config_json, "patch_size", patch_size),
        )
        if patch[0] != patch[1]:
            raise ValueError(f"patch_size: got {list(patch)}; expected a square patch")
        if square and image[0] != image[1]:
            raise ValueError(f"image_size: got {list(image)}; expected a square image")
        side = max(1, patch[0])  # the configuration refuses 0
        crop = any(pixels % side for pixels in image)
        return {"image_size": image, "patch_size": patch[0], "crop": crop}

    def write(config: ViTConfig) -> dict[str, Any]:
        height, width = config.height_width
        size = height if height == width else [height, width]
        return {"image_size": size, "patch_size": config.patch_size}

    return ComputedFields(keys=["image_size", "patch_size"], read=read, write=write)


def _pair(config_json: Json, key: str, default: int) -> tuple[int, int]:
    size = config_json.get(key, default)
    match [size, size] if isinstance(size, int) else size:
        case [int(first), int(second)] if max(first, second) <= LARGEST_SIZE:
            return first, second
    raise ValueError(f"{key}: got {size!r}; expected one or two integers up to {LARGEST_SIZE}")


def _read_classes(config_json: Json) -> dict[str, Any]:
    names = config_json.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label: got {str(names)[:60]}; expected an object of class names")
    return {"n_classes": len(names) or config_json.get("num_labels", 2)}


def _write_classes(config: ViTConfig) -> dict[str, Any]:
    names = [f"LABEL_{index}" for index in range(config.n_classes or 0)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


# The number of classes, from their names.
CLASSES = ComputedFields(keys=["id2label", "num_labels"], read=_read_classes, write=_write_classes)


def patch_kernel(config: ViTConfig) -> TensorTransform:
    """Convert the patch kernel to that of a convolution, [out, channel, row, column]."""
    sides = (config.patch_size, config.patch_size, config.channels)

    def read(x: np.ndarray) -> list[np.ndarray]:
        return [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])]

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = parts
        return x.reshape(*sides, x.shape[1]).transpose(3, 2, 0, 1)

    side, _, channels = sides
    return TensorTransform(read, write, lambda shapes: (shapes[0][1], channels, side, side))
