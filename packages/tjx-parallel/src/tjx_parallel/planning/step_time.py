"""What fits, how long a step takes and how it scales: formulas over the figures of one step.

Computing takes the time that was estimated from the compiled program, or FLOPs at a share of the
peak where there is none.

Of a group of n devices that exchange, k are in one fast domain: the n / k domains exchange over k
slow links side by side, then the k devices over their fast links, each in a ring. A step takes from
max(computing, communicating), if all of it is hidden, to their sum.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tjx_parallel.config import AXES
from tjx_parallel.planning.chips import Chip
from tjx_parallel.planning.collectives import Collective, wire_share

_BLOCK_BY_BLOCK = ("all-reduce", "all-gather", "reduce-scatter")
_WEIGHTS = {"data", "fsdp"}  # what goes along these does not grow with the rows


class ComputeTime(NamedTuple):
    """Estimated seconds of a compiled step on one device, without its collectives.

    Attributes
    ----------
    model
        Of the forward and the backward pass: they grow with the rows.
    update
        Of the optimizer and what else runs once a step: they grow with the state.
    """

    model: float
    update: float


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """What is known of a step on a mesh; bytes are those of one device.

    Attributes
    ----------
    mesh_shape
        Size by axis, outer to inner.
    parameters, optimizer, batch, temporaries
        Bytes. Temporaries are all else at the peak: activations, gradients, gathered weights.
    gradients
        Bytes of a gradient of each parameter, as they are reduced; they are in the temporaries.
    flops
        FLOPs of all devices, by formula, with those of activations that are computed again.
    tokens, sequences, microbatches
        In a step.
    exchanges
        Of the compiled step.
    bubble
        Share of the time in which a stage of the pipeline waits.
    compute_time
        Estimated from the compiled program (`tjx_parallel.roofline`); None where the compiler of
        the chip is not installed.
    """

    mesh_shape: Mapping[str, int]
    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    gradients: int
    flops: float
    tokens: int
    sequences: int
    microbatches: int = 1
    exchanges: tuple[Collective, ...] = ()
    bubble: float = 0.0
    compute_time: ComputeTime | None = None

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh_shape.values())

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return self.parameters + self.optimizer + self.batch + self.temporaries


class Sent(NamedTuple):
    """Bytes that a device sends in a step, and the seconds that takes."""

    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step costs on a chip. Pairs are bounds: nothing hidden, and all communication hidden.

    Attributes
    ----------
    step, chip
        What is planned.
    compute_efficiency
        Share of the chip's peak that computing is assumed to reach; None where `compute` is that of
        the compiled program.
    compute
        Seconds: of the compiled program, or by formula: FLOPs, and the optimizer's reading and
        writing of the state from memory.
    communication
        By (kind, axes).
    """

    step: StepProfile
    chip: Chip
    compute_efficiency: float | None
    compute: float
    communication: Mapping[tuple[str, tuple[str, ...]], Sent]

    @property
    def fits(self) -> bool:
        """Whether the chip has the memory."""
        return self.step.memory <= self.chip.capacity

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step; pipeline stages compute 1 - bubble of the time."""
        sent = sum(each.seconds for each in self.communication.values())
        busy = self.compute / (1 - self.step.bubble)
        return busy + sent, max(busy, sent)

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the step in which devices compute."""
        slow, fast = self.seconds
        return self.compute / slow, self.compute / fast

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all devices."""
        slow, fast = self.seconds
        return self.step.tokens / slow, self.step.tokens / fast


def plan(step: StepProfile, chip: Chip, *, compute_efficiency: float | None = None) -> Plan:
    """Return what a step costs on a chip.

    Parameters
    ----------
    step
        The step.
    chip
        The accelerator.
    compute_efficiency
        Share of the chip's peak that computing is assumed to reach. None takes the time of the
        compiled program, or where there is none the chip's own share, which has a source.

    Raises
    ------
    ValueError
        If the efficiency is not in (0, 1].
    """
    if compute_efficiency is None and step.compute_time is None:
        compute_efficiency = chip.efficiency
    if compute_efficiency is None:
        assert step.compute_time is not None
        compute = sum(step.compute_time)
    elif 0 < compute_efficiency <= 1:
        state = 2 * (step.parameters + step.optimizer)
        flops = step.flops / step.devices / (chip.flops * compute_efficiency)
        compute = flops + state / chip.memory_bandwidth
    else:
        raise ValueError(
            f"compute_efficiency: got {compute_efficiency}; expected a share in (0, 1]; give 0.4 "
            "for 40%"
        )
    communication: dict[tuple[str, tuple[str, ...]], Sent] = {}
    for each in step.exchanges:
        key, seconds = (each.kind, each.axes), collective_seconds(each, step.mesh_shape, chip)
        before = communication.get(key, Sent(0.0, 0.0))
        communication[key] = Sent(before.bytes + each.wire_bytes, before.seconds + seconds)
    return Plan(
        step=step,
        chip=chip,
        compute_efficiency=compute_efficiency,
        compute=compute,
        communication=communication,
    )


def scale_step(step: StepProfile, devices: int, *, strong: bool) -> StepProfile | None:
    """Return a step on another number of devices, without compiling it; None if there is none.

    Outer axes grow and shrink: data, then fsdp and what is left, so that fewer devices than the
    planned ones hold more of the state. Weak: the same rows a device. Strong: the same batch, in
    fewer or more microbatches as far as that goes. Payloads of weights stay as they are; those of
    activations, along the other axes, follow the rows. Where the planned mesh has no data axis,
    every microbatch's gradients are reduced along the new one.
    """
    factor = devices / step.devices
    shape, state = _resized(step.mesh_shape, devices)
    rows = 1 / factor if strong else 1.0  # a device has
    shards = math.prod(shape.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    if math.prod(shape.values()) != devices or (strong and shards > step.sequences):
        return None
    microbatches = max(1, round(step.microbatches * rows))
    time = step.compute_time
    exchanges = list(step.exchanges)
    if shape["data"] > 1 and step.mesh_shape["data"] == 1:
        gradients = Collective(
            kind="all-reduce", axes=("data",), group_size=1, payload=step.gradients,
            runs=step.microbatches,
        )  # fmt: skip
        exchanges.append(gradients)
    return replace(
        step,
        mesh_shape=shape,
        parameters=round(step.parameters * state),
        optimizer=round(step.optimizer * state),
        batch=round(step.batch * rows),
        temporaries=round(step.temporaries * rows * step.microbatches / microbatches),
        gradients=round(step.gradients * state),
        flops=step.flops * (1 if strong else factor),
        tokens=round(step.tokens * (1 if strong else factor)),
        sequences=step.sequences if strong else round(step.sequences * factor),
        microbatches=microbatches,
        exchanges=tuple(_on(exchanges, shape, rows, microbatches / step.microbatches)),
        compute_time=time and ComputeTime(time.model * rows, time.update * state),
    )


def _on(
    exchanges: Iterable[Collective], shape: Mapping[str, int], rows: float, repeats: float
) -> Iterable[Collective]:
    for each in exchanges:
        size = math.prod(shape[axis] for axis in each.axes)
        # A microbatch's weights are gathered and reduced as often as there are microbatches.
        times = repeats if _WEIGHTS & set(each.axes) else rows
        if size > 1:
            yield replace(each, group_size=size, payload=round(each.payload * times))


def _resized(mesh_shape: Mapping[str, int], devices: int) -> tuple[dict[str, int], float]:
    """Return the mesh on so many devices, and by what a device's share of the state grows."""
    shape = {axis: mesh_shape.get(axis, 1) for axis in AXES}
    state = 1.0
    wanted = devices / math.prod(shape.values())
    if wanted >= 1:
        return {**shape, "data": round(shape["data"] * wanted)}, state
    for axis in ("data", "fsdp", "context", "expert", "stage", "tensor"):
        smaller = max(1, round(shape[axis] * wanted))
        shrunk = shape[axis] / smaller
        shape[axis], wanted = smaller, wanted * shrunk
        state *= shrunk if axis not in ("data", "context") else 1
    return shape, state


def collective_seconds(each: Collective, mesh_shape: Mapping[str, int], chip: Chip) -> float:
    """Return the seconds that a collective takes in a step, with nothing hidden."""
    stride, near = 1, 1
    for axis in reversed(list(mesh_shape)):
        if axis in each.axes:
            near *= min(max(chip.fast_size // stride, 1), mesh_shape[axis])
        stride *= mesh_shape[axis]
    near, sent = min(near, each.group_size), each.payload * each.runs
    domains = each.group_size / near
    if each.kind in _BLOCK_BY_BLOCK:
        slow = sent * wire_share(each.kind, domains) / near
        fast = sent * wire_share(each.kind, near)
    elif each.kind == "collective-permute":  # the slowest of the messages decides
        slow, fast = (sent, 0) if domains > 1 else (0, sent)
    else:
        slow = sent * (each.group_size - near) / each.group_size
        fast = sent * (near - 1) / each.group_size
    return slow / chip.slow_bandwidth + fast / chip.fast_bandwidth
