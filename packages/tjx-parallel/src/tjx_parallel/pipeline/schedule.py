"""Pipeline schedules as tables: the microbatch and chunk of each stage at each tick.

All stages are synchronous. In a tick a stage runs at most one forward and then at most one backward
pass of a chunk; the next stage receives the result one tick later. Schedules differ in one number:
the delay of the backward passes.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tjx_core import ConfigError, Problem

_DELAYS: Mapping[str, Callable[[int, int, int], int]] = {
    # (stages, microbatches, chunks) -> the tick of the first backward pass, on the last stage.
    "gpipe": lambda stages, microbatches, chunks: chunks * microbatches + stages - 1,
    # That of the first forward pass through the last layers.
    "1f1b": lambda stages, _, chunks: chunks * stages - 1,
    "interleaved_1f1b": lambda stages, _, chunks: chunks * stages - 1,
}


class Work(NamedTuple):
    """Passes in one direction: int32 arrays [ticks, stages], 0 where a stage is idle."""

    runs: np.ndarray  # bool: whether the stage has a pass
    chunk: np.ndarray  # chunk of the stage's layers
    microbatch: np.ndarray
    slot: np.ndarray  # buffer of the input between forward and backward pass


class Phase(NamedTuple):
    """Consecutive ticks with the same kinds of passes."""

    ticks: slice
    forward: bool
    backward: bool
    head: bool


@dataclass(frozen=True)
class PipelineSchedule:
    """Order of the passes of a pipeline; see `make_pipeline_schedule`.

    Attributes
    ----------
    kind
        "gpipe": all forward passes, then all backward passes (Huang et al. 2019); stores the inputs
        of all microbatches. "1f1b": backward as soon as possible (Narayanan et al. 2019,
        "PipeDream"); stores 2 * stages - 1 inputs for any number of microbatches.
        "interleaved_1f1b": the same with several chunks per stage (Narayanan et al. 2021,
        "Efficient Large-Scale Language Model Training", section 2.2); stores
        (chunks + 1) * stages - 1.
    stages, microbatches
        Number of stages and of microbatches.
    chunks
        Chunks of the model per stage; chunk c of stage s is number c * stages + s of the model.
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
        """Number of ticks."""
        return self.delay + self.span

    @property
    def bubble(self) -> float:
        """Idle time of a stage relative to its busy time."""
        return (self.stages - 1) / (self.chunks * self.microbatches)

    @property
    def slots(self) -> int:
        """Number of input buffers of a stage."""
        return int(self.forward.slot.max()) + 1

    @property
    def forward(self) -> Work:
        """Forward passes."""
        return self._table[0]

    @property
    def backward(self) -> Work:
        """Backward passes."""
        return self._table[1]

    def phases(self) -> list[Phase]:
        """Return consecutive ranges of ticks with the same kinds of passes."""
        heads = self.backward.runs[:, -1] & (self.backward.chunk[:, -1] == self.chunks - 1)
        heads_end = int(np.flatnonzero(heads)[-1]) + 1
        ends = sorted({self.delay, self.span, heads_end, self.ticks} - {0})
        return [
            Phase(slice(start, end), end <= self.span, start >= self.delay, bool(heads[start]))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def layers_per_chunk(self, layers: int) -> int:
        """Return the number of layers per chunk.

        Parameters
        ----------
        layers
            Number of layers of the model.

        Returns
        -------
        int
            Layers of each chunk.

        Raises
        ------
        ValueError
            If the number of chunks does not divide the layers.
        """
        parts = self.stages * self.chunks
        if layers % parts:
            raise ValueError(
                f"layers: got {layers}; expected a multiple of {self.stages} stages x "
                f"{self.chunks} chunks = {parts}; change one of the three"
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
                if backward.runs[here]:  # the buffer is free from the next tick on
                    slot = kept.pop((backward.chunk[here], backward.microbatch[here]))
                    backward.slot[here] = slot
                    heapq.heappush(free, slot)
        return forward, backward

    def _work(self, number: np.ndarray, *, ascending: bool) -> Work:
        """Return the passes by their index on the stage, [ticks, stages], chunks ascending or not.

        A stage runs `stages` microbatches through one chunk, then the same ones through the next:
        by then the first of them has passed all other stages.
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
    """Create a pipeline schedule.

    Parameters
    ----------
    kind : str
        "gpipe", "1f1b" or "interleaved_1f1b".
    stages, microbatches : int
        Number of pipeline stages, and of microbatches per step.
    chunks : int
        Number of layer chunks of a stage; above 1 only with "interleaved_1f1b".

    Returns
    -------
    PipelineSchedule
        The schedule.

    Raises
    ------
    ConfigError
        With every invalid argument.

    Examples
    --------
    >>> schedule = make_pipeline_schedule("interleaved_1f1b", stages=4, microbatches=8, chunks=2)
    >>> schedule.ticks, schedule.slots, schedule.bubble
    (26, 11, 0.1875)
    """
    problems = []
    if kind not in _DELAYS:
        problems.append(Problem("kind", f"got {kind!r}; expected one of {', '.join(_DELAYS)}"))
    if min(stages, microbatches) < 1:
        message = f"got {stages} with microbatches {microbatches}; expected at least 1 of each"
        problems.append(Problem("stages", message))
    elif kind == "interleaved_1f1b" and microbatches % stages:
        message = (
            f"got {microbatches} with kind {kind}; expected a multiple of stages {stages}; change "
            "one of them, or use kind 1f1b"
        )
        problems.append(Problem("microbatches", message))
    if (chunks < 2) if kind == "interleaved_1f1b" else (chunks != 1):
        message = (
            f"got {chunks} with kind {kind}; expected at least 2 with interleaved_1f1b, and 1 with "
            "all others"
        )
        problems.append(Problem("chunks", message))
    if problems:
        raise ConfigError(problems)
    return PipelineSchedule(kind, stages, microbatches, chunks)
