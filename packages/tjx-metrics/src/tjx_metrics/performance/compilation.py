"""Count JAX compilations and warn about recompilation of jitted functions."""

import functools
import inspect
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from jax import monitoring

_BACKEND = "/jax/core/compile/backend_compile_duration"
_PHASES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _BACKEND,
)
_SHOWN = 5


class RecompileWarning(UserWarning):
    """Warns that a jitted function was recompiled after its warm-up."""


class CompileCounter:
    """Count the compilations of this process with a `jax.monitoring` listener.

    Programs loaded from JAX's persistent compilation cache count too, with their load time. The
    time includes tracing and lowering; nested spans are counted once.

    Attributes
    ----------
    count : int
        Programs compiled since the counter was created.
    seconds : float
        Compilation time, summed over threads.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._lock, self._of_thread = threading.Lock(), threading.local()
        self._listens = True
        monitoring.register_event_time_span_listener(self._listen)

    @property
    def count_of_thread(self) -> int:
        """Programs compiled by the calling thread."""
        count: int = getattr(self._of_thread, "count", 0)
        return count

    def close(self) -> None:
        """Remove the listener."""
        if not self._listens:
            return
        self._listens = False
        monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event not in _PHASES:
            return
        mine = self._of_thread
        if not hasattr(mine, "spans"):
            mine.count, mine.spans = 0, deque(maxlen=100)
        seconds = end_time - start_time
        # Subtract nested spans, such as a function traced while another is lowered.
        while mine.spans and mine.spans[-1][0] >= start_time:
            begin, end = mine.spans.pop()
            seconds -= end - begin
        mine.spans.append((start_time, end_time))
        is_program = event == _BACKEND
        mine.count += is_program
        with self._lock:
            self.count += is_program
            self.seconds += seconds


@functools.cache
def compile_counter() -> CompileCounter:
    """Return the compilation counter of this process; the first call creates it.

    Examples
    --------
    >>> import numpy as np
    >>> before = compile_counter().count
    >>> _ = jax.jit(lambda x: x + 1)(jax.device_put(np.zeros(3)))
    >>> compile_counter().count - before
    1
    """
    return CompileCounter()


def watch_recompiles[**P, R](
    function: Callable[P, R], name: str, *, warmup_calls: int = 1
) -> Callable[P, R]:
    """Wrap a jitted function so that it warns when it is recompiled.

    The warning lists the arguments whose shape, dtype, weak type, sharding, tree structure or (for
    non-arrays) value differs from the nearest previous compilation. It is issued after the call,
    once per compilation. A call that does not compile takes about a microsecond longer.

    Parameters
    ----------
    function : callable
        A function returned by ``jax.jit``. The wrapper forwards its attributes, such as ``lower``.
    name : str
        Name of the function in the warning.
    warmup_calls : int
        Number of first calls that may compile without a warning.

    Returns
    -------
    callable
        The wrapped function, which warns with `RecompileWarning`.

    Examples
    --------
    >>> import numpy as np
    >>> step = watch_recompiles(jax.jit(lambda x: x * 2), "step")
    >>> y = step(jax.device_put(np.zeros((8, 4), np.float32)))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     y = step(jax.device_put(np.zeros((3, 4), np.float32)))
    >>> print(str(caught[0].message).split(": ", 1)[1])
    x was float32[8,4] and is float32[3,4]
    """
    return _RecompileWatcher(function, name, warmup_calls)


class _RecompileWatcher[**P, R]:
    """A jitted function with the signatures that it was compiled for."""

    def __init__(self, function: Callable[P, R], name: str, warmup_calls: int) -> None:
        self._function, self._name, self._warmup_calls = function, name, warmup_calls
        self._counter, self._calls = compile_counter(), 0
        self._signatures: list[dict[str, str]] = []

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        before = self._counter.count_of_thread
        self._calls += 1
        out = self._function(*args, **kwargs)
        if self._counter.count_of_thread != before:
            self._compiled(args, kwargs)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the signature of a compilation, and warn after the warm-up."""
        new = _signature(self._function, args, kwargs)  # donated arrays keep their metadata
        nearest = min((_changes(old, new) for old in self._signatures), key=len, default=[])
        self._signatures.append(new)
        if self._calls <= self._warmup_calls:
            return
        more = f"; and {len(nearest) - _SHOWN} more" if len(nearest) > _SHOWN else ""
        what = "; ".join(nearest[:_SHOWN]) + more
        if not nearest:
            what = "its arguments are unchanged, so a JAX setting or context must have changed"
        warnings.warn(
            f"{self._name} was compiled again at call {self._calls}: {what}",
            RecompileWarning,
            stacklevel=3,
        )


def _signature(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Map the path of each leaf of the arguments to its description."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return {
        getattr(path[0], "key", "") + jax.tree_util.keystr(path[1:]): _describe(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(bound.arguments)
    }


def _describe(leaf: Any) -> str:
    """Describe the jit signature of a leaf: shape, dtype and sharding, or a non-array's value."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"{type(leaf).__name__} {leaf!r:.40}"
    text = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if getattr(leaf, "weak_type", False):
        text += " (weak type)"
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        axes = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
        text += f" as {sharding.spec} on ({axes})"
        if sharding.memory_kind != "device":
            text += f" in {sharding.memory_kind}"
    elif sharding is not None and getattr(leaf, "committed", False):
        text += f" on {sharding.device_set}"
    return text


def _changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    changed = [
        f"{name} was {old[name]} and is {new[name]}"
        for name in old.keys() & new.keys()
        if old[name] != new[name]
    ]
    changed += [f"{name} is gone" for name in old.keys() - new.keys()]
    changed += [f"{name} is new" for name in new.keys() - old.keys()]
    return sorted(changed)
