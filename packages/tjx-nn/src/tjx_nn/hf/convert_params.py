"""Conversion of parameters between transformers tensors and tjx, by the mappings of a family."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tjx_nn.binding import Params, check_params, param_shapes
from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import ModelFamily, TensorMapping
from tjx_nn.hf.int_groups import IntGroups, int4_kernel
from tjx_nn.hf.safetensors_folder import Shapes, Tensors
from tjx_nn.problems import raise_problems
from tjx_nn.quantization.int4 import Int4Kernel
from tjx_nn.quantization.linear_layers import block_kernels

# Limit of errors in a message.
MAX_PROBLEMS = 200


class Slot(NamedTuple):
    """Transformers tensor: its mapping, its place in stacked parameters (layer and expert)."""

    mapping: TensorMapping
    place: tuple[int, ...]
    shape: tuple[int, ...]


def read_params(
    family: ModelFamily,
    config: TransformerConfig,
    tensors: Tensors,
    put: Callable[[str, np.ndarray], Any] = lambda _, x: x,
    *,
    int_groups: IntGroups | None = None,
) -> Params:
    """Convert transformers tensors to tjx parameters, nested dicts of float32 arrays.

    Parameters
    ----------
    family, config
        The family and the configuration of the model.
    tensors
        The checkpoint; each tensor is read once.
    put
        From the dotted path of a parameter and its value to the result; the value is released
        before the parameters of the next tensors are read.
    int_groups
        Quantization of the matrices to keep as int4 kernels: those of linear layers in blocks that
        are quantized in all layers. None dequantizes them.

    Raises
    ------
    ValueError
        With a line for each tensor that is missing, unexpected or has a wrong shape, up to
        `MAX_PROBLEMS`; or if matrices to keep have no form as int4 kernels.
    """
    own = param_shapes(config)
    slots = tensor_slots(family, config, own)
    names = check_tensors(family, tensors, slots)
    kernels = block_kernels(config)
    params: dict[str, Any] = {}
    # The tensors of a mapping are those of all layers and experts; they follow each other.
    for mapping, places in itertools.groupby(slots.items(), lambda item: item[1].mapping):
        stored = {slot.place: names[name] for name, slot in places}
        read = partial(_read_mapping, mapping, stored, own=own)
        parts: list[Any] = read(tensors.__getitem__)
        quantized = tensors.int_groups.issuperset(stored.values())
        if int_groups is not None and quantized and kernels.issuperset(mapping.params):
            fields = [read(partial(_field, tensors, i)) for i in range(3)]
            parts = _int4_kernels(int_groups, fields, parts)
        while parts:
            path = mapping.params[len(parts) - 1]
            params[path] = put(path, parts.pop())
    nested: Params = unflatten_dict(params, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    return nested


def _read_mapping(
    mapping: TensorMapping,
    stored: Mapping[tuple[int, ...], str],
    read: Callable[[str], np.ndarray],
    own: Mapping[str, tuple[int, ...]],
) -> list[np.ndarray]:
    """Read the parameters of a mapping from the stored tensor of each layer and expert."""
    parts = [np.empty(own[path], np.float32) for path in mapping.params]
    for place, name in stored.items():
        for part, value in zip(parts, mapping.transform.read(read(name)), strict=True):
            part[place or ...] = value
    return parts


def resolve_head[C: TransformerConfig](family: ModelFamily, config: C, tensors: Tensors) -> C:
    """Return the configuration with the `tied_head` of a checkpoint, if its tensors decide it.

    Parameters
    ----------
    family, config
        The family and the configuration that config.json describes.
    tensors
        The checkpoint.
    """
    head = family.untied_head
    if head is None:
        return config
    names = _names(family, tensors.shapes)
    stored = [tensors[names[name]] for name in (head, family.tied[head]) if name in names]
    untied = head in names and not (len(stored) == 2 and np.array_equal(stored[0], stored[1]))
    fields: dict[str, Any] = {"tied_head": not untied}
    return dataclasses.replace(config, **fields)


def _field(tensors: Tensors, number: int, name: str) -> np.ndarray:
    return tensors.int_matrix(name).fields()[number]


def _int4_kernels(
    int_groups: IntGroups, fields: list[list[np.ndarray]], dense: list[np.ndarray]
) -> list[Int4Kernel]:
    """Make the kernels of a mapping from the fields of its matrices; compare dequantized ones."""
    kernels = []
    for values, scales, zeros, expected in zip(*fields, dense, strict=True):
        if not np.array_equal((values - zeros) * scales, expected):
            raise ValueError(
                "dequantize: got False for a family that changes the values of a quantized matrix; "
                "expected one that permutes them; omit it"
            )
        kernels.append(int4_kernel(int_groups, values, scales, zeros))
    return kernels


def _is_zero_bias(tensors: Tensors, name: str) -> bool:
    """Return whether a tensor is the bias 0 that AutoGPTQ adds to layers without one."""
    matrix = f"{name.removesuffix('bias')}weight"
    return name.endswith(".bias") and matrix in tensors.int_groups and not tensors[name].any()


def check_tensors(
    family: ModelFamily, tensors: Tensors, slots: Mapping[str, Slot]
) -> dict[str, str]:
    """Compare the tensors of a checkpoint with those of a model; return their stored names.

    Raises
    ------
    ValueError
        As `read_params`.
    """
    names = _names(family, tensors.shapes)
    copies = {name: of for name, of in family.tied.items() if name in names and name not in slots}
    problems = [
        f"tensor {name}: missing; expected shape {list(slot.shape)}"
        for name, slot in slots.items()
        if name not in names
    ]
    problems += [
        f"tensor {name}: got shape {list(tensors.shapes[names[name]])}; expected no such tensor in "
        f"{family.architecture}"
        for name in names
        if name not in slots and name not in copies and not _is_zero_bias(tensors, names[name])
    ]
    problems += [
        f"tensor {name}: got shape {list(shape)}; expected {list(slot.shape)} from config.json"
        for name, slot in slots.items()
        if name in names and (shape := tensors.shapes[names[name]]) != slot.shape
    ]
    problems += [
        f"tensor {name}: got other values than {of}; expected equal ones, as config.json ties them"
        for name, of in copies.items()
        if of in names and not np.array_equal(tensors[names[name]], tensors[names[of]])
    ]
    raise_problems(_truncate(problems))
    return names


def write_params(
    family: ModelFamily, config: TransformerConfig, family_config: TransformerConfig, params: Params
) -> tuple[Shapes, Callable[[str], np.ndarray]]:
    """Return the shapes of transformers tensors, and a function that computes a tensor by name.

    The function transfers the layer of a tensor to the host, not the parameters of all layers.

    Parameters
    ----------
    family
        Family to save as.
    config
        Configuration of the tjx model.
    family_config
        The configuration in the form of the family: with biases, which become zeros, and without
        padding rows of tables.
    params
        Parameters of the tjx model.

    Raises
    ------
    ValueError
        As `tjx_nn.functional.check_params`.
    """
    check_params(config, params)
    own = param_shapes(config)
    given = _flat(params)
    shapes = param_shapes(family_config)
    assert all(path.endswith("bias") for path in shapes.keys() - own)
    slots = tensor_slots(family, family_config, shapes)

    def part(path: str, place: tuple[int, ...]) -> np.ndarray:
        if path not in given:
            return np.zeros(shapes[path][len(place) :], np.float32)
        value = _to_host(given[path], place)
        return value if place else value[: shapes[path][0]]

    def tensor(name: str) -> np.ndarray:
        mapping, place, _ = slots[name]
        return mapping.transform.write([part(path, place) for path in mapping.params])

    return {name: slot.shape for name, slot in slots.items()}, tensor


def _to_host(leaf: Any, place: tuple[int, ...]) -> np.ndarray:
    """Return an element of a stacked parameter; an empty place is the whole parameter."""
    if not place or not isinstance(leaf, jax.Array):
        return np.asarray(jax.device_get(leaf))[place or ...]
    with jax.transfer_guard("allow"):  # of the place
        return np.asarray(_element(leaf, place))


@jax.jit
def _element(leaf: jax.Array, place: tuple[Any, ...]) -> jax.Array:
    return leaf[place]  # one program for all layers


def _truncate(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    return problems if more <= 0 else [*problems[:MAX_PROBLEMS], f"and {more} more"]


def _flat(params: Params) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(params, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    return flat


def tensor_slots(
    family: ModelFamily, config: TransformerConfig, own: Mapping[str, tuple[int, ...]]
) -> dict[str, Slot]:
    """Return every tensor of a model by name."""
    slots = {}
    mapped: set[str] = set()
    for mapping in family.tensors(config):
        if mapping.params[0] not in own:
            continue
        assert not mapped & set(mapping.params)
        mapped |= set(mapping.params)
        shapes = [own[path] for path in mapping.params]
        count = sum(f"{{{axis}}}" in mapping.tensor for axis in ("layer", "expert"))
        shape = mapping.transform.shape([s[count:] for s in shapes])
        is_stacked = "blocks" in mapping.params[0].split(".")
        for place in itertools.product(*map(range, shapes[0][:count])):
            layer, expert = (*place, 0, 0)[:2]
            number = config.block_number(layer, leading=not is_stacked)
            name = mapping.tensor.format(layer=number, expert=expert)
            slots[name] = Slot(mapping, place, shape)
    assert mapped == own.keys(), mapped ^ own.keys()
    return slots


def _names(family: ModelFamily, shapes: Shapes) -> dict[str, str]:
    """Map current tensor names to the names in the checkpoint, without ignored tensors."""
    names = {}
    for found in shapes:
        name = found
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        if not any(re.search(pattern, name) for pattern in family.ignored):
            names[name] = found
    return names
