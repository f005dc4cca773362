"""Memory, step time and scaling of a training step from the profile of one compiled step.

The compute time is the estimate for the compiled program (`tjx_parallel.roofline`), or without one
FLOPs at a share of the peak rate.

A collective over n devices, k of them in one fast domain, runs as a ring over the n / k domains on
k parallel slow links, then as a ring over the k devices on fast links. The step time is between
max(compute, communication), fully overlapped, and their sum.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tjx_parallel.config import AXES
from tjx_parallel.planning.chips import Chip
from tjx_parallel.planning.collectives import Collective, wire_share

_BLOCK_BY_BLOCK = ("all-reduce", "all-gather", "reduce-scatter")
_WEIGHTS = {"data", "fsdp"}  # payloads along these axes are independent of the rows


class ComputeTime(NamedTuple):
    """Estimated compute seconds of a compiled step on one device, without collectives.

    Attributes
    ----------
    model
        Forward and backward pass, proportional to the rows.
    update
        Optimizer and other work once per step, proportional to the state.
    """

    model: float
    update: float


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Memory, FLOPs, tokens and collectives of a step on a mesh; bytes are per device.

    Attributes
    ----------
    mesh_shape
        Size by axis, outer to inner.
    parameters, optimizer, batch, temporaries
        Bytes. Temporaries are everything else at the peak: activations, gradients, gathered
        weights.
    gradients
        Bytes of the gradients in the dtype of their reduction; part of the temporaries.
    flops
        FLOPs of all devices by formula, including recomputation.
    tokens, sequences, microbatches
        Number per step.
    exchanges
        Collectives of the compiled step.
    bubble
        Share of the time in which a pipeline stage is idle.
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
        """Number of devices of the mesh."""
        return math.prod(self.mesh_shape.values())

    @property
    def memory(self) -> int:
        """Peak memory in bytes."""
        return self.parameters + self.optimizer + self.batch + self.temporaries


class Sent(NamedTuple):
    """Bytes that a device sends in a step, and the time in seconds."""

    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimated cost of a step on a chip. Pairs are bounds: no overlap, and full overlap.

    Attributes
    ----------
    step, chip
        Profile of the step, and the accelerator.
    compute_efficiency
        Assumed share of the chip's peak FLOP/s; None if `compute` is that of the compiled program.
    compute
        Seconds, of the compiled program or by formula: FLOPs plus the memory traffic of the
        optimizer update.
    communication
        Bytes and seconds by (kind, axes).
    """

    step: StepProfile
    chip: Chip
    compute_efficiency: float | None
    compute: float
    communication: Mapping[tuple[str, tuple[str, ...]], Sent]

    @property
    def fits(self) -> bool:
        """Whether the peak memory fits the chip."""
        return self.step.memory <= self.chip.capacity

    @property
    def seconds(self) -> tuple[float, float]:
        """Step time in seconds; pipeline stages are busy for 1 - bubble of it."""
        sent = sum(each.seconds for each in self.communication.values())
        busy = self.compute / (1 - self.step.bubble)
        return busy + sent, max(busy, sent)

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the step time spent computing."""
        slow, fast = self.seconds
        return self.compute / slow, self.compute / fast

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Tokens per second of all devices."""
        slow, fast = self.seconds
        return self.step.tokens / slow, self.step.tokens / fast


def plan(step: StepProfile, chip: Chip, *, compute_efficiency: float | None = None) -> Plan:
    """Estimate memory and time of a step on a chip.

    Parameters
    ----------
    step
        Profile of the step.
    chip
        The accelerator.
    compute_efficiency
        Assumed share of the chip's peak FLOP/s. None uses the time of the compiled program, or
        without one the chip's published share.

    Returns
    -------
    Plan
        Memory in bytes and time in seconds.

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
    """Extrapolate the profile of a step to another number of devices; None if impossible.

    Outer axes grow and shrink: data, then fsdp and the others, so fewer devices hold more of the
    state each. Weak scaling keeps the rows per device; strong scaling keeps the batch and adapts
    the microbatches if possible. Payloads of weights are constant; those of activations, along the
    other axes, are proportional to the rows. If the profiled mesh has no data axis, the gradients
    of every microbatch are reduced along the new one.

    Parameters
    ----------
    step : StepProfile
        The profile of a compiled step.
    devices : int
        The number of devices to extrapolate to.
    strong : bool
        Whether the batch stays (strong scaling), or the rows per device (weak scaling).

    Returns
    -------
    StepProfile or None
        The extrapolated profile.
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
        # Weights are gathered and gradients reduced once per microbatch.
        times = repeats if _WEIGHTS & set(each.axes) else rows
        if size > 1:
            yield replace(each, group_size=size, payload=round(each.payload * times))


def _resized(mesh_shape: Mapping[str, int], devices: int) -> tuple[dict[str, int], float]:
    """Return the mesh on `devices` devices and the growth factor of the state per device."""
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
    """Return the seconds of a collective in a step, without overlap."""
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
    elif each.kind == "collective-permute":  # the slowest message dominates
        slow, fast = (sent, 0) if domains > 1 else (0, sent)
    else:
        slow = sent * (each.group_size - near) / each.group_size
        fast = sent * (near - 1) / each.group_size
    return slow / chip.slow_bandwidth + fast / chip.fast_bandwidth
