"""Configuration of meshes and multi-process runs. Standard library and tjx_core only."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from tjx_core import ConfigError, Problem

AXES = ("stage", "data", "fsdp", "context", "expert", "tensor")
"""Mesh axes, outer to inner; the last one has the most communication."""

Axis = Literal["stage", "data", "fsdp", "context", "expert", "tensor"]
ContextKind = Literal["ring", "all_to_all"]
PipelineKind = Literal["gpipe", "1f1b", "interleaved_1f1b"]
ReduceDtype = Literal["float32", "bfloat16"]
Offload = Literal["none", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes and options of the parallelism.

    Attributes
    ----------
    stage
        Pipeline stages, which divide the layers; -1 takes all remaining devices.
    data
        Data parallelism: same parameters, different sequences; -1 takes all remaining devices.
    fsdp
        Devices that shard parameters, optimizer state and sequences; -1 takes all remaining ones.
    context
        Devices that shard the tokens of each sequence; -1 takes all remaining ones.
    expert
        Devices that shard experts and sequences; -1 takes all remaining ones.
    tensor
        Devices that shard heads and hidden dimensions of each layer; -1 takes all remaining ones.
    zero
        What fsdp shards (ZeRO stage): 1 optimizer state, 2 gradients too, 3 parameters too.
    sequence_parallel
        Whether tensor shards the tokens of the residual stream; else it is replicated over tensor.
    context_kind
        Context parallelism: ring attention, or all-to-all of heads and tokens (Ulysses).
    pipeline
        Pipeline schedule of the microbatches (their number is train.accumulation).
    virtual_stages
        Chunks of the model per stage, for pipeline interleaved_1f1b.
    reduce_dtype
        Dtype in which weight gradients are reduced over devices.
    offload
        What is stored in host memory between steps: nothing, or the optimizer state.
    rules
        Sharding rules to replace, from logical to mesh axes: vocab=,mlp=fsdp+tensor.

    Raises
    ------
    ConfigError
        With every invalid field.

    Examples
    --------
    >>> MeshConfig(fsdp=4).axis_sizes(8)["data"]
    2
    """

    stage: int = 1
    data: int = -1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    zero: Literal[1, 2, 3] = 3
    sequence_parallel: bool = True
    context_kind: ContextKind = "ring"
    pipeline: PipelineKind = "1f1b"
    virtual_stages: int = 2
    reduce_dtype: ReduceDtype = "float32"
    offload: Offload = "none"
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = self._sizes()
        problems = [
            Problem(axis, f"got {size}; expected at least 1, or -1 for all remaining devices")
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        first, *others = [axis for axis, size in sizes.items() if size == -1] or [""]
        if others:
            message = (
                f"got -1, as {' and '.join(others)}; expected -1 for at most one axis, which takes "
                "all remaining devices; set the others to 1 or more"
            )
            problems.append(Problem(first, message, tuple(others)))
        if self.virtual_stages < 2:
            message = f"got {self.virtual_stages}; expected at least 2; for 1 use pipeline 1f1b"
            problems.append(Problem("virtual_stages", message))
        problems += self._rules_problems()
        if problems:
            raise ConfigError(problems)

    def axis_sizes(self, device_count: int) -> dict[str, int]:
        """Return the size of each axis on ``device_count`` devices, with -1 resolved.

        Parameters
        ----------
        device_count
            Number of devices.

        Returns
        -------
        dict
            Size by name of the axis, outer to inner.

        Raises
        ------
        ConfigError
            If the product of the sizes is not that number of devices.
        """
        sizes = self._sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
        filling = [axis for axis, size in sizes.items() if size == -1]
        if filling:
            if device_count % fixed:
                message = (
                    f"got {text}, which needs a multiple of {fixed} devices; expected a divisor of "
                    f"{device_count}, the number of devices; choose other sizes"
                )
                raise ConfigError([Problem("mesh", message)])
            sizes[filling[0]] = device_count // fixed
        elif fixed != device_count:
            message = (
                f"got {text or 'all sizes 1'}, which needs {fixed} devices; expected "
                f"{device_count}, the number of devices; set one axis to -1 to use all, or pass "
                "the devices to use"
            )
            raise ConfigError([Problem("mesh", message)])
        return sizes

    def rows(self) -> dict[str, tuple[str, ...]]:
        """Parse `rules`: logical axis -> mesh axes.

        Examples
        --------
        >>> MeshConfig(rules=("vocab=", "mlp=fsdp+tensor")).rows()
        {'vocab': (), 'mlp': ('fsdp', 'tensor')}
        """
        return {name: axes for name, _, axes in map(_parse_row, self.rules)}

    @property
    def chunks_per_stage(self) -> int:
        """Chunks of the model per stage."""
        return self.virtual_stages if self.pipeline == "interleaved_1f1b" else 1

    def _rules_problems(self) -> list[Problem]:
        problems = []
        for text in self.rules:
            name, equals, axes = _parse_row(text)
            if name == "batch":
                message = (
                    f"got {text!r}; expected no row for batch, whose axes determine the sequences "
                    "that a process loads; remove it"
                )
                problems.append(Problem("rules", message))
            if not name or not equals or not set(axes) <= set(AXES):
                message = (
                    f"got {text!r}; expected a row such as vocab=tensor or mlp=fsdp+tensor, with "
                    f"the mesh axes {', '.join(AXES)}"
                )
                problems.append(Problem("rules", message))
        return problems

    def _sizes(self) -> dict[str, int]:
        return {axis: size for axis, size in asdict(self).items() if axis in get_args(Axis)}


def _parse_row(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Split a sharding rule into the logical axis, "=" (or "" without one) and the mesh axes."""
    name, equals, right = (part.strip() for part in text.partition("="))
    return name, equals, tuple(axis.strip() for axis in right.split("+") if axis.strip())


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Coordinator address, process count and id; not needed on clusters that JAX detects.

    Attributes
    ----------
    coordinator
        host:port of process 0, the same in all processes; None: environment or cluster detection.
    num_processes
        Number of processes; None: environment or cluster detection.
    process_id
        Id of this process, from 0; None: environment or cluster detection.
    bind_address
        host:port on which process 0 listens; None: that of the coordinator.
    heartbeat_timeout
        Seconds without a heartbeat after which a process counts as dead and the others exit.
    start_timeout
        Timeout in seconds for all processes to start.

    Raises
    ------
    ConfigError
        With every invalid field.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    bind_address: str | None = None
    heartbeat_timeout: int = 100
    start_timeout: int = 300

    def __post_init__(self) -> None:
        given = {
            "coordinator": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        problems = []
        if missing and len(missing) < len(given):
            message = f"got none; expected all of {', '.join(given)}, or none of them; give it"
            problems += [Problem(name, message, tuple({*given} - {name})) for name in missing]
        for name in ("coordinator", "bind_address"):
            address = getattr(self, name)
            if address is not None and not address.rpartition(":")[2].isdecimal():
                message = f"got {address!r}; expected host:port, such as 10.0.0.1:1234"
                problems.append(Problem(name, message))
        count, index = self.num_processes, self.process_id
        if count is not None and count < 1:
            problems.append(Problem("num_processes", f"got {count}; expected at least 1"))
        if count is not None and index is not None and not 0 <= index < count:
            message = f"got {index}; expected 0 to {count - 1}, as num_processes is {count}"
            problems.append(Problem("process_id", message, ("num_processes",)))
        for name in ("heartbeat_timeout", "start_timeout"):
            if (seconds := getattr(self, name)) < 1:
                problems.append(Problem(name, f"got {seconds}; expected at least 1 second"))
        if problems:
            raise ConfigError(problems)
