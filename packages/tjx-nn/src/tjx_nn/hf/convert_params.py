"""Parameters: theirs as ours, and ours as theirs, by a family's table."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import Params, check_params, param_shapes
from tjx_nn.hf.family import ModelFamily, TensorMapping
from tjx_nn.hf.safetensors_folder import Shapes, Tensors
from tjx_nn.sub_configs import raise_problems

MOST_NAMED = 200


class _Slot(NamedTuple):
    """A tensor of theirs: its row, the layer where there is one for each, and its shape."""

    row: TensorMapping
    layer: int | None
    shape: tuple[int, ...]


def read_params(family: ModelFamily, config: TransformerConfig, tensors: Tensors) -> Params:
    """Return our parameters, nested dicts of float32 NumPy arrays.

    Raises
    ------
    ValueError
        Naming tensors that are missing, of another shape, or not a part of the model: all of them,
        up to `MOST_NAMED`.
    """
    ours = param_shapes(config)
    slots = _slots(family, config, ours)
    names = _names(family, tensors.shapes)
    copies = {name: of for name, of in family.tied.items() if name in names and name not in slots}
    problems = [
        f"tensor {name} is missing; its shape would be {list(slot.shape)}"
        for name, slot in slots.items()
        if name not in names
    ]
    problems += [
        f"tensor {name} is not a part of {family.architecture}; its shape is "
        f"{list(tensors.shapes[names[name]])}"
        for name in names
        if name not in slots and name not in copies
    ]
    problems += [
        f"tensor {name} has shape {list(shape)}; by config.json it is {list(slot.shape)}"
        for name, slot in slots.items()
        if name in names and (shape := tensors.shapes[names[name]]) != slot.shape
    ]
    problems += [
        f"tensor {name} differs from {of}, and by config.json they are one"
        for name, of in copies.items()
        if of in names and not np.array_equal(tensors[names[name]], tensors[names[of]])
    ]
    raise_problems(_cut(problems))
    params = {path: np.empty(shape, np.float32) for path, shape in ours.items()}
    for name, slot in slots.items():
        parts = slot.row.layout.read(tensors[names[name]])
        for path, part in zip(slot.row.ours, parts, strict=True):
            params[path][... if slot.layer is None else slot.layer] = part
    nested: Params = unflatten_dict(params, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    return nested


def write_params(
    family: ModelFamily, config: TransformerConfig, held: TransformerConfig, params: Params
) -> tuple[Shapes, Callable[[str], np.ndarray]]:
    """Return the shapes of their tensors by name, and a function that makes the tensor of a name.

    Parameters
    ----------
    family
        What to write.
    config
        Our model.
    held
        The same as the family holds it: with biases, which become zeros, and without rows of tables
        that only pad them.
    params
        Our parameters.

    Raises
    ------
    ValueError
        As `tjx_nn.functional.check_params`.
    """
    check_params(config, params)
    ours = param_shapes(config)
    given = {path: np.asarray(jax.device_get(leaf)) for path, leaf in _flat(params).items()}
    theirs = param_shapes(held)
    assert all(path.endswith("bias") for path in theirs.keys() - ours)
    whole = {
        path: given[path][: shape[0]] if path in given else np.zeros(shape, np.float32)
        for path, shape in theirs.items()
    }
    slots = _slots(family, held, theirs)

    def tensor(name: str) -> np.ndarray:
        row, layer, _ = slots[name]
        parts = [whole[path] if layer is None else whole[path][layer] for path in row.ours]
        return row.layout.write(parts)

    return {name: slot.shape for name, slot in slots.items()}, tensor


def _cut(problems: list[str]) -> list[str]:
    more = len(problems) - MOST_NAMED
    return problems if more <= 0 else [*problems[:MOST_NAMED], f"and {more} more"]


def _flat(params: Params) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(params, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    return flat


def _slots(
    family: ModelFamily, config: TransformerConfig, ours: Mapping[str, tuple[int, ...]]
) -> dict[str, _Slot]:
    """Return every tensor of the family's model, by name."""
    slots = {}
    held: set[str] = set()
    for row in family.rows(config):
        if row.ours[0] not in ours:
            continue
        assert not held & set(row.ours)
        held |= set(row.ours)
        shapes = [ours[path] for path in row.ours]
        stacked = "{layer}" in row.theirs
        shape = row.layout.shape([s[1:] if stacked else s for s in shapes])
        for layer in range(shapes[0][0]) if stacked else [None]:
            slots[row.theirs.format(layer=layer)] = _Slot(row, layer, shape)
    assert held == ours.keys(), held ^ ours.keys()
    return slots


def _names(family: ModelFamily, shapes: Shapes) -> dict[str, str]:
    """Return the tensors that matter: today's name and the name in the folder."""
    names = {}
    for found in shapes:
        name = found
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        if not any(re.search(pattern, name) for pattern in family.ignored):
            names[name] = found
    return names
