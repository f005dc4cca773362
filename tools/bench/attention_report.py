"""Report of the attention benchmark: statistics, ratios, goals and the printed table.

Computed from the JSON of the benchmark; this module measures nothing.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from attention_cases import PASSES, Case, Pass, gpt2_medium
from attention_worker import Json

# GPU kernels of tjx; the other implementations call the peers' kernels.
KERNELS = ("tjx/mosaic_gpu", "tjx/triton")
DENSE = "jax.nn/xla"
CUDNN = ("jax.nn/cudnn", "torch/cudnn")


# Value of a goal at one case and its implementations; None if not measured.
type Value = Callable[[Json], tuple[float, str] | None]


class Spread(NamedTuple):
    """Statistics over rounds of the seconds per call."""

    median: float
    least: float
    most: float


class Goal(NamedTuple):
    """One goal of the package: `value` must be at least `limit`.

    Attributes
    ----------
    value
        Worst value over the relevant cases; None if one was not measured.
    where
        Case and implementations of the value, or the reason for its absence.
    """

    text: str
    limit: float
    value: float | None
    where: str

    @property
    def verdict(self) -> str:
        """Verdict of the goal."""
        if self.value is None:
            return "not measured"
        return "reached" if self.value >= self.limit else "missed"

    def line(self) -> str:
        """Format the goal as one line for the terminal."""
        value = "" if self.value is None else f"{self.value:.3g} (at least {self.limit:g}), "
        return f"goal {self.text}: {self.verdict}: {value}{self.where}"


def spread(values: Sequence[float]) -> Spread:
    """Summarize values over the rounds."""
    return Spread(statistics.median(values), min(values), max(values))


def clock(entry: Json) -> str:
    """Return "device" if every round and pass has a device time, else "host"."""
    for name in ("device", "events"):
        rounds = [entry["times"][which] for which in PASSES]
        if all(times.get(name) is not None for each in rounds for times in each):
            return name
    return "host"


def seconds(entry: Json, which: Pass, by: str | None = None) -> Spread:
    """Summarize one pass of an entry by the clock of `clock`, or by `by`."""
    return spread([times[by or clock(entry)] for times in entry["times"][which]])


def entries(record: Json) -> dict[str, Json]:
    """Return the measured entries of a case."""
    return {entry["name"]: entry for entry in record["entries"] if entry.get("times")}


def is_ours(name: str) -> bool:
    """Return whether an entry is an implementation of tjx."""
    return name.startswith("tjx/")


def best(record: Json, which: Pass, names: Callable[[str], bool]) -> tuple[str, float] | None:
    """Return the entry with the lowest median time among those selected by `names`."""
    found = {
        name: seconds(entry, which).median for name, entry in entries(record).items() if names(name)
    }
    return min(found.items(), key=lambda item: item[1]) if found else None


def figures(record: Json) -> Json:
    """Return one case's TFLOP/s by entry and pass, and the skipped or failed entries."""
    case = Case(**record["case"])
    speed = {
        name: {
            which: round(case.flops(which) / seconds(entry, which).median / 1e12, 4)
            for which in PASSES
        }
        for name, entry in entries(record).items()
    }
    left_out = {e["name"]: e["skipped"] for e in record["entries"] if e["skipped"]}
    return {"teraflops": speed, "rounds": record["rounds"], "left_out": left_out}


# --- goals ----------------------------------------------------------------------------------------


def _worst(
    text: str,
    limit: float,
    records: Sequence[Json],
    value: Value,
) -> Goal:
    """Evaluate a goal at its worst case; every case must have been measured."""
    if not records:
        return Goal(text, limit, None, "no such case in this run")
    found = []
    for record in records:
        one = value(record)
        if one is None:
            return Goal(text, limit, None, f"an entry is missing at {Case(**record['case']).name}")
        found.append((*one, Case(**record["case"]).name))
    worst = min(found)
    return Goal(text, limit, worst[0], f"{worst[1]}, {worst[2]}")


def _speed(which: Pass, ours: Sequence[str], peers: Sequence[str]) -> Value:
    """Return the ratio of the best peer time to the best tjx time."""

    def value(record: Json) -> tuple[float, str] | None:
        mine = best(record, which, lambda name: name in ours)
        other = best(record, which, lambda name: name in peers)
        return mine and other and (other[1] / mine[1], f"{mine[0]} against {other[0]}")

    return value


def _memory(which: Pass, ours: Sequence[str]) -> Value:
    """Return the ratio of dense temporary memory to that of the fastest tjx entry."""

    def value(record: Json) -> tuple[float, str] | None:
        mine = best(record, which, lambda name: name in ours)
        found = entries(record)
        if mine is None or DENSE not in found:
            return None
        own, other = (found[name]["temp_bytes"][which] for name in (mine[0], DENSE))
        return other / max(own, 1), f"{mine[0]} against {DENSE}"

    return value


def _work(which: Pass, ours: Sequence[str]) -> Value:
    """Return the TFLOP/s of the fastest entry."""

    def value(record: Json) -> tuple[float, str] | None:
        mine = best(record, which, lambda name: name in ours)
        return mine and (Case(**record["case"]).flops(which) / mine[1] / 1e12, mine[0])

    return value


def gpu_goals(records: Sequence[Json]) -> list[Goal]:
    """Evaluate the goals for a GPU: head dims 64 and 128, bfloat16, causal, 16k tokens."""
    gpt2 = [r for r in records if Case(**r["case"]) == gpt2_medium()]
    sweep = {
        d: [r for r in records if r not in gpt2 and r["case"]["head_dim"] == d] for d in (64, 128)
    }
    long = {d: [r for r in rs if r["case"]["length"] >= 2048] for d, rs in sweep.items()}
    every = [*sweep[64], *sweep[128]]
    at_8k = [r for r in sweep[128] if r["case"]["length"] == 8192]
    forward, backward = _speed("forward", KERNELS, CUDNN), _speed("backward", KERNELS, CUDNN)
    flash = _speed("forward", KERNELS, ("torch/flash",))
    over_dense, memory = _speed("both", KERNELS, (DENSE,)), _memory("both", KERNELS)
    return [
        _worst("forward, head dim 128, T >= 2k, over cuDNN's speed", 0.95, long[128], forward),
        _worst("forward, head dim 64, T >= 2k, over cuDNN's speed", 0.9, long[64], forward),
        _worst("forward, head dim 128, T >= 1k, over torch flash's speed", 1, sweep[128], flash),
        _worst("backward, T >= 1k, over cuDNN's speed", 0.9, every, backward),
        _worst("backward, head dim 128, T 8k, TFLOP/s", 430, at_8k, _work("backward", KERNELS)),
        _worst("both, GPT-2 medium, over dense XLA's speed", 2.57, gpt2, over_dense),
        _worst("both, GPT-2 medium, dense XLA's memory over ours", 2, gpt2, memory),
    ]


def cpu_goals(records: Sequence[Json]) -> list[Goal]:
    """Evaluate the goals for a CPU: "xla" against dense attention, 8 heads of 64."""
    ours = ("tjx/xla",)
    short, long = ([r for r in records if r["case"]["length"] == n] for n in (512, 8192))
    speed = _speed("both", ours, (DENSE,))
    return [
        _worst("both, T 8192, dense memory over ours", 16, long, _memory("both", ours)),
        _worst("both, T 8192, over dense speed", 1.0, long, speed),
        _worst("both, T 512, over dense speed", 1 / 1.1, short, speed),
    ]


# --- the table ------------------------------------------------------------------------------------


def table(record: Json) -> Iterator[str]:
    """Yield the lines of one case: each entry and pass, then skipped entries."""
    case = Case(**record["case"])
    load = record["load_average"]
    yield f"\n{case.name}  ({record['rounds']} rounds, load average {load:.1f})"
    yield (
        f"  {'':20}{'pass':9}{'median':>9}{'least':>9}{'most':>9} ms by {'TFLOP/s':>9}"
        f"{'peer/this':>10}{'temp MiB':>10}{'host/dev':>9}{'cpu ms':>9}{'error':>9}"
    )
    for which in PASSES:
        peer = best(record, which, lambda name: not is_ours(name))
        for name, entry in entries(record).items():
            yield _row(name, entry, which, case, peer)
    for entry in record["entries"]:
        if entry["skipped"]:
            yield f"  {entry['name']:20}skipped: {entry['skipped']}"


def _row(name: str, entry: Json, which: Pass, case: Case, peer: tuple[str, float] | None) -> str:
    time, by = seconds(entry, which), clock(entry)
    ms = "".join(f"{1e3 * value:9.3f}" for value in time)
    by_host = "" if by == "host" else f"{seconds(entry, which, 'host').median / time.median:.2f}"
    ratio = "" if peer is None else f"{peer[1] / time.median:.2f}"
    temp = entry["temp_bytes"][which]
    error = entry["errors"]["out_relative"]
    if which != "forward":
        error = max(entry["errors"][f"d{x}_relative"] for x in "qkv")
    return (
        f"  {name:20}{which:9}{ms} {by:6}{case.flops(which) / time.median / 1e12:9.3f}{ratio:>10}"
        f"{'' if temp is None else f'{temp / 2**20:.1f}':>10}{by_host:>9}"
        f"{1e3 * seconds(entry, which, 'cpu').median:9.2f}{error:9.1e}"
    )
