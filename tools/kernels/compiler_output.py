"""Parsers of compiler output and dumps: registers, spills and memory of each kernel. No JAX."""

import re
from pathlib import Path
from typing import TypedDict


class Kernel(TypedDict, total=False):
    """Resource usage of a compiled kernel.

    On a GPU: registers, spilled bytes (stores and loads) and stack bytes per thread, static and
    dynamic shared memory in bytes per block; `serialized` if ptxas found too few registers to let
    asynchronous products overlap. On a TPU: bytes of vector memory, and the number of
    vector register spills (4 KiB each).
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_memory_bytes: int
    serialized: bool
    vector_memory_bytes: int
    vector_spill_stores: int


_PTXAS_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(\w+)'")
_PTXAS_MEMORY = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_PTXAS_SERIALIZED = re.compile(r"\(C7512\).*for the function '([^']+)'")
_PTXAS_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def read_ptxas(log: str, architecture: str) -> dict[str, Kernel]:
    """Parse the output of `ptxas -v`: kernel name -> resource usage.

    Raises
    ------
    ValueError
        For a kernel without figures, or compiled for another architecture.
    """
    pieces = _PTXAS_ENTRY.split(log)[1:]
    found: dict[str, Kernel] = {}
    for name, compiled_for, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        memory, used = _PTXAS_MEMORY.search(text), _PTXAS_USED.search(text)
        if memory is None or used is None or compiled_for != architecture:
            raise ValueError(f"ptxas gave no figures for {name}, or not for {architecture}")
        stack, stores, loads = (int(x) for x in memory.groups())
        found[name] = Kernel(
            name=name,
            registers=int(used[1]),
            spill_bytes=stores + loads,
            stack_bytes=stack,
            shared_memory_bytes=int(used[2] or 0),
        )
    for name in _PTXAS_SERIALIZED.findall(log):
        found[name]["serialized"] = True
    return found


_CUSTOM_KERNEL = re.compile(r"kCustomKernel.*?(\w+) grid: .*?shared_memory: (\d+) bytes")


def read_thunks(folder: Path) -> dict[str, int]:
    """Parse XLA's thunk dump of a program: kernel name -> bytes of shared memory."""
    found: dict[str, int] = {}
    for file in folder.glob("*.thunk_sequence.txt"):
        found.update((name, int(size)) for name, size in _CUSTOM_KERNEL.findall(file.read_text()))
    return found


_TPU_KERNEL = re.compile(r'%([\w.\-]+) = .*?custom_call_target="tpu_custom_call".*')
_TPU_MEMORY = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"')
_TPU_SPILL = re.compile(r"vst \[vmem:\[#allocation\d+_spill")


def read_tpu(program: str, folder: Path) -> list[Kernel]:
    """Parse a compiled TPU program and libtpu's dump of final instructions."""
    found = []
    for line in _TPU_KERNEL.finditer(program):
        memory = _TPU_MEMORY.search(line[0])
        dumps = list(folder.glob(f"*-{line[1]}-*-final_bundles.txt"))
        dumps = [x for x in dumps if "schedule-analysis" not in x.name]
        if memory is None or len(dumps) != 1:
            raise ValueError(f"the compiler gave no figures for {line[1]}: {len(dumps)} dumps")
        found.append(
            Kernel(
                name=re.sub(r"\.\d+$", "", line[1]),
                vector_memory_bytes=int(memory[1]),
                vector_spill_stores=len(_TPU_SPILL.findall(dumps[0].read_text())),
            )
        )
    return found
