"""Configuration and presets of ViT; importing it needs only the standard library."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from tjx_nn.config import Activation, TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.problems import Problem
from tjx_nn.sub_configs import LatentConfig, SparseConfig, check_choices, check_sizes

Pool = Literal["class", "mean", "class_mean", "map"]


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
        Side of a patch in pixels; divides height and width, except with `crop`.
    crop
        Whether the model ignores pixels below and to the right of the last whole patch, as a
        convolution without padding (SigLIP So400m).
    channels
        Number of channels of a pixel.
    n_classes
        Number of image classes; None is a model without a head, for `ViT.features` and
        `ViT.pooled`.
    pool
        Input of the head: "class", a class token before the patches; "mean", the average of the
        patches; "class_mean", both, concatenated (DINOv2); or "map", attention of a trainable probe
        to the patches, then an MLP (Zhai et al. 2022, "Scaling Vision Transformers"; SigLIP).
    n_registers
        Number of register tokens between class token and patches, which have no position and no
        output (Darcet et al. 2024, "Vision Transformers Need Registers").
    mask_token
        Whether the model has a trainable token that replaces masked patches (Bao et al. 2022,
        "BEiT"; DINOv2).
    max_seq_len
        Number of patches, registers and class token; computed, not an argument.

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
    crop: bool = False
    channels: int = 3
    n_classes: int | None = 1000
    pool: Pool = "class"
    n_registers: int = 0
    mask_token: bool = False
    max_seq_len: int = field(init=False, default=1)
    norm_eps: float = 1e-6
    activation: Activation = "gelu_erf"

    def __post_init__(self) -> None:
        """Validate the fields and compute `max_seq_len`."""
        super().__post_init__()
        rows, columns = self.patches
        count = self.n_prefix + rows * columns
        object.__setattr__(self, "max_seq_len", count)  # the dataclass is frozen

    def validate(self) -> list[Problem]:
        """Return the errors of this configuration."""
        problems = check_sizes(self, "patch_size", "channels", "n_classes")
        problems += check_sizes(self, "n_registers", at_least=0)
        problems += check_choices(self, pool=Pool)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            problems.append(
                Problem(
                    "image_size",
                    f"got {self.image_size!r}; expected height and width in pixels, or one "
                    "number for both",
                )
            )
        elif not problems and self.crop and min(sides) < self.patch_size:
            problems.append(
                Problem(
                    "patch_size",
                    f"got {self.patch_size} with image_size {sides}; expected at most {min(sides)}",
                    ("image_size",),
                )
            )
        elif not problems and not self.crop and any(side % self.patch_size for side in sides):
            near = tuple(max(1, round(s / self.patch_size)) * self.patch_size for s in sides)
            problems.append(
                Problem(
                    "image_size",
                    f"got {sides} with patch_size {self.patch_size}; expected multiples of "
                    f"patch_size, or crop True; the nearest image_size is {near}",
                    ("patch_size",),
                )
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

    @property
    def has_class_token(self) -> bool:
        """Whether a class token precedes the patches."""
        return self.pool in ("class", "class_mean")

    @property
    def n_prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return self.has_class_token + self.n_registers

    @property
    def pooled_dim(self) -> int:
        """Features of a pooled image, the input of the head."""
        return 2 * self.d_model if self.pool == "class_mean" else self.d_model

    @property
    def probe(self) -> "ViTConfig":
        """Configuration of attention pooling: multi-head attention without positions."""
        return dataclasses.replace(
            self, positions="none", nope_every=None, latent=LatentConfig(), sparse=SparseConfig()
        )


# Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", table 1; vit_mnist is a small model
# for MNIST. Oquab et al. 2023, "DINOv2", table 16, for images of 518 pixels; Zhai et al. 2023,
# "Sigmoid Loss for Language Image Pre-Training".
_DINOV2 = {
    "image_size": 518,
    "patch_size": 14,
    "layer_scale": 1.0,
    "mask_token": True,
    "n_classes": None,
}
_SIGLIP = {"pool": "map", "activation": "gelu_tanh", "n_classes": None}
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
    "dinov2_base": _DINOV2,
    "dinov2_giant": {
        **_DINOV2,
        "n_layer": 40,
        "n_head": 24,
        "d_model": 1536,
        "activation": "swiglu",
        "d_ff": 4096,
    },
    "siglip_base": _SIGLIP,
    "siglip_so400m": {
        **_SIGLIP,
        "image_size": 384,
        "patch_size": 14,
        "crop": True,
        "n_layer": 27,
        "n_head": 16,
        "d_model": 1152,
        "d_ff": 4304,
    },
}
