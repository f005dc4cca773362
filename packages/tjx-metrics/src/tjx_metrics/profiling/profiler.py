"""Trace a range of training steps with `jax.profiler`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from tjx_metrics.profiling.analysis import ProfileReport, profile_report
from tjx_metrics.profiling.trace_events import find_trace


def live_programs() -> list[str]:
    """Return the optimized HLO texts of all executables in this process, without compiling.

    Backends that do not expose their HLO contribute nothing.
    """
    texts = []
    for program in jax.local_devices()[0].client.live_executables():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            texts += [module.to_string() for module in program.hlo_modules()]
    return texts


class Profiler:
    """Write a trace of a range of steps, for Perfetto and XProf.

    The trace starts before the first step of the range that runs, and stops when the result of the
    last step is available. The host blocks on the devices only at these two points, so the trace
    contains the work of these steps only. Python calls are not traced, because that is slow.

    Parameters
    ----------
    steps : (int, int) or None
        First and last step, both inclusive; None disables tracing.
    folder : path
        Parent of ``plugins/profile/TIME/``, which receives ``*.xplane.pb`` for XProf and
        `profile_report`, and ``*.trace.json.gz`` for https://ui.perfetto.dev.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> double = jax.jit(lambda x: x @ x)
    >>> profiler, x = Profiler((2, 3), tempfile.mkdtemp()), jax.device_put(np.ones((64, 64)))
    >>> for step in (1, 2, 3, 4):
    ...     with profiler.step(step, wait=lambda: jax.block_until_ready(x)):
    ...         x = double(x)
    >>> profiler.done, profiler.report().operations[0].kind
    (True, 'matmul')
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path | str) -> None:
        self._steps, self._folder = steps, Path(folder)
        self._is_tracing = False
        self.done = False

    @contextlib.contextmanager
    def step(self, step: int, *, wait: Callable[[], object]) -> Iterator[None]:
        """Trace the step that runs inside the ``with`` block, if it is in the range.

        Parameters
        ----------
        step : int
            Step number, counted from 1.
        wait : callable
            Blocks until all previous steps have finished; called before the first traced step and
            after the last one.

        Yields
        ------
        None
            The context.
        """
        if self._steps is None or self.done or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if not self._is_tracing:
            wait()
            self._start()
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
        if step == self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """Stop the trace, even before its last step."""
        if self._is_tracing:
            self._is_tracing, self.done = False, True
            jax.profiler.stop_trace()  # type: ignore[no-untyped-call]  # JAX has no annotation

    @property
    def trace(self) -> Path:
        """The file ``*.xplane.pb``; raises FileNotFoundError if there is none yet."""
        return find_trace(self._folder)

    def report(self) -> ProfileReport:
        """Summarize the trace with `profile_report` and the programs of this process."""
        return profile_report(self.trace, live_programs())

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._is_tracing = True
