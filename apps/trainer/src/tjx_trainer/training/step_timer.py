"""How fast a run goes, what its time is spent on, and what it has behind it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax

import tjx_metrics
import tjx_nn
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.train_config import DTYPE_OF_PRECISION

Scalars = dict[str, float | int]


class Elapsed(NamedTuple):
    """What a run had behind it when a state of it was saved.

    Attributes
    ----------
    tokens : int
        Labels that were trained on.
    seconds : float
        Of running, over all its lives.
    """

    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Elapsed":
        """Read it from what was saved with a state; nothing where nothing is said of it."""
        return cls(**saved.get("behind", {}))


class StepTimer:
    """Measures a run from a step on.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : jax.sharding.Mesh
        The devices.
    start_step : int
        Steps that were made before.
    behind : Behind
        What the run had behind it then.

    Attributes
    ----------
    throughput : tjx_metrics.Throughput
        The rate, and the time left.
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, *, start_step: int, elapsed: Elapsed
    ) -> None:
        self.throughput = tjx_metrics.Throughput(
            max_steps=config.train.max_steps, start_step=start_step
        )
        self._clock = tjx_metrics.PhaseTimer()
        tjx_metrics.compile_counter()  # it counts from now on
        self._spent = dict.fromkeys(tjx_metrics.PHASES, 0.0)  # up to the last record
        self._before, self._began = elapsed, time.perf_counter()
        self._tokens = elapsed.tokens
        self._flops, self._peak = model_flops(config), total_peak_flops(config, mesh)

    def during(self, phase: str) -> AbstractContextManager[None]:
        """Count the time of a ``with`` block to a phase of `tjx_metrics.StepClock`."""
        return self._clock.during(phase)

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Count the time to a phase, and to no rate."""
        with self.throughput.paused(), self.during(phase):
            yield

    def record_step(self, tokens: int) -> None:
        """Count a step that is done, with so many labels."""
        self._tokens += tokens
        self.throughput.update(tokens)

    @property
    def elapsed(self) -> Elapsed:
        """What the run has behind it now."""
        seconds = self._before.seconds + time.perf_counter() - self._began
        return Elapsed(self._tokens, seconds)

    def figures(self) -> Scalars:
        """Return what is recorded, by name; times are seconds since the call before."""
        spent = self._take()
        found: Scalars = {"train/tokens": self._tokens}
        found["train/hours"] = self.elapsed.seconds / 3600
        if (rate := self.throughput.tokens_per_sec) is not None:
            found["train/tokens_per_sec"] = rate
        if (share := self._mfu(self.throughput.steps_per_sec)) is not None:
            found["train/mfu"] = share
        found |= {f"time/{phase}": seconds for phase, seconds in spent.items()}
        return found | self._machine()

    def totals(self) -> Scalars:
        """Return rates since the warm-up, shares of this life's time by phase, and peaks."""
        self._take()
        seconds = sum(self._spent.values())
        found: Scalars = {f"time/{phase}": spent / seconds for phase, spent in self._spent.items()}
        if (rate := self.throughput.mean_tokens_per_sec) is not None:
            found["tokens_per_sec"] = rate
        if (share := self._mfu(self.throughput.mean_steps_per_sec)) is not None:
            found["mfu"] = share
        return found | self._machine()

    def _take(self) -> dict[str, float]:
        spent = self._clock.take()
        for phase, seconds in spent.items():
            self._spent[phase] += seconds
        return spent

    def _mfu(self, steps_per_sec: float | None) -> float | None:
        # Per step, not per label: of some families not every token has one.
        return (
            None
            if steps_per_sec is None
            else tjx_metrics.mfu(steps_per_sec, self._flops, self._peak)
        )

    def _machine(self) -> Scalars:
        """Return peaks of memory, and what was compiled since the process began."""
        peaks = {f"memory/{name}": size for name, size in tjx_metrics.peak_memory().items()}
        compiled = tjx_metrics.compile_counter()
        return {**peaks, "compile/count": compiled.count, "compile/seconds": compiled.seconds}


def model_flops(config: Config) -> float:
    """Return the floating-point operations of a step, forward and backward; none is recomputed."""
    model = config.model
    length = model.max_seq_len if isinstance(model, ViTConfig) else config.data.seq_len
    return float(tjx_nn.flops_per_token(model, length) * length * config.train.batch_size)


def total_peak_flops(config: Config, mesh: jax.sharding.Mesh) -> float | None:
    """Return the operations a second of all devices at their peak; None where it is not known."""
    kind = mesh.devices.flat[0].device_kind
    peak = tjx_metrics.peak_flops(kind, DTYPE_OF_PRECISION[config.train.precision])
    return None if peak is None else peak * mesh.size
