"""Classify the instructions of a compiled program from its HLO text. Does not import JAX."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("attention", "matmul", "loss", "optimizer", "communication", "other")

# Names of `jax.named_scope`, found anywhere in an op_name such as
# "jit(step)/transpose(jvp(attention))/dot_general".
_SCOPES = ("optimizer", "attention", "loss")
_WORD = re.compile(r"[\w.\-]+")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast", "send", "recv",
)  # fmt: skip
# Kernel names of libraries and compilers; nvjet, cutlass, xmma and sgemm are cuBLAS kernels.
_KERNELS = (
    ("communication", re.compile("nccl|nvshmem|all_?reduce|all_?gather|reduce_?scatter", re.I)),
    ("attention", re.compile("fmha|flash|attention|softmax_backend", re.I)),
    ("matmul", re.compile("gemm|matmul|nvjet|cutlass|xmma|cublas|_dot_|^dot", re.I)),
)
# Operations that only run others, which have their own events.
CONTAINERS = {"while", "conditional", "call", "async-start", "async-done", "async-update"}


class Instruction(NamedTuple):
    """An HLO instruction.

    Attributes
    ----------
    opcode : str
        HLO opcode, such as "fusion".
    kind : str
        One of `KINDS`.
    source : str
        JAX's op_name (functions, scopes and primitive); empty if there is none.
    """

    opcode: str
    kind: str
    source: str


def instructions(text: str) -> tuple[str, dict[str, Instruction]]:
    """Parse the HLO text of a program.

    Collectives are "communication" in any scope. Other instructions in a `jax.named_scope` called
    "optimizer", "attention" or "loss" have that kind, including matrix products. Outside these
    scopes, matrix products are "matmul", also if other work is fused with them.

    Parameters
    ----------
    text : str
        ``jitted.lower(...).compile().as_text()``.

    Returns
    -------
    tuple
        Module name, and instructions by name.
    """
    module = re.match(r"HloModule ([\w.\-]+)", text)
    lines = dict(_by_computation(text))
    found = {
        name: Instruction(opcode, _kind(opcode, rest, lines), _source(rest))
        for members in lines.values()
        for name, opcode, rest in members
    }
    return ("" if module is None else module[1]), found


def kind_of_kernel(name: str) -> str:
    """Classify a kernel by its name alone; returns one of `KINDS`."""
    return next((kind for kind, pattern in _KERNELS if pattern.search(name)), "other")


def _by_computation(text: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the instructions (name, opcode, rest of the line) of each computation."""
    name = ""
    members: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if (begin := _COMPUTATION.match(line)) is not None:
            name, members = begin[1], []
        elif line == "}":
            yield name, members
        elif (found := _INSTRUCTION.match(line)) is not None:
            members.append((found[1], found[2], found[3]))


def _kind(opcode: str, rest: str, lines: Mapping[str, list[tuple[str, str, str]]]) -> str:
    if opcode.removesuffix("-start").removesuffix("-done") in _COLLECTIVES:
        return "communication"
    words = _WORD.findall(_source(rest))
    for scope in _SCOPES:
        if scope in words:
            return scope
    if opcode in ("dot", "convolution", "ragged-dot"):
        return "matmul"
    if opcode == "custom-call":
        target = _TARGET.search(rest)
        return kind_of_kernel(target[1] if target else "")
    called = _CALLED.search(rest) if opcode == "fusion" else None
    inner = (
        [_kind(code, more, lines) for _, code, more in lines.get(called[1], ())] if called else []
    )
    # A fusion may span several scopes; a matrix product dominates its time.
    return next(
        (kind for kind in ("matmul", "attention", "loss", "optimizer") if kind in inner), "other"
    )


def _source(rest: str) -> str:
    found = _OP_NAME.search(rest)
    return found[1] if found else ""
