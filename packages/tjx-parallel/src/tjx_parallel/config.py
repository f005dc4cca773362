"""Configuration of meshes and multi-process runs. Standard library only."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

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
    ValueError
        With one line for each invalid field.

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
            f"{axis} = {size}: must be 1 or more, or -1 for all devices that are left"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        filling = [axis for axis, size in sizes.items() if size == -1]
        if len(filling) > 1:
            problems.append(
                f"{' and '.join(filling)} are -1: one axis at most can take all devices that are "
                "left; set the others to 1 or more"
            )
        if self.virtual_stages < 2:
            problems.append(
                f"virtual_stages = {self.virtual_stages}: must be 2 or more; 1 is pipeline 1f1b"
            )
        try:
            self.rows()
        except ValueError as error:
            problems += str(error).splitlines()
        if problems:
            raise ValueError("\n".join(problems))

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
        ValueError
            If the product of the sizes is not that number of devices.
        """
        sizes = self._sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
        filling = [axis for axis, size in sizes.items() if size == -1]
        if filling:
            if device_count % fixed:
                raise ValueError(
                    f"mesh {text} needs a multiple of {fixed} devices, there are {device_count}: "
                    "choose sizes whose product divides it"
                )
            sizes[filling[0]] = device_count // fixed
        elif fixed != device_count:
            raise ValueError(
                f"mesh {text or 'of 1 device'} needs {fixed} devices, there are {device_count}: "
                "set one axis to -1 to use all, or pass the devices to use"
            )
        return sizes

    def rows(self) -> dict[str, tuple[str, ...]]:
        """Parse `rules`: logical axis -> mesh axes.

        Raises
        ------
        ValueError
            For a malformed rule or an unknown mesh axis.

        Examples
        --------
        >>> MeshConfig(rules=("vocab=", "mlp=fsdp+tensor")).rows()
        {'vocab': (), 'mlp': ('fsdp', 'tensor')}
        """
        rows: dict[str, tuple[str, ...]] = {}
        problems = []
        for text in self.rules:
            name, equals, right = (part.strip() for part in text.partition("="))
            axes = tuple(axis.strip() for axis in right.split("+") if axis.strip())
            unknown = [axis for axis in axes if axis not in AXES]
            if name == "batch":
                problems.append("rules: the row batch stays: by it processes load their sequences")
            if not name or not equals or unknown:
                problems.append(
                    f"rules: {text!r} is no row such as vocab=tensor or mlp=fsdp+tensor; the mesh "
                    f"has the axes {', '.join(AXES)}"
                )
            rows[name] = axes
        if problems:
            raise ValueError("\n".join(problems))
        return rows

    @property
    def chunks_per_stage(self) -> int:
        """Chunks of the model per stage."""
        return self.virtual_stages if self.pipeline == "interleaved_1f1b" else 1

    def _sizes(self) -> dict[str, int]:
        return {axis: size for axis, size in asdict(self).items() if axis in get_args(Axis)}


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
    ValueError
        With one line for each invalid field.
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
            problems += [f"{name} is missing: give all of {', '.join(given)}" for name in missing]
        for name in ("coordinator", "bind_address"):
            address = getattr(self, name)
            if address is not None and not address.rpartition(":")[2].isdecimal():
                problems.append(f"{name} = {address!r}: must be host:port, e.g. 10.0.0.1:1234")
        count, index = self.num_processes, self.process_id
        if count is not None and count < 1:
            problems.append(f"num_processes = {count}: must be 1 or more")
        if count is not None and index is not None and not 0 <= index < count:
            problems.append(f"process_id = {index}: must be from 0 to {count} - 1")
        for name in ("heartbeat_timeout", "start_timeout"):
            if (seconds := getattr(self, name)) < 1:
                problems.append(f"{name} = {seconds}: must be 1 or more")
        if problems:
            raise ValueError("\n".join(problems))
