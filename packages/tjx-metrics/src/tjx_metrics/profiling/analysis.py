"""Where the time of profiled steps went: the costliest operations, and shares by kind."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tjx_metrics.profiling.hlo import CONTAINERS, KINDS, Instruction, instructions, kind_of_kernel
from tjx_metrics.profiling.trace_events import Event, find_trace, read_events

# Parts of an op_name that loops, branches and transformations leave.
_MACHINERY = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|rematted_computation|jvp\(\)"
)


class Operation(NamedTuple):
    """All runs of one operation.

    Attributes
    ----------
    name : str
        The instruction of the compiled program, or the kernel.
    kind : str
        One of "attention", "matmul", "loss", "optimizer", "communication", "other".
    seconds : float
        Time of all runs on all devices that were traced.
    share : float
        Of the time of all operations.
    runs : int
        How often it ran.
    source : str
        Functions and scopes of the model that it comes from, as JAX names them.
    """

    name: str
    kind: str
    seconds: float
    share: float
    runs: int
    source: str


class ProfileReport(NamedTuple):
    """What a trace says.

    Attributes
    ----------
    seconds : float
        Time of all operations, added up over devices and streams.
    operations : list of Operation
        The costliest first.
    shares : dict
        Kind -> share of `seconds`; together 1.
    """

    seconds: float
    operations: list[Operation]
    shares: Mapping[str, float]

    def text(self, count: int = 10) -> str:
        """Write the shares, and so many of the costliest operations, in lines of 80 columns."""
        shares = [f"{kind} {self.shares[kind]:.1%}" for kind in KINDS]
        lines = [
            f"time by kind   {', '.join(shares[:4])},",
            f"               {', '.join(shares[4:])}",
            f"{'ms':>9} {'share':>6} {'runs':>6}  {'kind':13} operation",
        ]
        for each in self.operations[:count]:
            what = _short(each.source) or each.name
            lines.append(
                f"{1e3 * each.seconds:9.2f} {each.share:6.1%} {each.runs:6}  {each.kind:13} "
                f"{what:.41}"
            )
        return "\n".join(lines)

    def to_json(self, count: int = 30) -> str:
        """Return the report as JSON for programs: ``seconds``, ``shares``, ``operations``.

        Parameters
        ----------
        count : int
            How many of the costliest operations are listed, with the fields of `Operation`.
        """
        operations = [each._asdict() for each in self.operations[:count]]
        content = {"seconds": self.seconds, "shares": dict(self.shares), "operations": operations}
        return json.dumps(content, indent=1) + "\n"


def profile_report(trace: Path | str, programs: Sequence[str] = ()) -> ProfileReport:
    """Analyse a trace.

    Parameters
    ----------
    trace : path
        A file ``*.xplane.pb``, or a folder: the latest below it is taken.
    programs : sequence of str
        Texts of the compiled functions that ran (``compiled.as_text()``): from them the kinds and
        sources are known. An operation of no such program is told by the name of its kernel.

    Returns
    -------
    ProfileReport
        Operations and shares. Waiting is not in them: only what ran.

    Raises
    ------
    FileNotFoundError
        If there is no trace.
    ValueError
        If no operation ran in it.
    """
    trace = Path(trace)
    path = find_trace(trace) if trace.is_dir() else trace
    known: dict[str, dict[str, Instruction]] = defaultdict(dict)
    for name, found in map(instructions, programs):  # a function may have been compiled twice
        known[name] |= found
    return _summed(read_events(path), known, path)


def _summed(
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
    """Find the instruction that an event ran, of which a kernel may write the dot as _."""
    names = (event.name, re.sub(r"_(\d+)$", r".\1", event.name))
    # A kernel that a graph of CUDA launched does not know its program.
    known = [programs[event.module]] if event.module in programs else []
    known = known or ([] if event.module else list(programs.values()))
    for program in known:
        for name in names:
            if name in program:
                return program[name]
    opcode = re.sub(r"[._]\d+$", "", event.name)
    return Instruction(opcode, kind_of_kernel(event.name), "")


def _short(source: str) -> str:
    """Write the end of an op_name, which says most: the last scopes and the primitive."""
    parts = source.replace("transpose(jvp())", "backward").split("/")[1:]
    text = "/".join(part for part in parts if not _MACHINERY.fullmatch(part))
    return text if len(text) <= 41 else "..." + text[-38:]
