"""Reading what `jax.profiler` recorded: which operation ran on which device, and for how long."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

_DEVICE = re.compile(r"/device:(GPU|TPU):\d+")


class Event(NamedTuple):
    """One run of one operation.

    Attributes
    ----------
    module : str
        The program, as HLO names it; empty where it is not known.
    name : str
        The instruction of the program, or else the kernel.
    seconds : float
        How long it ran, without what ran within it on the same line of the trace.
    """

    module: str
    name: str
    seconds: float


def find_trace(folder: Path) -> Path:
    """Return the latest trace (``*.xplane.pb``) below a folder.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(f"{folder} holds no trace (*.xplane.pb): was a step profiled?")
    return found[-1]


def read_events(trace: Path) -> list[Event]:
    """Return what ran on the devices: kernels of GPUs, operations of TPUs and CPUs.

    Parameters
    ----------
    trace : Path
        A file ``*.xplane.pb``.
    """
    with warnings.catch_warnings():
        # Its types are made at first sight, which warns; as an error that ends the process.
        warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)
        return list(_of_planes(list(jax.profiler.ProfileData.from_file(str(trace)).planes)))


def _of_planes(planes: list[Any]) -> Iterator[Event]:
    devices = [plane for plane in planes if _DEVICE.fullmatch(plane.name)]
    # Where the host is the device, its threads hold the operations among other events.
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if _holds_work(plane.name, line.name):
                yield from _of_line(line.events, all_count=bool(devices))


def _holds_work(plane: str, line: str) -> bool:
    """Tell whether a line has the events themselves: others repeat them by module, or by scope."""
    if "GPU" in plane:
        return line.lower().startswith("stream")
    return line == "XLA Ops" if "TPU" in plane else True


def _of_line(events: Any, *, all_count: bool) -> Iterator[Event]:
    """Yield the events of a line, each with its own time only."""
    running: list[tuple[float, Event, list[float]]] = []  # end, event, times of what ran within
    ordered = sorted(events, key=lambda event: (event.start_ns, -event.duration_ns))
    for event in ordered:
        stats = {name: value for name, value in event.stats if name in ("hlo_op", "hlo_module")}
        if not (all_count or "hlo_op" in stats):
            continue
        # A TPU's events are called by the whole text of the instruction.
        name = str(stats.get("hlo_op") or event.name.split(" ")[0].lstrip("%"))
        begin, seconds = float(event.start_ns), float(event.duration_ns) / 1e9
        while running and running[-1][0] <= begin:
            yield _without_inner(running)
        if running:
            running[-1][2].append(seconds)
        entry = Event(str(stats.get("hlo_module", "")), name, seconds)
        running.append((begin + float(event.duration_ns), entry, []))
    while running:
        yield _without_inner(running)


def _without_inner(running: list[tuple[float, Event, list[float]]]) -> Event:
    _, event, inner = running.pop()
    return event._replace(seconds=max(0.0, event.seconds - sum(inner)))
