"""FLOPs and memory traffic of one kernel, counted from its HLO.

FLOPs are those of matrix products and convolutions, 2 per multiplication. Elementwise integer
operations are counted, as a random number takes a hundred; elementwise float operations are assumed
to overlap with memory traffic. Each operand is read and each result written once: intermediate
values of a fusion stay in registers, a sliced or updated buffer counts with its slice only, and no
operand stays in a cache.
"""

import math
from typing import NamedTuple

from tjx_parallel.planning.hlo import Array, Computation, Instruction, Program, integers

# Operations that compute each element of the result from one of the first operand.
_PER_ELEMENT = {"bitcast", "convert", "copy", "reshape", "transpose", "negate"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_SHIFTS = {"shift-left", "shift-right-logical"}
_INTEGER = {
    "add", "subtract", "multiply", "and", "or", "xor", "not", "compare", "shift-right-arithmetic",
    *_SHIFTS,
}  # fmt: skip


class Product(NamedTuple):
    """A matrix product or a convolution.

    Attributes
    ----------
    flops
        FLOPs per run.
    dtype
        Dtype of the wider operand.
    exact
        Whether float32 operands must not be rounded (``jax.default_matmul_precision("highest")``).
    """

    flops: int
    dtype: str
    exact: bool


def products(program: Program, each: Instruction, inside: Computation) -> list[Product]:
    """Return the products of a kernel, including those in a fusion or a library call."""
    if each.op in ("dot", "convolution"):
        return [_product(each, inside)]
    if each.kind == "custom-call":
        return _library_product(each, inside)
    if each.kind != "fusion":
        return []
    fused = program.computations[each.callees()[0]]
    return [found for inner in fused.values() for found in products(program, inner, fused)]


def _product(each: Instruction, inside: Computation) -> Product:
    left, right = (_array(inside[name]) for name in each.operands[:2])
    out = _array(each)
    if each.op == "dot":
        contracted = integers(each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        flops = 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
    else:  # each element of the result: the kernel's window and input features
        labels = each.attribute(r"dim_labels=\w+_(\w+)->")
        features = right.shape[labels.index("o")] if "o" in labels else 1
        flops = 2 * out.size * right.size // features
    wider = max(left, right, key=lambda array: array.itemsize)
    return Product(flops, wider.dtype, "operand_precision={highest" in each.rest)


def _library_product(each: Instruction, inside: Computation) -> list[Product]:
    """Return the product of a call of cuBLAS or cuBLASLt."""
    if not each.attribute(r'custom_call_target="(__cublas)'):
        return []
    left = _array(inside[each.operands[0]])
    axes = integers(each.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
    flops = 2 * each.results()[0].size * math.prod(left.shape[axis] for axis in axes)
    return [Product(flops, left.dtype, '"HIGHEST"' in each.rest)]


def integer_operations(program: Program, each: Instruction, inside: Computation) -> int:
    """Return the number of elementwise integer operations per run of a kernel.

    Two shifts and the "or" of a rotation are one operation.
    """
    if each.kind == "fusion":
        fused = program.computations[each.callees()[0]]
        return sum(integer_operations(program, inner, fused) for inner in fused.values())
    if each.op not in _INTEGER or each.operands[0] not in inside:
        return 0
    if not _array(inside[each.operands[0]]).dtype.startswith(("s", "u")):
        return 0
    if each.op in _SHIFTS and [user.op for user in each.users] == ["or"]:
        return 0
    return _array(each).size


def memory_bytes(program: Program, each: Instruction, inside: Computation) -> int:
    """Return the bytes that a kernel reads and writes per run."""
    operands = [inside[name] for name in dict.fromkeys(each.operands) if name in inside]
    if each.kind == "fusion":
        fused = program.computations[each.callees()[0]]
        given = [inner for inner in fused.values() if inner.op == "parameter"]
        (root,) = (inner for inner in fused.values() if inner.is_root)
        written = _written(root, fused)
        return written + sum(_read(parameter, fused) for parameter in given)
    if each.op in _SLICES:
        return 2 * _nbytes(each) + sum(map(_nbytes, operands[1:]))
    if each.op in _UPDATES:
        update = _nbytes(inside[_update_of(each)])
        return 2 * update + (update if each.op == "scatter" else 0)
    results = each.results()
    if each.attribute(r'custom_call_target="(__cublas|__cudnn)'):
        results = results[:1] + [x for x in results[1:] if x.dtype not in ("s8", "u8")]  # workspace
    return sum(x.nbytes for x in results) + sum(map(_nbytes, operands))


def _read(parameter: Instruction, fused: Computation) -> int:
    """Return the bytes of a fusion's operand that are read."""
    whole = _nbytes(parameter)
    if not parameter.users:
        return whole if parameter.is_root else 0
    size = sum(x.size for x in parameter.results())
    return round(whole * min(_share_read(parameter, size, fused), 1.0))


def _share_read(source: Instruction, size: int, fused: Computation) -> float:
    """Return the share of a parameter of `size` elements that is read through `source`."""
    share = 0.0
    for use in source.users:
        is_first = use.operands[0] == source.name
        if is_first and use.op in _SLICES:
            share += _array(use).size / max(size, 1)
        elif is_first and use.op == "dynamic-update-slice":
            continue  # in place: only the updated slice is accessed
        elif is_first and use.op == "scatter":
            share += _array(fused[_update_of(use)]).size / max(size, 1)
        elif use.op in _PER_ELEMENT and use.users:
            share += _share_read(use, size, fused)
        else:
            return 1.0
    return share


def _written(root: Instruction, fused: Computation) -> int:
    """Return the bytes that a fusion writes; for an update in place those of the update."""
    if root.op == "tuple":
        return sum(_written(fused[name], fused) for name in root.operands)
    source = root
    while source.op in ("bitcast", "reshape"):
        source = fused[source.operands[0]]
    if source.op in _UPDATES:
        return _array(fused[_update_of(source)]).size * _array(root).itemsize
    return _nbytes(root)


def _update_of(each: Instruction) -> str:
    """Return the name of the update operand of an update in place or a scatter."""
    return each.operands[1] if each.op == "dynamic-update-slice" else each.operands[-1]


def _array(each: Instruction) -> Array:
    return each.results()[0]


def _nbytes(each: Instruction) -> int:
    return sum(x.nbytes for x in each.results())
