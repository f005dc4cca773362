"""Text and JSON report of a plan."""

import math
from collections.abc import Iterator
from typing import Any

from tjx_parallel.planning.chips import CHIPS
from tjx_parallel.planning.step_time import Plan, StepProfile, plan, scale_step
from tjx_parallel.roofline import report, to_json
from tjx_trainer.config.run_config import Config
from tjx_trainer.planning.compiled_step import PlannedStep
from tjx_trainer.runtime.memory_report import format_bytes
from tjx_trainer.scaling.dial import describe_dial

DEVICES = tuple(2**n for n in range(11))
MAX_GPU_FRACTION = 0.92  # the rest is for the driver and NCCL


def page(config: Config, found: Plan, planned: PlannedStep) -> str:
    """Format a plan as text.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    found : Plan
        The plan.
    planned : PlannedStep
        The compiled step of the plan.
    """
    step, chip = found.step, found.chip
    sizes = " x ".join(f"{axis} {size}" for axis, size in step.mesh_shape.items() if size > 1)
    lines = [
        f"{config.name} on {step.devices} {chip.name} ({sizes or 'one device'}), "
        f"{step.sequences:,} sequences a step in {step.microbatches} microbatches",
        *(f"  ({note})" for note in planned.notes),
        *describe_dial(config),
        "",
        "Memory per device:",
        *(f"  {name:<58}{format_bytes(size):>10}" for name, size in memory_rows(step)),
        f"  {'total':<58}{format_bytes(step.memory):>10}",
        f"  {f'available to JAX: {chip.usable:.0%} of {format_bytes(chip.memory)}':<58}"
        f"{format_bytes(chip.capacity):>10}",
        "",
        *fit_report(config, found),
        "",
        *_times(config, found),
        "",
        *_kernels(found, planned),
        *_scaling(found),
        "",
        f"Figures of {chip.name}: {chip.source}.",
    ]
    return "\n".join(lines) + "\n"


def memory_rows(step: StepProfile) -> list[tuple[str, int]]:
    """Return the parts of the memory per device [bytes]."""
    return [
        ("parameters", step.parameters),
        ("optimizer state", step.optimizer),
        ("batch", step.batch),
        ("temporaries: activations, gradients, gathered weights", step.temporaries),
    ]


def fit_report(config: Config, found: Plan) -> list[str]:
    """Describe whether a run fits into memory, and which flags would make it fit."""
    step, capacity = found.step, found.chip.capacity
    if found.fits:
        left = format_bytes(capacity - step.memory)
        return [f"It fits; {left} are free ({1 - step.memory / capacity:.0%})."]
    missing = format_bytes(step.memory - capacity)
    lines = [f"It does not fit: {missing} are missing. Possible changes:"]
    changes = [*_changes(config, found)]
    return lines + [f"  {change}" for change in changes or ["a smaller model or data.seq_len"]]


def _changes(config: Config, found: Plan) -> Iterator[str]:
    """Yield flags that reduce memory with an estimate each, cheapest first."""
    step, chip = found.step, found.chip
    state, shape = step.parameters + step.optimizer, step.mesh_shape
    rest = step.batch + step.temporaries

    def about(needed: float | int) -> str:
        result = "fits" if needed <= chip.capacity else "not enough alone"
        return f"about {format_bytes(round(needed))}, {result}"

    most = MAX_GPU_FRACTION * chip.memory
    if chip.platform == "cuda" and chip.capacity < step.memory <= most:
        usable = format_bytes(int(most))
        yield f"XLA_CLIENT_MEM_FRACTION={MAX_GPU_FRACTION} before the command: {usable}"
    shards = math.prod(shape[axis] for axis in ("data", "fsdp", "expert"))
    rows = step.sequences // shards // step.microbatches
    if rows > 1:
        room = chip.capacity - state
        fewer = [n for n in range(1, rows) if rows % n == 0 and rest * n / rows <= room]
        n = fewer[-1] if fewer else 1
        yield f"--train.device_batch_size {n} (now {rows}): {about(state + rest * n / rows)}"
    if config.model.remat != "full":
        yield "--model.remat full: fewer activations, a third more compute"
    if shape["fsdp"] > 1 and config.mesh.zero < 3:
        yield "--mesh.zero 3: parameters and gradients are sharded over fsdp too"
    if shape["data"] > 1:
        n = shape["data"]
        larger = f"--mesh.data 1 --mesh.fsdp {shape['fsdp'] * n}"
        yield f"{larger}: {about(state / n + rest)} (or less, with its gradients)"
    # Gradients are sharded too; the other temporaries are not.
    left = max(rest - step.gradients, 0)
    for n in (2**k for k in range(1, 11)):
        if (state + step.gradients) / n + left <= chip.capacity:
            yield (
                f"--mesh.fsdp {shape['fsdp'] * n} --chips {step.devices * n} (with "
                f"--train.batch_size {max(step.sequences, shards * n * step.microbatches)} "
                f"or more): {about((state + step.gradients) / n + left)}"
            )
            break
    if shape["tensor"] < 8 and config.model.n_head % (2 * shape["tensor"]) == 0:
        n = 2 * shape["tensor"]
        yield f"--mesh.tensor {n} --chips {step.devices * 2}: {about(step.memory / 2)}"
    if config.mesh.offload == "none":
        needed = step.memory - step.optimizer
        yield f"--mesh.offload optimizer: {about(needed)} between steps; slower"
    if config.optimizer.moment_dtype == "float32":
        yield (
            f"--optimizer.moment_dtype bfloat16: {about(step.memory - step.optimizer / 2)} at "
            "best; a new run"
        )
    larger_chips = [each.name for each in CHIPS.values() if each.capacity >= step.memory]
    if larger_chips:
        yield f"--chip {' or '.join(larger_chips)}"


def _times(config: Config, found: Plan) -> list[str]:
    step = found.step
    slow, fast = found.seconds
    low, high = found.efficiency
    few, many = found.tokens_per_second
    hours = [seconds * config.train.max_steps / 3600 for seconds in (fast, slow)]
    mfu = [step.flops / (seconds * step.devices * found.chip.flops) for seconds in (slow, fast)]
    waits = f", of {1 - step.bubble:.0%} of the time" if step.bubble else ""
    lines = [
        f"Step: {step.flops:.3g} FLOPs by formula, {step.tokens:,} tokens ({_basis(found)})",
        f"  compute        {_time(found.compute)}{waits}",
    ]
    by_seconds = sorted(found.communication.items(), key=lambda item: -item[1].seconds)
    lines += [
        f"  communication  {_time(sent.seconds)}, {_exchange(*key)}: "
        f"{format_bytes(round(sent.bytes))} sent per device"
        for key, sent in by_seconds
    ]
    return [
        *lines,
        f"  total          {_time(fast)} if all communication is hidden, {_time(slow)} if none is",
        f"  efficiency     {low:.1%} to {high:.1%}, MFU {mfu[0]:.1%} to {mfu[1]:.1%}",
        f"  tokens/s       {few:,.0f} to {many:,.0f}",
        f"  {config.train.max_steps:,} steps: {hours[0]:,.2f} to {hours[1]:,.2f} hours",
    ]


def _basis(found: Plan) -> str:
    """Describe the basis of the compute time."""
    chip, share = found.chip, found.compute_efficiency
    if share is None:
        return "compute time estimated from the compiled program"
    source = f": {chip.efficiency_source}" if share == chip.efficiency else ", as given"
    return f"assumed: compute at {share:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s{source}"


def _kernels(found: Plan, planned: PlannedStep) -> list[str]:
    """Describe the kernels of the program if the chip's own compiler produced it."""
    if planned.estimate is None:
        return []
    counted = planned.estimate.total().flops
    formula = found.step.flops / found.step.devices
    return [
        *report(planned.estimate),
        f"  FLOPs per device: {counted:.4g} in the program, {formula:.4g} by formula "
        f"({counted / formula:.3f}: without masked pairs, with recomputation)",
        "",
    ]


def _scaling(found: Plan) -> list[str]:
    lines = [
        "Scaling, predicted from this step (efficiency with no and all communication hidden):",
        "  devices   weak scaling         tokens/s up to   strong scaling",
    ]
    for count in DEVICES:
        weak, strong = (scaled_plan(found, count, strong=strong) for strong in (False, True))
        if weak is None:
            continue
        tokens = f"{weak.tokens_per_second[1]:,.0f}"
        lines.append(f"  {count:7,}   {_band(weak):<20} {tokens:>15}   {_band(strong)}".rstrip())
    return lines


def scaled_plan(found: Plan, devices: int, *, strong: bool) -> Plan | None:
    """Return the plan on another number of devices; None if the step cannot be scaled to it."""
    step = scale_step(found.step, devices, strong=strong)
    if step is None:
        return None
    return plan(step, found.chip, compute_efficiency=found.compute_efficiency)


def _band(found: Plan | None) -> str:
    if found is None:
        return ""
    low, high = found.efficiency
    return f"{low:.0%} to {high:.0%}" + ("" if found.fits else ", no fit")


def _exchange(kind: str, axes: tuple[str, ...]) -> str:
    return f"{kind} over {'+'.join(axes)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:9,.1f} ms"


def summary(found: Plan, planned: PlannedStep) -> dict[str, Any]:
    """Return a plan as JSON: bytes, seconds and FLOPs."""
    step, chip = found.step, found.chip
    points = []
    for count in DEVICES:
        for name, strong in (("weak", False), ("strong", True)):
            at = scaled_plan(found, count, strong=strong)
            if at is not None:
                points.append({
                    "devices": count, "scaling": name, "efficiency": at.efficiency,
                    "tokens_per_second": at.tokens_per_second, "fits": at.fits,
                })  # fmt: skip
    return {
        "chip": chip.name,
        "mesh": dict(step.mesh_shape),
        "memory": {
            "parameters": step.parameters, "optimizer": step.optimizer, "batch": step.batch,
            "temporaries": step.temporaries, "total": step.memory, "capacity": chip.capacity,
        },
        "fits": found.fits,
        "flops": step.flops,
        "tokens": step.tokens,
        "compute_efficiency": found.compute_efficiency,
        "compute_seconds": found.compute,
        "communication": {
            _exchange(*key): {"bytes": sent.bytes, "seconds": sent.seconds}
            for key, sent in found.communication.items()
        },
        "step_seconds": found.seconds,
        "efficiency": found.efficiency,
        "tokens_per_second": found.tokens_per_second,
        "kernels": None if planned.estimate is None else to_json(planned.estimate),
        "scaling": points,
        "notes": planned.notes,
    }  # fmt: skip
