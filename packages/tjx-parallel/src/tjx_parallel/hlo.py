"""What a compiled step sends between devices, read from its program's text (HLO). No JAX."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_CALLEE = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
# Operations that hand on all the numbers of an array.
_PASSES_ON = {"get-tuple-element", "bitcast", "convert", "copy", "reshape", "transpose"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """An exchange between devices.

    Attributes
    ----------
    kind
        HLO's name. An all-reduce of which each device keeps a slice is a reduce-scatter: so the
        compilers of GPUs and TPUs make it, that of CPUs has none.
    axes
        Axes of the mesh along which devices exchange, outer to inner.
    group_size
        Devices that exchange with each other.
    payload
        Bytes of a run: all that is gathered or scattered; else what one device brings.
    runs
        Runs in a step.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    payload: int
    runs: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return self.runs * self.payload * wire_share(self.kind, self.group_size)


def wire_share(kind: str, devices: float | int) -> float:
    """Return what each of so many devices sends in a ring, in parts of the payload."""
    if kind in ("collective-permute", "collective-broadcast"):
        return float(devices > 1)
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return the exchanges of a compiled program; those in a loop count as often as it runs.

    Parameters
    ----------
    hlo
        ``compiled.as_text()`` of a program for all devices of a mesh.
    mesh_shape
        Size by axis, outer to inner (``mesh.shape``).

    Raises
    ------
    ValueError
        If it cannot be told which devices exchange, or how often a loop with exchanges runs.
    """
    program, entry = _parse(hlo)
    found = []
    for each, runs in _walk(program, entry, 1):
        kind = each.op.removesuffix("-start")
        if kind not in _KINDS:
            continue
        axes, size = _participants(each.rest, mesh_shape)
        if not runs:
            raise ValueError(f"{each.name} is in a loop of unknown length: use scan or fori_loop")
        parts = {kind: each.sizes()}
        if kind == "all-reduce":
            parts = {"all-reduce": [], "reduce-scatter": []}
            for number, part in enumerate(each.sizes()):
                sliced = _is_sliced(program, each, number)
                # The slices are the result of a reduce-scatter: below, the whole is made of them.
                parts["reduce-scatter" if sliced else kind].append(part // (size if sliced else 1))
        # CPUs add 16-bit numbers as 32-bit ones, and say so in the name of the addition.
        widened = 2 if re.search(r"to_apply=%?[\w.\-]*_promoted", each.rest) else 1
        for name, part_sizes in parts.items():
            payload = sum(part_sizes) * (size if name == "reduce-scatter" else 1) // widened
            if payload and size > 1:
                found.append(Collective(
                    kind=name, axes=axes, group_size=size, payload=payload, runs=runs
                ))  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str  # of the line
    users: list["_Instruction"] = field(default_factory=list, repr=False)

    def sizes(self) -> list[int]:
        """Return the bytes of each array of the result; what starts has its operands before it."""
        arrays = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", self.type)
        sizes = [
            math.prod(_numbers(shape)) * max(int(bits or 8), 8) // 8 for _, bits, shape in arrays
        ]  # pred has no number
        if self.op in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
            return sizes[len(sizes) // 2 :]
        return sizes[1:2] if self.op == "collective-permute-start" else sizes

    def callees(self) -> list[str]:
        """Return the names of the computations that it runs."""
        names = ",".join(several or one for several, one in _CALLEE.findall(self.rest))
        return [name.strip(" %") for name in names.split(",") if name]


_Computation = dict[str, _Instruction]


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Return a program's computations by name, and the name of the first."""
    program: dict[str, _Computation] = {}
    entry, inside = "", {}
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = program.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            name, kind, op, rest = match.groups()
            given = rest.split("), ", 1)[0]  # operands stand without their types
            operands = tuple(re.findall(r"%([\w.\-]+)", given)) or (given.rstrip(")"),)
            inside[name] = each = _Instruction(name, kind, op, operands, rest)
            for operand in dict.fromkeys(operands):
                if operand in inside:
                    inside[operand].users.append(each)
    return program, entry


def _walk(
    program: Mapping[str, _Computation], name: str, runs: int
) -> Iterator[tuple[_Instruction, int]]:
    """Yield every instruction that runs, and how often; 0 is not known."""
    for each in program[name].values():
        yield each, runs
        times = runs * (_trips(program, each) if each.op == "while" else 1)
        if not each.op.endswith(("-done", "-update")):  # what was started is counted there
            for callee in each.callees():
                yield from _walk(program, callee, times)


def _trips(program: Mapping[str, _Computation], loop: _Instruction) -> int:
    """Return how often a loop runs; 0 is not known."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(count[1])
    # The compiler of TPUs does not say. JAX counts its loops from 0 up to a constant.
    condition = program[re.findall(r"condition=%?([\w.\-]+)", loop.rest)[0]]
    for each in condition.values():
        limit = condition.get(each.operands[-1])
        if each.op == "compare" and "direction=LT" in each.rest and limit is not None:
            return int(limit.operands[0]) if limit.op == "constant" else 0
    return 0


def _is_sliced(
    program: Mapping[str, _Computation],
    source: _Instruction,
    number: int = 0,
    fusion: _Instruction | None = None,
) -> bool:
    """Tell whether slices are all that is used of an array of a result, in a fusion or after it."""
    uses = source.users
    if len(source.sizes()) > 1:
        uses = [each for each in uses if re.search(rf"index={number}\b", each.rest)]
    if not uses:
        return fusion is not None and _is_sliced(program, fusion)
    return all(
        (use.op == "dynamic-slice" and use.operands[0] == source.name)
        or (use.op in _PASSES_ON and _is_sliced(program, use, 0, fusion))
        or (use.op == "fusion" and _is_sliced_inside(program, use, source.name))
        for use in uses
    )


def _is_sliced_inside(
    program: Mapping[str, _Computation], fusion: _Instruction, operand: str
) -> bool:
    numbers = [str(n) for n, name in enumerate(fusion.operands) if name == operand]
    inside = program[fusion.callees()[0]].values()
    given = [each for each in inside if each.op == "parameter" and each.operands[0] in numbers]
    return all(_is_sliced(program, each, 0, fusion) for each in given)


def _participants(rest: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the axes along which devices exchange, and how many exchange with each other."""
    groups = _groups(rest, math.prod(mesh_shape.values()))
    places = np.array(np.unravel_index(groups, tuple(mesh_shape.values())))  # axis, group, member
    moves = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, moved in zip(mesh_shape, moves, strict=True) if moved)
    # Pairs of a permute are no groups: its messages go along whole axes.
    whole = math.prod(mesh_shape[axis] for axis in axes)
    return axes, whole if "source_target_pairs" in rest else groups.shape[1]


def _groups(rest: str, devices: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the devices that exchange, [groups, members], by their places in the mesh."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, sizes, order = (_numbers(part or "") for part in iota.groups())
        ids = np.arange(devices).reshape(sizes)
        return ids.transpose(order or None).reshape(shape)
    # A mesh, of our axes or the compiler's own; 'tensor':(2)4 is 4 of its devices in steps that
    # leave 2 blocks before it.
    if mesh := re.search(r"replica_groups=mesh\[('[^\]]*)\] \{([^}]*)\}", rest):
        along = {
            name: _numbers(part) for name, part in re.findall(r"'([^']+)'(:\(\d+\)\d+)?", mesh[2])
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
        raise ValueError(f"it is not told which devices exchange in: {rest[:300]}")
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return np.array(groups or [list(range(devices))])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
