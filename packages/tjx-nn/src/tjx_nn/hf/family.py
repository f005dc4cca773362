"""Mappings between transformers models and tjx models: config fields and tensors of a family.

Loading and saving use the same mappings. A tensor mapping applies if the tjx model has the
parameter, so that one table serves models with and without biases or a tied head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tjx_nn.config import TransformerConfig

Json = Mapping[str, Any]

# Upper bounds of sizes and depths in config.json, so that a malformed file cannot cause long loops.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 4096

# transformers names of MLP activations; saving uses the first of several.
PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}


Shape = tuple[int, ...]


class TensorTransform(NamedTuple):
    """Conversion between a transformers tensor and the tjx parameters that it contains.

    Attributes
    ----------
    read
        Converts the tensor to the parameters.
    write
        Converts the parameters to the tensor.
    shape
        Computes the shape of the tensor from those of the parameters, without allocating it: a
        malformed config.json can describe tensors larger than memory.
    """

    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]
    shape: Callable[[Sequence[Shape]], Shape]


IDENTITY = TensorTransform(lambda x: [x], lambda parts: parts[0], lambda shapes: shapes[0])
# PyTorch linear layers have kernels [out, in].
TRANSPOSED = TensorTransform(
    lambda x: [x.T], lambda parts: parts[0].T, lambda shapes: shapes[0][::-1]
)


def concatenated(count: int) -> TensorTransform:
    """Concatenate parameters of equal size along the last axis (fused QKV)."""
    return TensorTransform(
        lambda x: np.split(x, count, axis=-1),
        lambda parts: np.concatenate(parts, -1),
        lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    )


def offset_rows(count: int) -> TensorTransform:
    """Prepend unused rows to a table."""

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = parts
        return np.concatenate([np.zeros((count, *x.shape[1:]), x.dtype), x])

    return TensorTransform(
        lambda x: [x[count:]], write, lambda shapes: (shapes[0][0] + count, *shapes[0][1:])
    )


def leading_axes(count: int) -> TensorTransform:
    """Prepend axes of size 1."""
    return TensorTransform(
        lambda x: [x.reshape(x.shape[count:])],
        lambda parts: parts[0].reshape(*[1] * count, *parts[0].shape),
        lambda shapes: (*[1] * count, *shapes[0]),
    )


class TensorMapping(NamedTuple):
    """Mapping of a transformers tensor to the tjx parameters that it contains.

    Attributes
    ----------
    params
        Dotted paths of the parameters; stacked ones have a leading axis "layers".
    tensor
        Name of the tensor, with "{layer}" if each layer has one.
    transform
        Conversion between them.
    """

    params: tuple[str, ...]
    tensor: str
    transform: TensorTransform = IDENTITY


def tensor(param: str, tensor: str, transform: TensorTransform = IDENTITY) -> list[TensorMapping]:
    """Map a single parameter."""
    return [TensorMapping((param,), tensor, transform)]


def linear(param: str, tensor: str) -> list[TensorMapping]:
    """Map a linear layer: kernel and bias."""
    return [
        TensorMapping((f"{param}.kernel",), f"{tensor}.weight", TRANSPOSED),
        TensorMapping((f"{param}.bias",), f"{tensor}.bias"),
    ]


def norm(param: str, tensor: str) -> list[TensorMapping]:
    """Map a norm: scale and bias."""
    return [
        TensorMapping((f"{param}.scale",), f"{tensor}.weight"),
        TensorMapping((f"{param}.bias",), f"{tensor}.bias"),
    ]


class FieldMapping(NamedTuple):
    """Mapping of a tjx configuration field to keys of config.json.

    Attributes
    ----------
    field
        Name of the tjx field.
    keys
        Keys of config.json, which must all have the same value.
    default
        Value of a missing key.
    values
        tjx value of each transformers value; None if they are equal.
    """

    field: str
    keys: tuple[str, ...]
    default: Any
    values: Mapping[str, str] | None = None


def same(field: str, key: str, default: Any) -> FieldMapping:
    """Map a field whose values are equal in both configurations."""
    return FieldMapping(field, (key,), default)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Description of a family of transformers models.

    Attributes
    ----------
    model_type, architecture
        Identification of the family in config.json.
    config
        tjx configuration class.
    constants
        tjx fields with the same value for all models of the family.
    fields
        Mappings of tjx fields to keys of config.json.
    features
        Keys of config.json for features that tjx lacks, with the only supported value, which is
        also the default.
    read_extra
        Computes further tjx fields from config.json.
    write_extra
        Computes further entries of config.json from the tjx configuration.
    fills
        tjx fields to set before saving: the family always has biases (saved as zeros), and never
        padding rows of tables.
    tensors
        Returns the tensor mappings of a tjx configuration.
    tied
        Names of tensors that some checkpoints store twice, with the tensor that they must equal;
        used if no mapping contains them.
    ignored
        Patterns of tensor names that are not weights of the model.
    renamed
        Patterns of old tensor names and their replacements.
    """

    model_type: str
    architecture: str
    config: type[TransformerConfig]
    constants: Mapping[str, Any]
    fields: Sequence[FieldMapping]
    features: Mapping[str, Any] = field(default_factory=dict)
    read_extra: Callable[[Json], dict[str, Any]] = lambda _: {}
    write_extra: Callable[[Any], dict[str, Any]] = lambda _: {}
    fills: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Any], Sequence[TensorMapping]]
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamed: Sequence[tuple[str, str]] = ()
