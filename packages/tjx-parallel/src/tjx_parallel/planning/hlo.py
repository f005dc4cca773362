"""Parse the text of a compiled XLA program (HLO) into computations and instructions. No JAX."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLEE = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
# The result of these is the flat tuple (operands, results), with equal numbers of both.
_PAIRED_STARTS = ("all-gather-start", "reduce-scatter-start", "all-to-all-start")


class Array(NamedTuple):
    """Type of one array.

    Attributes
    ----------
    dtype
        HLO's name, as bf16 or f8e4m3fn.
    shape
        Sizes of the axes.
    itemsize
        Bytes of an element; types of fewer than 8 bits count as one byte, tokens as none.
    """

    dtype: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize


def arrays(text: str) -> list[Array]:
    """Return the arrays of an HLO type, nested tuples flattened.

    Examples
    --------
    >>> arrays("(bf16[8,16]{1,0:T(8,128)}, /*index=1*/pred[])")
    [Array(dtype='bf16', shape=(8, 16), itemsize=2), Array(dtype='pred', shape=(), itemsize=1)]
    """
    found = []
    for match in _ARRAY.finditer(text):
        name, bits, shape = match.groups()
        itemsize = 0 if name in ("token", "opaque") else max(int(bits or 8), 8) // 8
        dtype = match[0].partition("[")[0]
        found.append(Array(dtype, tuple(integers(shape)), itemsize))
    return found


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction of a computation.

    Attributes
    ----------
    name
        Without the percent sign.
    type
        Text of the result's type.
    op
        HLO's opcode; asynchronous ones end with -start, -update and -done.
    operands
        Names of instructions of the same computation; the number of a parameter; the value of a
        constant.
    rest
        Text after the opening parenthesis: operands, attributes and metadata.
    is_root
        Whether it is the computation's result.
    users
        Instructions of the same computation that have it as an operand.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool = False
    users: list["Instruction"] = field(default_factory=list, repr=False)

    @property
    def kind(self) -> str:
        """The opcode without -start."""
        return self.op.removesuffix("-start")

    @property
    def op_name(self) -> str:
        """JAX's path of functions, scopes and primitive; empty where there is none."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern: str) -> str:
        """Return the first group of a pattern in the attributes, "" without a match."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def results(self) -> list[Array]:
        """Return the arrays that it produces, without the operands in the tuple of a -start."""
        found = arrays(self.type)
        if self.op in _PAIRED_STARTS:
            return found[len(found) // 2 :]
        if self.op == "collective-permute-start":
            return found[1:2]
        if self.op == "copy-start":
            return found[:1]
        if self.op in ("fusion-start", "custom-call-start", "async-start"):
            return arrays(_elements(self.type)[1])
        return found

    def callees(self) -> list[str]:
        """Return the names of the computations that it calls."""
        names = ",".join(several or one for several, one in _CALLEE.findall(self.rest))
        return [name.strip(" %") for name in names.split(",") if name]


Computation = dict[str, Instruction]
"""Instructions by name, in their order."""


class Program(NamedTuple):
    """A compiled program.

    Attributes
    ----------
    computations
        By name.
    entry
        Name of the computation that runs first.
    """

    computations: Mapping[str, Computation]
    entry: str


def parse(hlo: str) -> Program:
    """Parse ``compiled.as_text()``.

    Raises
    ------
    ValueError
        If the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, inside = "", Computation()
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            root, name, result, op, rest = match.groups()
            given = rest.split("), ", 1)[0]  # operands stand without their types
            operands = tuple(re.findall(r"%([\w.\-]+)", given)) or (given.rstrip(")"),)
            inside[name] = each = Instruction(name, result, op, operands, rest, bool(root))
            for operand in dict.fromkeys(operands):
                if operand in inside:
                    inside[operand].users.append(each)
    if not entry:
        raise ValueError(
            f"hlo: got {hlo[:40]!r}; expected the text of an optimized HLO module with an ENTRY "
            "computation; pass compiled.as_text()"
        )
    return Program(computations, entry)


def walk(program: Program, name: str, runs: int) -> Iterator[tuple[Instruction, int]]:
    """Yield every executed instruction and its number of runs; 0 if unknown."""
    for each in program.computations[name].values():
        yield each, runs
        times = runs * (trip_count(program, each) if each.op == "while" else 1)
        if not each.op.endswith(("-done", "-update")):  # counted at its -start
            for callee in each.callees():
                yield from walk(program, callee, times)


def trip_count(program: Program, loop: Instruction) -> int:
    """Return the trip count of a while loop; 0 if unknown."""
    if count := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(count)
    # The TPU compiler gives no count. JAX counts its loops from 0 up to a constant.
    condition = program.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    for each in condition.values():
        limit = condition.get(each.operands[-1])
        if each.op == "compare" and "direction=LT" in each.rest and limit is not None:
            return int(limit.operands[0]) if limit.op == "constant" else 0
    return 0


def integers(text: str) -> list[int]:
    """Return the integers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _elements(type_text: str) -> list[str]:
    """Return the types of a tuple's elements, each as text."""
    found, depth = [""], 0
    for character in type_text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found
