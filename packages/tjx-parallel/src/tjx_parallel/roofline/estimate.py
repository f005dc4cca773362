"""Roofline estimate of a compiled step: per kernel the maximum of compute and memory time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tjx_parallel.planning.chips import Chip
from tjx_parallel.planning.collectives import KINDS, collectives
from tjx_parallel.planning.hlo import Instruction, Program, parse, trip_count
from tjx_parallel.planning.step_time import ComputeTime, collective_seconds
from tjx_parallel.roofline.assumptions import Assumptions
from tjx_parallel.roofline.attention import attention_call
from tjx_parallel.roofline.regions import COLLECTIVES, Region, op_name_of, region_of
from tjx_parallel.roofline.work import integer_operations, memory_bytes, products

# Instructions without a kernel.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "domain", "send-done", "recv-done",
}  # fmt: skip
# Instructions that only run other computations.
_CALLS = {"call", "async"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a step on one device, or one collective.

    Attributes
    ----------
    name
        Of the instruction.
    kind
        Opcode, or "product" with its dtype, or the implementation of attention.
    region
        Region of the model, and pass.
    op_name
        JAX's op_name, from which the region is read.
    runs
        Runs per step.
    bytes, flops
        Per run; for a collective the bytes that the device sends.
    seconds
        Seconds per run.
    bound
        "compute", "memory", "integers", "launch" or "link": the largest term.
    """

    name: str
    kind: str
    region: Region
    op_name: str
    runs: int
    bytes: float | int
    flops: float | int
    seconds: float
    bound: str


class Total(NamedTuple):
    """Sums over kernels: launches, bytes, FLOPs and seconds of a step."""

    kernels: int
    bytes: float | int
    flops: float | int
    seconds: float | int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated kernels of a step on one device.

    Attributes
    ----------
    chip
        The accelerator.
    assumptions
        Shares of its peak rates.
    kernels
        All kernels and collectives.
    notes
        Unknowns of the program, and rates with their own source.
    """

    chip: Chip
    assumptions: Assumptions
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]

    def total(self, kernels: Iterable[Kernel] | None = None) -> Total:
        """Sum over kernels; by default all except collectives, which may overlap with them."""
        chosen = [
            each
            for each in (self.kernels if kernels is None else kernels)
            if kernels is not None or each.region.name != COLLECTIVES
        ]
        return Total(
            sum(each.runs for each in chosen),
            sum(each.runs * each.bytes for each in chosen),
            sum(each.runs * each.flops for each in chosen),
            sum(each.runs * each.seconds for each in chosen),
        )

    def compute_time(self) -> ComputeTime:
        """Return the seconds of the passes and of the update, without collectives."""
        compute = [each for each in self.kernels if each.region.name != COLLECTIVES]
        update = [each for each in compute if each.region.phase == "update"]
        once = self.total(update).seconds
        return ComputeTime(self.total(compute).seconds - once, once)

    def by_region(self) -> dict[Region, Total]:
        """Return the sums by region and pass, the costliest first."""
        groups: dict[Region, list[Kernel]] = {}
        for each in self.kernels:
            groups.setdefault(each.region, []).append(each)
        found = {region: self.total(kernels) for region, kernels in groups.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))

    def costliest(self, count: int) -> list[tuple[Kernel, Total]]:
        """Return the operations with the most time per step, and their sums.

        Kernels with the same op_name, kind and size, as in unrolled layers, are one operation.
        """
        groups: dict[tuple[object, ...], list[Kernel]] = {}
        for each in self.kernels:
            key = (each.op_name, each.region, each.kind, each.bytes, each.flops)
            groups.setdefault(key, []).append(each)
        found = [(kernels[0], self.total(kernels)) for kernels in groups.values()]
        return sorted(found, key=lambda item: -item[1].seconds)[:count]


def estimate(
    hlo: str, chip: Chip, assumptions: Assumptions, *, mesh_shape: Mapping[str, int] | None = None
) -> Estimate:
    """Estimate the time of a compiled step.

    Parameters
    ----------
    hlo
        ``compiled.as_text()``: optimized HLO, preferably of the chip's own compiler.
    chip
        The accelerator.
    assumptions
        From `assumptions_for`.
    mesh_shape
        Size by axis, outer to inner; None is one device.

    Raises
    ------
    ValueError
        If the text is no optimized HLO, or has collectives without a `mesh_shape`.
    """
    walk = _Walk(parse(hlo), chip, assumptions)
    kernels = list(walk.kernels(walk.program.entry))
    if mesh_shape:
        kernels += _collectives(hlo, chip, mesh_shape)
    elif walk.exchanges:
        raise ValueError(
            f"mesh_shape: got None; expected the mesh of a program with {walk.exchanges} "
            "collectives; give the size of each axis"
        )
    return Estimate(
        chip=chip, assumptions=assumptions, kernels=tuple(kernels), notes=tuple(walk.notes)
    )


class _Walk:
    """Iterator over the kernels of a program that collects `notes` and counts collectives."""

    def __init__(self, program: Program, chip: Chip, assumptions: Assumptions) -> None:
        self.program, self.chip, self.assumptions = program, chip, assumptions
        self.notes: dict[str, None] = {}  # ordered set
        self.exchanges = 0

    def kernels(self, name: str) -> Iterator[Kernel]:
        """Yield the kernels of a computation and of the computations that it calls."""
        for each in self.program.computations[name].values():
            if each.op in _FREE or each.op.endswith(("-done", "-update")):
                continue
            if each.kind in KINDS:
                self.exchanges += 1
            elif each.op == "while":
                yield from self._loop(each)
            elif each.op == "conditional":
                yield from self._branch(each)
            elif each.kind in _CALLS:
                for callee in each.callees():
                    yield from self.kernels(callee)
            else:
                yield self._kernel(each, name)

    def _loop(self, loop: Instruction) -> Iterator[Kernel]:
        times = trip_count(self.program, loop)
        if not times:
            self.notes[f"the loop {loop.name} has an unknown number of runs: counted once"] = None
        for each in self.kernels(loop.attribute(r"body=%?([\w.\-]+)")):
            yield replace(each, runs=each.runs * max(times, 1))

    def _branch(self, conditional: Instruction) -> list[Kernel]:
        self.notes[f"of the branches of {conditional.name} the costliest counts"] = None
        branches = [list(self.kernels(callee)) for callee in conditional.callees()]
        return max(branches, key=lambda kernels: sum(k.runs * k.seconds for k in kernels))

    def _kernel(self, each: Instruction, name: str) -> Kernel:
        inside = self.program.computations[name]
        fused = (
            self.program.computations[each.callees()[0]].values() if each.kind == "fusion" else ()
        )
        op_name = op_name_of(each, fused)
        moved = memory_bytes(self.program, each, inside)
        kind, flops, seconds = each.kind, 0.0, 0.0
        call = attention_call(each, inside, visible=self.assumptions.attention_visible)
        if call is not None:
            share = call.share or self.assumptions.product_share
            kind, flops = f"{call.implementation} attention", call.flops
            seconds = flops / (share * self.chip.flops)
            note = f"{call.implementation} attention {region_of(op_name).phase}: {share:.0%}"
            self.notes[f"{note} of the peak ({call.note})"] = None
        else:
            for product in products(self.program, each, inside):
                rate = self.chip.product_flops(product.dtype, exact=product.exact)
                kind = f"product {product.dtype}"
                flops += product.flops
                seconds += product.flops / (rate * self.assumptions.product_share)
            if each.kind == "custom-call" and not flops:
                target = each.attribute(r'custom_call_target="([^"]*)"')
                self.notes[f"of {target} the bytes count, not the FLOPs"] = None
        memory = moved / (self.chip.memory_bandwidth * self.assumptions.bandwidth_share)
        rate = self.chip.integer_ops * self.assumptions.integer_share
        integers = integer_operations(self.program, each, inside) / rate
        launch = self.assumptions.launch_seconds
        bound = max(
            (seconds, "compute"), (memory, "memory"), (integers, "integers"), (launch, "launch")
        )[1]
        return Kernel(
            name=each.name, kind=kind, region=region_of(op_name), op_name=op_name, runs=1,
            bytes=moved, flops=flops, seconds=max(seconds, memory, integers) + launch, bound=bound,
        )  # fmt: skip


def _collectives(hlo: str, chip: Chip, mesh_shape: Mapping[str, int]) -> Iterator[Kernel]:
    for each in collectives(hlo, mesh_shape):
        name = f"{each.kind} over {'+'.join(each.axes)}"
        yield Kernel(
            name=name, kind=each.kind, region=Region(COLLECTIVES, "update"), op_name=name,
            runs=each.runs, bytes=each.wire_bytes / each.runs, flops=0.0,
            seconds=collective_seconds(each, mesh_shape, chip) / each.runs, bound="link",
        )  # fmt: skip
