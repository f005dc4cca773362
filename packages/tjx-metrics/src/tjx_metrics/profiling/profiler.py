"""Tracing some steps of a run with `jax.profiler`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from tjx_metrics.profiling.analysis import ProfileReport, profile_report
from tjx_metrics.profiling.trace_events import find_trace


def programs_of_process() -> list[str]:
    """Return the texts of all compiled functions that this process holds, as XLA runs them.

    Nothing is compiled for it. A backend that does not show its programs has none here.
    """
    texts = []
    for program in jax.local_devices()[0].client.live_executables():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            texts += [module.to_string() for module in program.hlo_modules()]
    return texts


class Profiler:
    """Writes a trace of some steps, which Perfetto and XProf open.

    The trace begins with the first of the steps that is made, and ends when the result of the last
    one is there. The host waits for the devices only then and before the first, so that what runs
    is what belongs to these steps. Python's own calls are not traced, as that would slow them down.

    Parameters
    ----------
    steps : (int, int) or None
        The first and the last step; None traces nothing.
    folder : path
        Where ``plugins/profile/TIME/`` is made: ``*.xplane.pb`` for XProf and `profile_report`,
        ``*.trace.json.gz`` for https://ui.perfetto.dev.

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
        self._traces = False
        self.done = False

    @contextlib.contextmanager
    def step(self, step: int, *, wait: Callable[[], object]) -> Iterator[None]:
        """Trace the step that is made in the ``with`` block where it is its turn.

        Parameters
        ----------
        step : int
            1 is the first.
        wait : callable
            Waits for the results of all steps so far; called before the first of the steps that
            are traced, and after the last one.
        """
        if self._steps is None or self.done or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if not self._traces:
            wait()
            self._start()
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
        if step == self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """End the trace, also before its last step."""
        if self._traces:
            self._traces, self.done = False, True
            jax.profiler.stop_trace()  # type: ignore[no-untyped-call]  # as jax is

    @property
    def trace(self) -> Path:
        """The file ``*.xplane.pb``; FileNotFoundError where there is none yet."""
        return find_trace(self._folder)

    def report(self) -> ProfileReport:
        """Analyse what was traced, as `profile_report` says, with the programs of this process."""
        return profile_report(self.trace, programs_of_process())

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._traces = True
