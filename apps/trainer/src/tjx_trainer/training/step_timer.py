"""Throughput, MFU, time per phase and elapsed totals of a run."""

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
    """Totals of a run up to a checkpoint, over all attempts.

    Attributes
    ----------
    tokens : int
        Labels that were trained on.
    seconds : float
        Wall time of training [s].
    """

    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Elapsed":
        """Read the totals from checkpoint metadata; zero where they are absent."""
        return cls(**saved.get("behind", {}))


class StepTimer:
    """Measure throughput, time per phase, memory peaks and compilations of a run.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    mesh : jax.sharding.Mesh
        The device mesh.
    start_step : int
        Updates made before this process started.
    elapsed : Elapsed
        Totals of the run at `start_step`.

    Attributes
    ----------
    throughput : tjx_metrics.Throughput
        Tokens per second and remaining time.
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, *, start_step: int, elapsed: Elapsed
    ) -> None:
        self.throughput = tjx_metrics.Throughput(
            max_steps=config.train.max_steps, start_step=start_step
        )
        self._clock = tjx_metrics.PhaseTimer()
        tjx_metrics.compile_counter()  # starts counting
        self._spent = dict.fromkeys(tjx_metrics.PHASES, 0.0)  # total until the last record
        self._elapsed_before, self._began = elapsed, time.perf_counter()
        self._tokens = elapsed.tokens
        # The steps of phases have different FLOPs: such a run logs no MFU.
        self._peak = None if config.train.phases else total_peak_flops(config, mesh)
        self._flops = model_flops(config)

    def during(self, phase: str) -> AbstractContextManager[None]:
        """Count the time of a ``with`` block towards a phase."""
        return self._clock.during(phase)

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Count the time of a block towards a phase, and exclude it from throughput."""
        with self.throughput.paused(), self.during(phase):
            yield

    def record_step(self, tokens: int) -> None:
        """Count a finished step with `tokens` labels."""
        self._tokens += tokens
        self.throughput.update(tokens)

    @property
    def elapsed(self) -> Elapsed:
        """Totals of the run up to now."""
        seconds = self._elapsed_before.seconds + time.perf_counter() - self._began
        return Elapsed(self._tokens, seconds)

    def figures(self) -> Scalars:
        """Return metrics by name; times are seconds since the previous call."""
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
        """Return throughput after warm-up, fraction of time per phase, and memory peaks."""
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
        # FLOPs per step, not per label: in some families not every token has a label.
        return (
            None
            if steps_per_sec is None
            else tjx_metrics.mfu(steps_per_sec, self._flops, self._peak)
        )

    def _machine(self) -> Scalars:
        """Return memory peaks [bytes], and compilations since the process started."""
        peaks = {f"memory/{name}": size for name, size in tjx_metrics.peak_memory().items()}
        compiled = tjx_metrics.compile_counter()
        return {**peaks, "compile/count": compiled.count, "compile/seconds": compiled.seconds}


def model_flops(config: Config) -> float:
    """Return the model FLOPs of a step, forward and backward, without recomputation."""
    model = config.model
    length = model.max_seq_len if isinstance(model, ViTConfig) else config.data.seq_len
    return float(tjx_nn.flops_per_token(model, length) * length * config.train.batch_size)


def total_peak_flops(config: Config, mesh: jax.sharding.Mesh) -> float | None:
    """Return the peak FLOP/s of all devices together; None if the device kind is unknown."""
    kind = mesh.devices.flat[0].device_kind
    peak = tjx_metrics.peak_flops(kind, DTYPE_OF_PRECISION[config.train.precision])
    return None if peak is None else peak * mesh.size
