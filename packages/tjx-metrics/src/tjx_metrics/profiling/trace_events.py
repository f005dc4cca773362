"""Read the events of a `jax.profiler` trace: which operation ran, and for how long."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

_DEVICE = re.compile(r"/device:(GPU|TPU):\d+")


class Event(NamedTuple):
    """One execution of one operation.

    Attributes
    ----------
    module : str
        Name of the HLO module; empty if unknown.
    name : str
        Name of the HLO instruction, or of the kernel.
    seconds : float
        Self time: duration without nested events on the same line of the trace.
    """

    module: str
    name: str
    seconds: float


def find_trace(folder: Path) -> Path:
    """Return the latest trace (``*.xplane.pb``) below a folder.

    Raises
    ------
    FileNotFoundError
        If there is no trace.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(f"{folder} holds no trace (*.xplane.pb): was a step profiled?")
    return found[-1]


def read_events(trace: Path) -> list[Event]:
    """Return the device events of a trace: GPU kernels, or TPU and CPU operations.

    Parameters
    ----------
    trace : Path
        File ``*.xplane.pb``.
    """
    with warnings.catch_warnings():
        # Creating its types warns, and as an error the warning aborts the process.
        warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)
        return list(_plane_events(list(jax.profiler.ProfileData.from_file(str(trace)).planes)))


def _plane_events(planes: list[Any]) -> Iterator[Event]:
    devices = [plane for plane in planes if _DEVICE.fullmatch(plane.name)]
    # On CPU, the lines of the host's threads mix operations with other events.
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if _is_operation_line(plane.name, line.name):
                yield from _line_events(line.events, all_count=bool(devices))


def _is_operation_line(plane: str, line: str) -> bool:
    """Return whether a line holds operations; other lines repeat them by module or scope."""
    if "GPU" in plane:
        return line.lower().startswith("stream")
    return line == "XLA Ops" if "TPU" in plane else True


def _line_events(events: Any, *, all_count: bool) -> Iterator[Event]:
    """Yield the events of a line with their self times."""
    running: list[tuple[float, Event, list[float]]] = []  # end, event, durations of nested events
    ordered = sorted(events, key=lambda event: (event.start_ns, -event.duration_ns))
    for event in ordered:
        stats = {name: value for name, value in event.stats if name in ("hlo_op", "hlo_module")}
        if not (all_count or "hlo_op" in stats):
            continue
        # The name of a TPU event is the whole text of the instruction.
        name = str(stats.get("hlo_op") or event.name.split(" ")[0].lstrip("%"))
        start, seconds = float(event.start_ns), float(event.duration_ns) / 1e9
        while running and running[-1][0] <= start:
            yield _self_time(running)
        if running:
            running[-1][2].append(seconds)
        entry = Event(str(stats.get("hlo_module", "")), name, seconds)
        running.append((start + float(event.duration_ns), entry, []))
    while running:
        yield _self_time(running)


def _self_time(running: list[tuple[float, Event, list[float]]]) -> Event:
    _, event, nested = running.pop()
    return event._replace(seconds=max(0.0, event.seconds - sum(nested)))
