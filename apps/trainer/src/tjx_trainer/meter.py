"""How fast a run goes, what its time is spent on, and what it has behind it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

import tjx_metrics
import tjx_nn
from tjx_nn.vit_config import ViTConfig
from tjx_trainer.config import Config
from tjx_trainer.train_config import DTYPE_OF_PRECISION


class Behind(NamedTuple):
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
    def of(cls, saved: Mapping[str, Any]) -> "Behind":
        """Read it from what was saved with a state; nothing where nothing is said of it."""
        return cls(**saved.get("behind", {}))


class Meter:
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
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, *, start_step: int, behind: Behind
    ) -> None:
        self.throughput = tjx_metrics.Throughput(
            max_steps=config.train.max_steps, start_step=start_step
        )
        self._spent: dict[str, float] = {}
        self._before, self._began = behind, time.perf_counter()
        self._tokens = behind.tokens

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time of a ``with`` block to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - begin

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Count the time to a phase, and to no rate."""
        with self.throughput.paused(), self.during(phase):
            yield

    def stepped(self, tokens: int) -> None:
        """Count a step that is done, with so many labels."""
        self._tokens += tokens
        self.throughput.update(tokens)

    @property
    def behind(self) -> Behind:
        """What the run has behind it now."""
        seconds = self._before.seconds + time.perf_counter() - self._began
        return Behind(self._tokens, seconds)

    def figures(self) -> dict[str, float]:
        """Return what is recorded, by name."""
        found: dict[str, float] = {"train/tokens": self._tokens}
        found["train/hours"] = self.behind.seconds / 3600
        if (rate := self.throughput.tokens_per_sec) is not None:
            found["train/tokens_per_sec"] = rate
        return found


def model_flops(config: Config) -> int:
    """Return the floating-point operations of a step, forward and backward; none is recomputed."""
    model = config.model
    length = model.max_seq_len if isinstance(model, ViTConfig) else config.data.seq_len
    return tjx_nn.flops_per_token(model, length) * length * config.train.batch_size


def peak_of(config: Config, mesh: jax.sharding.Mesh) -> float | None:
    """Return the operations a second of all devices at their peak; None where it is not known."""
    kind = mesh.devices.flat[0].device_kind
    peak = tjx_metrics.peak_flops(kind, DTYPE_OF_PRECISION[config.train.precision])
    return None if peak is None else peak * mesh.size
