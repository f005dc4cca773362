"""Analyze a profile: most expensive operations, and fractions of time by kind."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tjx_metrics.profiling.hlo import (
    CONTAINERS,
    KINDS,
    Instruction,
    instructions,
    kind_of_kernel,
)
from tjx_metrics.profiling.trace_events import Event, find_trace, read_events

# Parts of an op_name that come from control flow and transformations.
_CONTROL_FLOW = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|rematted_computation|jvp\(\)"
)


class Operation(NamedTuple):
    """All executions of one operation.

    Attributes
    ----------
    name : str
        Name of the HLO instruction or of the kernel.
    kind : str
        One of "attention", "matmul", "loss", "optimizer", "communication", "other".
    seconds : float
        Total time over all traced devices.
    share : float
        Fraction of the time of all operations.
    runs : int
        Number of executions.
    source : str
        JAX's op_name: the functions and scopes of the model.
    """

    name: str
    kind: str
    seconds: float
    share: float
    runs: int
    source: str


class ProfileReport(NamedTuple):
    """Summary of a trace.

    Attributes
    ----------
    seconds : float
        Time of all operations, summed over devices and streams.
    operations : list of Operation
        Sorted by time, most expensive first.
    shares : dict
        Kind -> fraction of `seconds`; the fractions sum to 1.
    """

    seconds: float
    operations: list[Operation]
    shares: Mapping[str, float]

    def text(self, count: int = 10) -> str:
        """Format the shares and the `count` most expensive operations in lines of 80 columns.

        Parameters
        ----------
        count : int
            Number of operations.

        Returns
        -------
        str
            The lines.
        """
        shares = [f"{kind} {self.shares[kind]:.1%}" for kind in KINDS]
        lines = [
            f"time by kind   {', '.join(shares[:4])},",
            f"               {', '.join(shares[4:])}",
            f"{'ms':>9} {'share':>6} {'runs':>6}  {'kind':13} operation",
        ]
        for each in self.operations[:count]:
            label = _short(each.source) or each.name
            lines.append(
                f"{1e3 * each.seconds:9.2f} {each.share:6.1%} {each.runs:6}  {each.kind:13} "
                f"{label:.41}"
            )
        return "\n".join(lines)

    def to_json(self, count: int = 30) -> str:
        """Return the report as JSON with the keys ``seconds``, ``shares`` and ``operations``.

        Parameters
        ----------
        count : int
            Number of operations listed, with the fields of `Operation`.

        Returns
        -------
        str
            One JSON object.
        """
        operations = [each._asdict() for each in self.operations[:count]]
        content = {"seconds": self.seconds, "shares": dict(self.shares), "operations": operations}
        return json.dumps(content, indent=1) + "\n"


def profile_report(trace: Path | str, programs: Sequence[str] = ()) -> ProfileReport:
    """Summarize a trace.

    Parameters
    ----------
    trace : path
        A file ``*.xplane.pb``, or a folder, of which the latest trace is read.
    programs : sequence of str
        HLO texts of the compiled functions (``compiled.as_text()``), which determine kinds and
        sources. Operations that no program names are classified by the name of their kernel.

    Returns
    -------
    ProfileReport
        Operations and shares. Idle time is not included.

    Raises
    ------
    FileNotFoundError
        If there is no trace.
    ValueError
        If the trace has no operations.
    """
    trace = Path(trace)
    path = find_trace(trace) if trace.is_dir() else trace
    known: dict[str, dict[str, Instruction]] = defaultdict(dict)
    for name, found in map(instructions, programs):  # a function may have been compiled twice
        known[name] |= found
    return _summarize(read_events(path), known, path)


def _summarize(
    events: Iterable[Event], programs: Mapping[str, Mapping[str, Instruction]], path: Path
) -> ProfileReport:
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for event in events:
        instruction = _look_up(event, programs)
        if instruction.opcode in CONTAINERS:
            continue
        key = (event.name, instruction.kind, instruction.source)
        seconds[key] += event.seconds
        counts[key] += 1
    total = sum(seconds.values())
    if total <= 0:
        raise ValueError(f"{path}: no operation of a device is in this trace")
    operations = [
        Operation(name, kind, time, time / total, counts[name, kind, source], source)
        for (name, kind, source), time in seconds.items()
    ]
    shares = {kind: sum(each.share for each in operations if each.kind == kind) for kind in KINDS}
    return ProfileReport(total, sorted(operations, key=lambda each: -each.seconds), shares)


def _look_up(event: Event, programs: Mapping[str, Mapping[str, Instruction]]) -> Instruction:
    """Find the HLO instruction of an event; kernels may replace the dot in its name by ``_``."""
    names = (event.name, re.sub(r"_(\d+)$", r".\1", event.name))
    # Kernels launched by a CUDA graph have no module: search all programs.
    known = [programs[event.module]] if event.module in programs else []
    known = known or ([] if event.module else list(programs.values()))
    for program in known:
        for name in names:
            if name in program:
                return program[name]
    opcode = re.sub(r"[._]\d+$", "", event.name)
    return Instruction(opcode, kind_of_kernel(event.name), "")


def _short(source: str) -> str:
    """Shorten an op_name to its last scopes and its primitive, at most 41 characters."""
    parts = source.replace("transpose(jvp())", "backward").split("/")[1:]
    text = "/".join(part for part in parts if not _CONTROL_FLOW.fullmatch(part))
    return text if len(text) <= 41 else "..." + text[-38:]
