"""Compile every case for one backend and target; compile_report.py starts it as a subprocess.

The compilers for GPU and TPU need separate processes, and their output is read from this process's
standard output and error.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from compile_cases import Case, cases, shapes
from compiler_output import Kernel, read_ptxas, read_thunks, read_tpu
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import dialect  # type: ignore[attr-defined]  # not listed there
from jax.extend.mlir import ir
from jax.interpreters import mlir

from tjx_kernels import flash_attention, implementations_for
from tjx_kernels.attention.call import describe_call

# XLA's GPU descriptions for ahead-of-time compilation; by path, as only tjx_kernels is imported.
DESCRIPTIONS = Path(__file__).parents[2] / "packages/tjx-parallel/src/tjx_parallel/targets"
CUSTOM_CALLS = {
    "triton": "__gpu$xla.gpu.triton",
    "mosaic_gpu": "mosaic_gpu_v2",
    "tpu": "tpu_custom_call",
}
TPU_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}


class Output:
    """Redirection of standard output and error of this process to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(self._file.fileno(), stream.fileno())

    def since(self, start: int) -> str:
        """Return the output after the position `start`."""
        sys.stdout.flush()
        sys.stderr.flush()
        return os.pread(self._file.fileno(), self.position - start, start).decode()

    @property
    def position(self) -> int:
        """Current end of the output."""
        return os.fstat(self._file.fileno()).st_size


class Compiler:
    """Compiler of cases for one backend and target."""

    def __init__(self, implementation: str, target: str, folder: Path) -> None:
        self.implementation, self.target = implementation, target
        self._dumps = folder / "dumps"
        self._output = Output(folder / "output.txt")

    @cached_property
    def device(self) -> jax.Device:
        """A device of the target, without the hardware."""
        jax.devices()  # finds the plugins
        if self.implementation == "tpu":
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.target}:2x2"
            )
        else:
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name=self.target,
                target_config=description(self.target),
                topology="1x1x1",
            )
        device: jax.Device = described.devices[0]
        return device

    def versions(self) -> dict[str, str]:
        """Versions of the packages that determine the report's figures."""
        wheel = "libtpu" if self.implementation == "tpu" else "nvidia-cuda-nvcc"
        return {name: version(name) for name in ("jax", "jaxlib", wheel)}

    def compile(self, case: Case) -> dict[str, Any]:
        """Compile a case; errors become part of its row."""
        row = {
            "implementation": self.implementation,
            "target": self.target,
            "case": case.name,
        }
        with jax.default_device(self.device):
            arrays = shapes(case, jax.sharding.SingleDeviceSharding(self.device))
            given: dict[str, Any] = {**arrays, **case.options, "return_lse": True}
            del given["dout"], given["dlse"]
            call = describe_call(**given)
            refusal = implementations_for(call)[self.implementation]
            if refusal is not None:
                return {**row, "refused": refusal}
            start = time.perf_counter()
            try:
                kernels = self._kernels(case, arrays)
            except Exception as error:  # compilers raise arbitrary exceptions; report them
                return {**row, "error": _without_paths(f"{type(error).__name__}: {error}")}
        seconds = round(time.perf_counter() - start, 1)
        return {**row, "kernels": kernels, "seconds": seconds}

    def _kernels(self, case: Case, arrays: dict[str, Any]) -> list[Kernel]:
        for file in self._dumps.glob("*"):
            file.unlink()
        start = self._output.position
        lowered = jax.jit(both_passes(case, self.implementation)).lower(arrays)
        compiled = lowered.compile()
        if self.implementation == "tpu":
            program = compiled.as_text() or ""
            count = program.count(f'custom_call_target="{CUSTOM_CALLS["tpu"]}"')
            kernels = read_tpu(program, self._dumps)
        else:
            calls = _kernel_calls(lowered, CUSTOM_CALLS[self.implementation])
            count = len(calls)
            if self.implementation == "triton":
                every = read_thunks(self._dumps)  # XLA's own kernels too
                shared_memory = {name: every[name] for name in (x["name"].value for x in calls)}
            else:
                shared_memory = dict(_launch(call["module"].value_bytes) for call in calls)
            used = read_ptxas(self._output.since(start), self.target)
            kernels = [used[name] for name in shared_memory]
            for kernel in kernels:
                kernel["shared_memory_bytes"] += shared_memory[kernel["name"]]
        if not kernels or len(kernels) != count:
            raise RuntimeError(f"{count} kernels in the program, figures of {len(kernels)}")
        return sorted(kernels, key=lambda kernel: _order(kernel["name"]))


def description(target: str) -> str:
    """Return XLA's description of a GPU (a GpuTargetConfigProto in text form)."""
    return (DESCRIPTIONS / f"{target}.txtpb").read_text()


def lower(case: Case, implementation: str, target: str) -> dict[str, Any]:
    """Lower a case for a target without its compiler, and count its kernels."""
    row = {"implementation": implementation, "target": target, "case": case.name}
    if implementation == "tpu":
        kind, platform = TPU_KINDS[target], "tpu"
    else:
        [kind] = re.findall(r'device_description_str: "(.*)"', description(target))
        platform = "gpu"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    check = jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALLS[implementation])
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(
            jax.jit(both_passes(case, implementation)),
            platforms=["tpu" if platform == "tpu" else "cuda"],
            disabled_checks=[check],
        )(shapes(case))
    count = exported.mlir_module().count(f"@{CUSTOM_CALLS[implementation]}(")
    return {**row, "lowered": count} if count else {**row, "error": "no kernel in the program"}


def both_passes(case: Case, implementation: str) -> Callable[[dict[str, Any]], Any]:
    """Return the function to compile: results and all gradients of a call."""

    def run(arrays: dict[str, Any]) -> Any:
        fixed = dict(arrays)
        cotangents = (fixed.pop("dout"), fixed.pop("dlse"))
        moving = {name: fixed.pop(name) for name in ("q", "k", "v", "bias") if name in fixed}

        def attend(moving: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
            options: Any = {**fixed, **case.options, "implementation": implementation}
            return flash_attention(**moving, **options, return_lse=True)

        results, backward = jax.vjp(attend, moving)
        return results, backward(cotangents)

    return run


def _kernel_calls(lowered: Any, target: str) -> list[Any]:
    """Return the backend configurations of a program's calls of kernels."""
    found = []

    def visit(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == target:
            found.append(op.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def _launch(module: bytes) -> tuple[str, int]:
    """Read a Mosaic GPU kernel's name and dynamic shared memory from its module."""
    names: list[str] = []
    sizes: list[int] = []

    def visit(op: Any) -> Any:
        if op.name.endswith("gpu.launch"):  # its one operand of 32 bits is the size
            sizes.extend(
                x.owner.attributes["value"].value for x in op.operands if str(x.type) == "i32"
            )
        elif op.name.endswith("func.func") and op.regions[0].blocks:
            names.append(op.attributes["sym_name"].value)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        dialect.register_dialect(context)
        ir.Module.parse(module).operation.walk(visit)
    [size] = sizes
    return names[0] + "_kernel", size


def _order(name: str) -> tuple[int, str]:
    passes = ("forward", "dq", "dkv", "dk", "dv")
    return next((i for i, part in enumerate(passes) if part in name), len(passes)), name


def _without_paths(text: str) -> str:
    return re.sub(r"(/[\w.\-]+)+/(?=[\w.\-]+)", "", text)[:500]


def main() -> None:
    """Write report.json into the given folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation")
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=[case.name for case in cases()])
    parser.add_argument("--lower", action="store_true")
    given = parser.parse_args()
    chosen = [case for case in cases() if given.case in (None, case.name)]
    if given.lower:
        rows = [lower(case, given.implementation, given.target) for case in chosen]
        report: dict[str, Any] = {"rows": rows, "versions": {}}
    else:
        compiler = Compiler(given.implementation, given.target, given.folder)
        rows = [compiler.compile(case) for case in chosen]
        report = {"rows": rows, "versions": compiler.versions()}
    (given.folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
