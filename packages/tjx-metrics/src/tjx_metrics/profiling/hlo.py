"""What each operation of a compiled program does, read from its text (HLO). No JAX."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("attention", "matmul", "loss", "optimizer", "communication", "other")

# Names of scopes (`jax.named_scope`) that say what is done, wherever they stand in an op_name:
# "jit(step)/transpose(jvp(attention))/dot_general".
_SCOPES = ("optimizer", "attention", "loss")
_WORD = re.compile(r"[\w.\-]+")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

_EXCHANGES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast", "send", "recv",
)  # fmt: skip
# Libraries' and compilers' names of kernels: cuBLAS's are nvjet, cutlass, xmma, sgemm and the like.
_KERNELS = (
    ("communication", re.compile("nccl|nvshmem|all_?reduce|all_?gather|reduce_?scatter", re.I)),
    ("attention", re.compile("fmha|flash|attention|softmax_backend", re.I)),
    ("matmul", re.compile("gemm|matmul|nvjet|cutlass|xmma|cublas|_dot_|^dot", re.I)),
)
# Operations that only run others, which have events of their own.
CONTAINERS = {"while", "conditional", "call", "async-start", "async-done", "async-update"}


class Instruction(NamedTuple):
    """An instruction of a program.

    Attributes
    ----------
    opcode : str
        HLO's name of what it does.
    kind : str
        One of `KINDS`.
    source : str
        The op_name that JAX gave: functions, scopes and primitive; empty where there is none.
    """

    opcode: str
    kind: str
    source: str


def instructions(text: str) -> tuple[str, dict[str, Instruction]]:
    """Read a program.

    What JAX's scopes name "optimizer", "attention" or "loss" is of that kind, products within it
    included. Of the rest, what exchanges data between devices is communication, also within these
    scopes, and what multiplies matrices is matmul, also where other work is fused with it.

    Parameters
    ----------
    text : str
        ``jitted.lower(...).compile().as_text()``.

    Returns
    -------
    tuple
        The name of its module, and its instructions by name.
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
    """Guess the kind of a kernel of which only the name is known; one of `KINDS`."""
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
    if opcode.removesuffix("-start").removesuffix("-done") in _EXCHANGES:
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
    # What is fused may come from several scopes; the product is what takes the time.
    return next(
        (kind for kind in ("matmul", "attention", "loss", "optimizer") if kind in inner), "other"
    )


def _source(rest: str) -> str:
    found = _OP_NAME.search(rest)
    return found[1] if found else ""
