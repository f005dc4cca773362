"""Memory breakdown of a run, and the flags that reduce it, for out-of-memory errors."""

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import jax

import tjx_parallel
from tjx_trainer.distillation.teacher import teacher_inputs
from tjx_trainer.runtime.out_of_memory import OutOfMemoryError, headline, is_out_of_memory
from tjx_trainer.training.build import Job
from tjx_trainer.training.train_state import bytes_on_device

_USABLE = 0.9  # of the memory that is left: allocators waste some
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@contextmanager
def explain_out_of_memory(job: Job) -> Iterator[None]:
    """Replace out-of-memory errors by one with a memory breakdown of the job.

    Raises
    ------
    OutOfMemoryError
        In place of the errors of JAX and Python.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        found = measure(job)
        raise OutOfMemoryError(
            "\n".join([headline(error), *table(found), *advice(job, found)])
        ) from error


class StepMemory(NamedTuple):
    """Memory of a training step on one device [bytes]; None where unknown.

    Attributes
    ----------
    params, opt_state, gradients : int
        Parameters, optimizer state and gradients.
    batch : int or None
        One batch.
    temporaries : int or None
        Other memory of the compiled step at its peak, mostly activations.
    capacity : int or None
        Memory of the device; for CPU devices, an equal share of the machine's.
    on_host : bool
        Whether the device is a CPU.
    """

    params: int
    opt_state: int
    gradients: int
    batch: int | None
    temporaries: int | None
    capacity: int | None
    on_host: bool

    @property
    def total(self) -> int:
        """Sum of the known parts [bytes]."""
        parts = (self.params, self.opt_state, self.gradients, self.batch, self.temporaries)
        return sum(part or 0 for part in parts)


def measure(job: Job, *, strict: bool = False) -> StepMemory:
    """Measure the memory of a job's training step per device, without allocating it.

    With phases it is that of the phase that needs the most.

    Parameters
    ----------
    job : Job
        The components of the run.
    strict : bool
        Whether to raise compiler errors other than out-of-memory; otherwise the temporaries are
        unknown then.
    """
    if job.phases:
        steps = [measure(each, strict=strict) for _, each in job.segments()]
        return max(steps, key=lambda each: each.total)
    state = job.abstract
    trained, opt_state = bytes_on_device(state.params), bytes_on_device(state.opt_state)
    frozen = teacher_inputs(job.teacher)
    params = trained + bytes_on_device((state.base, frozen))
    batch = step = None
    # Compiling needs all processes; compiling without memory may fail again.
    if jax.process_count() == 1:
        try:
            shapes = _abstract_batch(job.mesh, job.task.train_data.batch(0))
            batch = bytes_on_device(shapes)
            jitted: Any = job.train_step
            step = jitted.lower(job.abstract, {**shapes, **frozen}).compile().memory_analysis()
        except Exception as error:
            if strict and not is_out_of_memory(error):
                raise
    device = job.mesh.devices.flat[0]
    on_host = device.platform == "cpu"
    return StepMemory(
        params=params,
        opt_state=opt_state,
        gradients=trained,
        batch=batch,
        temporaries=None if step is None else max(step.temp_size_in_bytes - trained, 0),
        capacity=_host_share() if on_host else (device.memory_stats() or {}).get("bytes_limit"),
        on_host=on_host,
    )


def _abstract_batch(mesh: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    abstract: Any = jax.ShapeDtypeStruct  # JAX gives no types
    sharding = tjx_parallel.batch_sharding(mesh)
    return {
        name: abstract(array.shape, array.dtype, sharding=sharding) for name, array in rows.items()
    }


def _host_share() -> int:
    """Return the bytes of this machine's memory per local device."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    ours = machine if limit == resource.RLIM_INFINITY else min(machine, limit)
    return ours // jax.local_device_count()


def table(found: StepMemory) -> list[str]:
    """Format the memory breakdown as lines."""
    rows = {
        "parameters": found.params,
        "optimizer state": found.opt_state,
        "gradients": found.gradients,
        "batch": found.batch,
        "activations and other temporaries": found.temporaries,
        "total of the known parts": found.total,
        "share of this machine" if found.on_host else "memory of the device": found.capacity,
    }
    width = max(map(len, rows)) + 2
    return [
        "Memory of a training step per device:",
        *(f"  {name:<{width}}{format_bytes(size):>12}" for name, size in rows.items()),
    ]


def format_bytes(size: int | None) -> str:
    """Format a number of bytes with a binary unit.

    Examples
    --------
    >>> format_bytes(0), format_bytes(1536), format_bytes(5 * 2**30), format_bytes(None)
    ('0 B', '1.5 KiB', '5.0 GiB', 'unknown')
    """
    if size is None:
        return "unknown"
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{size / 2 ** (10 * power):.1f} {_UNITS[power]}" if power else f"{size} B"


def advice(job: Job, found: StepMemory) -> list[str]:
    """Return flags that reduce the memory of this run, cheapest first."""
    config = job.config
    lines = []
    state = found.params + found.opt_state + found.gradients
    if found.capacity is None or state < found.capacity:
        lines += _more_microbatches(job, found)
        if config.model.remat != "full":
            lines.append("--model.remat full: the same result, about a third slower")
    sharing = job.mesh.shape["data"] * job.mesh.shape["fsdp"]
    if not found.on_host and job.mesh.shape["data"] > 1:
        rest = "" if config.mesh.data == -1 else " --mesh.data 1"
        lines.append(
            f"--mesh.fsdp {sharing}{rest}: shards parameters and optimizer state; the same result "
            "up to rounding"
        )
    lines = [f"{line}; the same --run_dir can resume" for line in lines]
    if config.optimizer.moment_dtype == "float32":
        with suppress(ValueError):  # some optimizers do not support it
            replace(config.optimizer, moment_dtype="bfloat16")
            lines.append(
                "--optimizer.moment_dtype bfloat16: up to half of the optimizer state; a new run"
            )
    if config.train.precision == "fp32":
        lines.append("--train.precision bf16: about half of the activations; a new run")
    smaller = "--data.seq_len or model" if hasattr(config.model, "n_layer") else "model"
    lines.append(f"a smaller --train.batch_size, {smaller}: needs a new run")
    return ["Flags that reduce memory, cheapest first:", *(f"  {line}" for line in lines)]


def _more_microbatches(job: Job, found: StepMemory) -> list[str]:
    """Return the flag that increases the number of microbatches as much as necessary.

    The activations are those of one microbatch, which has at least one sequence per device.
    """
    sequences = job.config.train.batch_size // (job.mesh.shape["data"] * job.mesh.shape["fsdp"])
    finer = [n for n in range(job.accumulation + 1, sequences + 1) if sequences % n == 0]
    if not finer:
        return []
    pieces = finer[0]
    if found.temporaries is not None and found.capacity is not None:
        rest = found.capacity - (found.total - found.temporaries)
        needed = found.temporaries * job.accumulation
        pieces = next((n for n in finer if needed / n < _USABLE * rest), finer[-1])
    flag = f"--train.accumulation {pieces}"
    if job.config.train.accumulation is None and job.config.train.device_batch_size is not None:
        flag = f"--train.device_batch_size {sequences // pieces}"
    microbatch = sequences // pieces
    return [f"{flag}: {microbatch} sequences per device at once, the same result"]
