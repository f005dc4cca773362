"""Position tables of vision transformers for images of another size, by bicubic interpolation.

Axes in names: R rows of patches, C columns of patches, D d_model.
"""

import dataclasses

import numpy as np

from tjx_nn.binding import Params
from tjx_nn.models.vit_config import ViTConfig


def resize_positions(
    config: ViTConfig, params: Params, image_size: tuple[int, int] | int, *, antialias: bool = False
) -> tuple[ViTConfig, Params]:
    """Interpolate the positions of a ViT, so that it reads images of another size.

    As transformers does at every call for images of another size: DINOv2 and SigLIP without
    antialiasing, DINOv2 with registers with it.

    Parameters
    ----------
    config, params
        The model, with learned positions.
    image_size
        Height and width in pixels, or one number for both.
    antialias
        Whether the filter widens when the table shrinks, as in Pillow; its parameter a is -0.5,
        and -0.75 without antialiasing (Keys 1981, "Cubic Convolution Interpolation").

    Returns
    -------
    config : ViTConfig
        The configuration with the other image size.
    params : dict
        The parameters, of which the position table is a new NumPy array, float32.

    Raises
    ------
    ValueError
        If the model has no learned positions, or its patches do not fit the image size.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import ViTConfig, init, resize_positions
    >>> config = ViTConfig.preset("vit_mnist")
    >>> config, params = resize_positions(config, init(config, jax.random.key(0)), 56)
    >>> params["wpe"]["embedding"].shape
    (65, 64)
    """
    if config.positions != "learned":
        raise ValueError(
            f"config.positions: got {config.positions!r}; expected 'learned', the only positions "
            "that depend on the image size; set config.image_size instead"
        )
    resized = dataclasses.replace(config, image_size=image_size)
    table = np.asarray(params["wpe"]["embedding"], np.float64)
    first = int(config.has_class_token)
    grid_RCD = table[first:].reshape(*config.patches, -1)
    rows, columns = (
        _bicubic(new, old, antialias=antialias)
        for new, old in zip(resized.patches, config.patches, strict=True)
    )
    grid_RCD = np.einsum("ri,cj,ijd->rcd", rows, columns, grid_RCD, optimize=True)
    patches = grid_RCD.reshape(-1, table.shape[1])
    embedding = np.concatenate([table[:first], patches]).astype(np.float32)
    return resized, {**params, "wpe": {"embedding": embedding}}


def _bicubic(new: int, old: int, *, antialias: bool) -> np.ndarray:
    """Return the weights of `old` points, whose outermost ones repeat, for `new` ones."""
    centers = (np.arange(new)[:, None] + 0.5) * (old / new) - 0.5
    if antialias:
        weights = _keys((np.arange(old)[None] - centers) / max(old / new, 1.0), a=-0.5)
        normalized: np.ndarray = weights / weights.sum(1, keepdims=True)
        return normalized
    points = np.floor(centers).astype(int) + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    nearest = np.clip(points, 0, old - 1)
    np.add.at(matrix, (np.arange(new)[:, None], nearest), _keys(points - centers, a=-0.75))
    return matrix


def _keys(x: np.ndarray, *, a: float) -> np.ndarray:
    """Compute the cubic convolution kernel, which is 0 at distances of 2 and more."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
