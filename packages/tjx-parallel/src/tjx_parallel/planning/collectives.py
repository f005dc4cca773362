"""Collectives of a compiled step, parsed from its HLO text. No JAX."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tjx_parallel.planning.hlo import Instruction, Program, integers, parse, walk

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# Operations that pass on all elements of an array.
_PASSES_ON = {"get-tuple-element", "bitcast", "convert", "copy", "reshape", "transpose"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of a compiled program.

    Attributes
    ----------
    kind
        HLO's name. An all-reduce of which each device uses only a slice counts as a reduce-scatter:
        the GPU and TPU compilers convert it, the CPU compiler does not.
    axes
        Mesh axes of the participating devices, outer to inner.
    group_size
        Devices per replica group.
    payload
        Bytes per run: the gathered or scattered array, else the operand of one device.
    runs
        Runs per step.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    payload: int
    runs: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends per step."""
        return self.runs * self.payload * wire_share(self.kind, self.group_size)


def wire_share(kind: str, devices: float | int) -> float:
    """Return the share of the payload that each device of a ring sends."""
    if kind in ("collective-permute", "collective-broadcast"):
        return float(devices > 1)
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a compiled program, those in loops with their trip counts.

    Parameters
    ----------
    hlo
        ``compiled.as_text()`` of a program for all devices of a mesh.
    mesh_shape
        Size by axis, outer to inner (``mesh.shape``).

    Returns
    -------
    list of Collective
        Kind, bytes, mesh axes and number of executions of each.

    Raises
    ------
    ValueError
        If the replica groups of a collective or the trip count of its loop are unknown.
    """
    program = parse(hlo)
    found = []
    for each, runs in walk(program, program.entry, 1):
        kind = each.kind
        if kind not in KINDS:
            continue
        axes, size = _participants(each.rest, mesh_shape)
        if not runs:
            raise ValueError(
                f"hlo: got {each.name} in a loop of unknown length; expected a static trip "
                "count; use scan or fori_loop"
            )
        parts = {kind: _sizes(each)}
        if kind == "all-reduce":
            parts = {"all-reduce": [], "reduce-scatter": []}
            for number, part in enumerate(_sizes(each)):
                sliced = _is_sliced(program, each, number)
                # Collect the slices; below, the payload of the reduce-scatter is computed from
                # them.
                parts["reduce-scatter" if sliced else kind].append(part // (size if sliced else 1))
        # The CPU compiler widens 16-bit sums to 32 bits, visible in the name of the addition.
        widened = 2 if re.search(r"to_apply=%?[\w.\-]*_promoted", each.rest) else 1
        for name, part_sizes in parts.items():
            payload = sum(part_sizes) * (size if name == "reduce-scatter" else 1) // widened
            if payload and size > 1:
                found.append(Collective(
                    kind=name, axes=axes, group_size=size, payload=payload, runs=runs
                ))  # fmt: skip
    return found


def _sizes(each: Instruction) -> list[int]:
    return [result.nbytes for result in each.results()]


def _is_sliced(
    program: Program,
    source: Instruction,
    number: int = 0,
    fusion: Instruction | None = None,
) -> bool:
    """Return whether all uses of a result, inside and after a fusion, are slices."""
    uses = source.users
    if len(_sizes(source)) > 1:
        uses = [each for each in uses if re.search(rf"index={number}\b", each.rest)]
    if not uses:
        return fusion is not None and _is_sliced(program, fusion)
    return all(
        (use.op == "dynamic-slice" and use.operands[0] == source.name)
        or (use.op in _PASSES_ON and _is_sliced(program, use, 0, fusion))
        or (use.op == "fusion" and _is_sliced_inside(program, use, source.name))
        for use in uses
    )


def _is_sliced_inside(program: Program, fusion: Instruction, operand: str) -> bool:
    numbers = [str(n) for n, name in enumerate(fusion.operands) if name == operand]
    inside = program.computations[fusion.callees()[0]].values()
    given = [each for each in inside if each.op == "parameter" and each.operands[0] in numbers]
    return all(_is_sliced(program, each, 0, fusion) for each in given)


def _participants(rest: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes of a collective and the size of its replica groups."""
    groups = _groups(rest, math.prod(mesh_shape.values()))
    places = np.array(np.unravel_index(groups, tuple(mesh_shape.values())))  # axis, group, member
    moves = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, moved in zip(mesh_shape, moves, strict=True) if moved)
    # The pairs of a permute are not groups: its messages run along whole axes.
    whole = math.prod(mesh_shape[axis] for axis in axes)
    return axes, whole if "source_target_pairs" in rest else groups.shape[1]


def _groups(rest: str, devices: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the replica groups, [groups, members], as device positions in the mesh."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, sizes, order = (integers(part or "") for part in iota.groups())
        ids = np.arange(devices).reshape(sizes)
        return ids.transpose(order or None).reshape(shape)
    # A mesh, of our axes or the compiler's own; 'tensor':(2)4 is 4 of its devices in steps that
    # leave 2 blocks before it.
    if mesh := re.search(r"replica_groups=mesh\[('[^\]]*)\] \{([^}]*)\}", rest):
        along = {
            name: integers(part) for name, part in re.findall(r"'([^']+)'(:\(\d+\)\d+)?", mesh[2])
        }
        sizes, taken = [], []
        for name, text in re.findall(r"'([^']+)'=(\d+)", mesh[1]):
            before, size = along.get(name) or (1, int(text))
            taken += [len(sizes) + 1] if name in along else []
            sizes += [before, size, int(text) // before // size]
        ids = np.moveaxis(np.arange(devices).reshape(sizes), taken, range(-len(taken), 0))
        return ids.reshape(-1, math.prod(sizes[axis] for axis in taken))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}", rest)
    if listed is None:
        raise ValueError(
            f"hlo: got {rest[:300]}; expected replica groups or source-target pairs; pass "
            "compiled.as_text()"
        )
    groups = [integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return np.array(groups or [list(range(devices))])
