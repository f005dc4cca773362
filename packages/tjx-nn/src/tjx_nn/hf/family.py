"""The tables that say how a family's configuration and tensors correspond to ours.

Reading and writing use the same rows, so that no name stands in two places. A row applies where our
model has the parameter: one table serves models with and without biases, tied and untied.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tjx_nn.config import TransformerConfig

Json = Mapping[str, Any]

# No model has more of anything that is one number; loops over heads or layers end soon enough.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 4096

# transformers' names of what the MLP does; the first of several is written.
PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}


Shape = tuple[int, ...]


class TensorTransform(NamedTuple):
    """How parts of ours lie in one tensor of theirs.

    Attributes
    ----------
    read
        Their tensor -> our parts.
    write
        The way back.
    shape
        Shapes of our parts -> what `write` makes of them, without making it: what config.json asks
        for may be larger than any memory.
    """

    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]
    shape: Callable[[Sequence[Shape]], Shape]


SAME = TensorTransform(lambda x: [x], lambda parts: parts[0], lambda shapes: shapes[0])
# PyTorch's linear layers are [out, in].
TRANSPOSED = TensorTransform(
    lambda x: [x.T], lambda parts: parts[0].T, lambda shapes: shapes[0][::-1]
)


def side_by_side(count: int) -> TensorTransform:
    """Lay out parts of equal size beside each other along the last axis."""
    return TensorTransform(
        lambda x: np.split(x, count, axis=-1),
        lambda parts: np.concatenate(parts, -1),
        lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    )


def after_rows(count: int) -> TensorTransform:
    """Put so many rows that nobody reads before ours."""

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = parts
        return np.concatenate([np.zeros((count, *x.shape[1:]), x.dtype), x])

    return TensorTransform(
        lambda x: [x[count:]], write, lambda shapes: (shapes[0][0] + count, *shapes[0][1:])
    )


def leading_axes(count: int) -> TensorTransform:
    """Put so many axes of size 1 before ours."""
    return TensorTransform(
        lambda x: [x.reshape(x.shape[count:])],
        lambda parts: parts[0].reshape(*[1] * count, *parts[0].shape),
        lambda shapes: (*[1] * count, *shapes[0]),
    )


class TensorMapping(NamedTuple):
    """A tensor of theirs and the parameters of ours that it holds.

    Attributes
    ----------
    ours
        Paths of parameters, joined by dots; those of a stack have a leading axis "layers".
    theirs
        Name of the tensor, with "{layer}" where each layer has one.
    layout
        How one lies in the other.
    """

    ours: tuple[str, ...]
    theirs: str
    layout: TensorTransform = SAME


def tensor(ours: str, theirs: str, layout: TensorTransform = SAME) -> list[TensorMapping]:
    """Return the row of a single parameter."""
    return [TensorMapping((ours,), theirs, layout)]


def linear(ours: str, theirs: str) -> list[TensorMapping]:
    """Return the rows of a linear layer: kernel and bias."""
    return [
        TensorMapping((f"{ours}.kernel",), f"{theirs}.weight", TRANSPOSED),
        TensorMapping((f"{ours}.bias",), f"{theirs}.bias"),
    ]


def norm(ours: str, theirs: str) -> list[TensorMapping]:
    """Return the rows of a norm: scale and bias."""
    return [
        TensorMapping((f"{ours}.scale",), f"{theirs}.weight"),
        TensorMapping((f"{ours}.bias",), f"{theirs}.bias"),
    ]


class FieldMapping(NamedTuple):
    """A field of our configuration and the same of theirs.

    Attributes
    ----------
    ours
        Its name here.
    theirs
        Its names there, all with the same value.
    default
        What theirs is where config.json leaves it out.
    values
        Their values, with ours of the same meaning; None where they are the same.
    """

    ours: str
    theirs: tuple[str, ...]
    default: Any
    values: Mapping[str, str] | None = None


def same(ours: str, theirs: str, default: Any) -> FieldMapping:
    """Return a field whose values are the same here and there."""
    return FieldMapping(ours, (theirs,), default)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Everything that is to be known of a family of transformers' models.

    Attributes
    ----------
    model_type, architecture
        What its config.json calls it.
    config
        Our configuration's class.
    constants
        Fields of ours that are the same in all its models.
    fields
        Fields of ours that its config.json says.
    features
        Keys of its config.json that change what is computed in ways that we do not have, with the
        value that we do have, which is also what they are if left out.
    read_extra
        Fields of ours that take more than a name to find: config.json -> fields.
    write_extra
        The way back: our configuration -> entries of config.json.
    fills
        Fields of ours that are set before writing: the family always has the biases that they add,
        which are written as zeros, and never rows that only pad a table.
    rows
        Its tensors, of a configuration of ours.
    tied
        Tensors that older folders repeat, with those that they must equal; used where rows do not
        ask for them.
    ignored
        Patterns of names that are no weights of this model.
    renamed
        Patterns of older names and what they are now.
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
    rows: Callable[[Any], Sequence[TensorMapping]]
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamed: Sequence[tuple[str, str]] = ()
