"""When each stage of a pipeline works on which microbatch: a table, for every schedule alike.

All stages act in step. In a tick a stage runs forward through at most one of its chunks of layers,
then backward through at most one; what the next stage needs of it is there one tick later.
Schedules differ in one number: how long the backward passes wait.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

_DELAYS: Mapping[str, Callable[[int, int, int], int]] = {
    # (stages, microbatches, chunks) -> the tick of the first backward pass, on the last stage.
    "gpipe": lambda stages, microbatches, chunks: chunks * microbatches + stages - 1,
    # That of the first forward pass through the last layers.
    "1f1b": lambda stages, _, chunks: chunks * stages - 1,
    "interleaved_1f1b": lambda stages, _, chunks: chunks * stages - 1,
}


class Work(NamedTuple):
    """Passes in one direction: arrays [ticks, stages] of int32, 0 where a stage has none."""

    runs: np.ndarray  # bool: whether there is one
    chunk: np.ndarray  # of the stage's layers
    microbatch: np.ndarray
    slot: np.ndarray  # where the stage keeps the input from the forward to the backward pass


class Phase(NamedTuple):
    """Ticks in which the same kinds of work are done."""

    ticks: slice
    forward: bool
    backward: bool
    head: bool


@dataclass(frozen=True)
class PipelineSchedule:
    """The order of passes; made by `make_schedule`.

    Attributes
    ----------
    kind
        "gpipe": all passes forward, then all backward (Huang et al. 2019); the inputs of all
        microbatches are kept. "1f1b": backward as soon as possible (Narayanan et al. 2019,
        "PipeDream"); 2 * stages - 1 inputs are kept, however many microbatches there are.
        "interleaved_1f1b": the same with several chunks a stage (Narayanan et al. 2021, "Efficient
        Large-Scale Language Model Training", section 2.2); (chunks + 1) * stages - 1 are kept.
    stages, microbatches
        How many there are.
    chunks
        Parts of the model on each stage; part c * stages + s is chunk c of stage s.
    """

    kind: str
    stages: int
    microbatches: int
    chunks: int

    @property
    def delay(self) -> int:
        """The tick of the first backward pass."""
        return _DELAYS[self.kind](self.stages, self.microbatches, self.chunks)

    @property
    def span(self) -> int:
        """Ticks from the first to the last pass in one direction."""
        return self.chunks * self.microbatches + self.stages - 1

    @property
    def ticks(self) -> int:
        """How many ticks there are."""
        return self.delay + self.span

    @property
    def bubble(self) -> float:
        """The time that a stage has no work, as a fraction of the time that it has."""
        return (self.stages - 1) / (self.chunks * self.microbatches)

    @property
    def slots(self) -> int:
        """How many inputs a stage has room for."""
        return int(self.forward.slot.max()) + 1

    @property
    def forward(self) -> Work:
        """The passes forward."""
        return self._table[0]

    @property
    def backward(self) -> Work:
        """The passes backward."""
        return self._table[1]

    def phases(self) -> list[Phase]:
        """Return the ticks in order, divided where a kind of work begins or ends."""
        heads = self.backward.runs[:, -1] & (self.backward.chunk[:, -1] == self.chunks - 1)
        heads_end = int(np.flatnonzero(heads)[-1]) + 1
        ends = sorted({self.delay, self.span, heads_end, self.ticks} - {0})
        return [
            Phase(slice(start, end), end <= self.span, start >= self.delay, bool(heads[start]))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def layers_per_chunk(self, layers: int) -> int:
        """Return how many of the model's layers a chunk has.

        Raises
        ------
        ValueError
            If the chunks do not divide the layers.
        """
        parts = self.stages * self.chunks
        if layers % parts:
            raise ValueError(
                f"{layers} layers do not divide by {self.stages} stages x {self.chunks} chunks = "
                f"{parts}: change one of the three"
            )
        return layers // parts

    @cached_property
    def _table(self) -> tuple[Work, Work]:
        ticks, stages = np.arange(self.ticks)[:, None], np.arange(self.stages)[None]
        forward = self._work(ticks - stages, ascending=True)
        backward = self._work(ticks - self.delay - stages[:, ::-1], ascending=False)
        for stage in range(self.stages):
            free = list(range(self.chunks * self.microbatches))
            kept: dict[tuple[int, int], int] = {}
            for tick in range(self.ticks):
                here = tick, stage
                if forward.runs[here]:
                    slot = heapq.heappop(free)
                    kept[forward.chunk[here], forward.microbatch[here]] = forward.slot[here] = slot
                if backward.runs[here]:  # what it frees is free in the next tick
                    slot = kept.pop((backward.chunk[here], backward.microbatch[here]))
                    backward.slot[here] = slot
                    heapq.heappush(free, slot)
        return forward, backward

    def _work(self, number: np.ndarray, *, ascending: bool) -> Work:
        """Return the passes by their number on the stage, [ticks, stages]; chunks ascend or not.

        A stage takes as many microbatches as there are stages through one chunk, then the same
        through the next: by then the first of them has been through all other stages.
        """
        runs = (number >= 0) & (number < self.chunks * self.microbatches)
        group, rest = np.divmod(
            np.where(runs, number, 0).astype(np.int32), self.chunks * self.stages
        )
        chunk, member = np.divmod(rest, self.stages)
        chunk = np.where(runs & (not ascending), self.chunks - 1 - chunk, chunk)
        return Work(runs, chunk, group * self.stages + member, np.zeros_like(chunk))


def make_pipeline_schedule(
    kind: str, stages: int, microbatches: int, chunks: int = 1
) -> PipelineSchedule:
    """Return a schedule; see `Schedule`.

    Raises
    ------
    ValueError
        Naming all that is wrong, one a line.

    Examples
    --------
    >>> schedule = make_schedule("interleaved_1f1b", stages=4, microbatches=8, chunks=2)
    >>> schedule.ticks, schedule.slots, schedule.bubble
    (26, 11, 0.1875)
    """
    problems = []
    if kind not in _DELAYS:
        problems.append(f"pipeline {kind!r}: must be one of {', '.join(_DELAYS)}")
    if min(stages, microbatches) < 1:
        problems.append(f"{stages} stages, {microbatches} microbatches: must be 1 or more each")
    elif kind == "interleaved_1f1b" and microbatches % stages:
        problems.append(
            f"{microbatches} microbatches do not divide by {stages} stages, as pipeline "
            f"{kind} needs: change one of them, or use pipeline 1f1b"
        )
    if (chunks < 2) if kind == "interleaved_1f1b" else (chunks != 1):
        problems.append(
            f"{chunks} chunks a stage with pipeline {kind}: must be 2 or more with "
            "interleaved_1f1b, 1 with all others"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return PipelineSchedule(kind, stages, microbatches, chunks)
