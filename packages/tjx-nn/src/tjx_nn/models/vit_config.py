"""Configuration and presets of ViT; importing it needs only the standard library."""

from dataclasses import dataclass, field
from typing import Literal

from tjx_nn.config import Activation, TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.sub_configs import check_choices, check_sizes

Pool = Literal["class", "mean"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig(TransformerConfig, Presets):
    """Configuration of a vision transformer; the defaults are ViT-B/16.

    Attributes
    ----------
    family
        Name of the model family.
    image_size
        Height and width in pixels, or one number for both.
    patch_size
        Side of a patch in pixels; divides height and width.
    channels
        Number of channels of a pixel.
    n_classes
        Number of image classes.
    pool
        Input of the head: "class", a class token before the patches, or "mean", the average of the
        patches.
    max_seq_len
        Number of patches and class token; computed, not an argument.

    Raises
    ------
    ValueError
        With a line for each invalid field.

    Examples
    --------
    >>> config = ViTConfig(image_size=(32, 48), patch_size=8)
    >>> config.patches, config.max_seq_len
    ((4, 6), 25)
    """

    family: Literal["vit"] = "vit"
    image_size: tuple[int, int] | int = 224
    patch_size: int = 16
    channels: int = 3
    n_classes: int = 1000
    pool: Pool = "class"
    max_seq_len: int = field(init=False, default=1)
    norm_eps: float = 1e-6
    activation: Activation = "gelu_erf"

    def __post_init__(self) -> None:
        """Validate the fields and compute `max_seq_len`."""
        super().__post_init__()
        rows, columns = self.patches
        count = rows * columns + (self.pool == "class")
        object.__setattr__(self, "max_seq_len", count)  # the dataclass is frozen

    def validate(self) -> list[str]:
        """Return the errors of this configuration, a line each."""
        problems = check_sizes(self, "patch_size", "channels", "n_classes")
        problems += check_choices(self, pool=Pool)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            problems.append(
                f"image_size: got {self.image_size!r}; expected height and width in pixels, or one "
                "number for both"
            )
        elif not problems and any(side % self.patch_size for side in sides):
            near = tuple(max(1, round(s / self.patch_size)) * self.patch_size for s in sides)
            problems.append(
                f"image_size: got {sides} with patch_size {self.patch_size}; expected multiples of "
                f"patch_size; the nearest image_size is {near}"
            )
        return [*problems, *super().validate()]

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width in pixels, `image_size` resolved."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size


# Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", table 1; vit_mnist is a small model
# for MNIST.
ViTConfig.PRESETS = {
    "vit_base": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "vit_large": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "vit_mnist": {
        "image_size": (28, 28),
        "patch_size": 7,
        "channels": 1,
        "n_classes": 10,
        "n_layer": 4,
        "n_head": 4,
        "d_model": 64,
    },
}
