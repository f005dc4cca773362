"""Worker of the attention benchmark for JAX: tjx `flash_attention` and `jax.nn`.

Started by attention.py; it never imports torch.
"""

import gc
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import DENSE_LIMIT, PASSES, Case, Pass
from attention_worker import Json, Progress, first_line, serve, timed
from jax.experimental.mosaic.gpu import profiler

from tjx_kernels import chosen_implementation, flash_attention
from tjx_kernels.attention.registry import backends

type Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

DENSE = ("tjx/reference", "jax.nn/xla")


class Programs:
    """Compiled programs of one entry at one shape, and their arguments."""

    def __init__(self, attention: Attention, case: Case) -> None:
        shape = (case.batch, case.length, case.heads, case.head_dim)
        self.specification = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))  # type: ignore[no-untyped-call]  # as jax is
        self._lower(attention)

    def _lower(self, attention: Attention) -> None:
        x = self.specification

        def both(
            q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            out, pull = jax.vjp(attention, q, k, v)
            return out, pull(dout)

        # The arguments of the backward pass alone are the residuals of the forward pass.
        def keep(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(jax.vjp(attention, q, k, v)[1])

        _, pull = jax.eval_shape(partial(jax.vjp, attention), x, x, x)
        leaves, tree = jax.tree.flatten(pull)

        def backward(kept: list[jax.Array], dout: jax.Array) -> Any:
            return jax.tree.unflatten(tree, kept)(dout)

        self.lowered: dict[str, Any] = {
            "forward": jax.jit(attention).lower(x, x, x),
            "keep": jax.jit(keep).lower(x, x, x),
            "backward": jax.jit(backward).lower(leaves, x),
            "both": jax.jit(both).lower(x, x, x, x),
        }

    def compile(self) -> None:
        """Compile the lowered programs; may run in a thread."""
        self.compiled = {name: lowered.compile() for name, lowered in self.lowered.items()}
        del self.lowered

    def start(self, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> None:
        """Store the arguments and warm up all passes."""
        self.inputs = q, k, v, dout
        self.seconds: dict[Pass, float] = {}
        for which in PASSES:
            self.time(which, self.arguments(which), 1)
            self.seconds[which] = self.time(which, self.arguments(which), 1)["host"]

    def arguments(self, which: Pass) -> tuple[Any, ...]:
        """Return the arguments of a pass; residuals are recomputed to save memory."""
        q, k, v, dout = self.inputs
        if which == "forward":
            return q, k, v
        return self.inputs if which == "both" else (self.compiled["keep"](q, k, v), dout)

    def time(self, which: Pass, arguments: tuple[Any, ...], count: int) -> Json:
        """Time a pass by the host clocks."""
        latest: list[Any] = list(arguments)

        def call() -> None:
            latest[:] = [self.compiled[which](*arguments)]

        return timed(call, lambda: jax.block_until_ready(latest), count)  # type: ignore[no-untyped-call]  # as jax is

    def device_time(self, which: Pass, arguments: tuple[Any, ...], count: int) -> Json:
        """Return the median over calls of the summed kernel time from the profiler."""
        try:
            measured: Any = profiler.measure(self.compiled[which], iterations=count)
            _, times = measured(*arguments)
        except RuntimeError as error:
            return {"device": None, "device_failed": first_line(error)}
        if times is None:
            return {"device": None, "device_failed": "the profiler recorded no kernel"}
        return {"device": float(np.median(times)) / 1e3}

    def memory(self) -> dict[str, int]:
        """Return the temporary memory of each pass in bytes."""
        return {
            which: int(self.compiled[which].memory_analysis().temp_size_in_bytes)
            for which in PASSES
        }


class Jax:
    """JAX framework of the benchmark."""

    def __init__(self) -> None:
        self.platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
        self.programs: dict[str, Programs] = {}
        self.errors: dict[tuple[str, Case], dict[str, float]] = {}

    def describe(self) -> Json:
        """Return versions and the device."""
        return {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "jaxlib": version("jaxlib"),
            "numpy": np.__version__,
            "backend": jax.default_backend(),
            "backend_version": " ".join(jax.devices()[0].client.platform_version.split()),
            "device": jax.devices()[0].device_kind,
        }

    def prepare(self, case: Case, exclude: Mapping[str, str], progress: Progress) -> list[Json]:
        """Compile and warm up every entry."""
        self.release()
        functions = self._functions(case, exclude)
        skipped = {name: f for name, f in functions.items() if isinstance(f, str)}
        waiting: dict[str, Programs] = {}
        for name, function in functions.items():
            if not isinstance(function, str):
                progress(name)
                try:
                    waiting[name] = Programs(function, case)
                    self._check(name, function, case)
                except Exception as error:
                    skipped[name] = "failed: " + first_line(error)
                    waiting.pop(name, None)
        progress("")  # a compiler crash in a thread cannot be attributed to an entry
        with ThreadPoolExecutor() as pool:
            compiling = {name: pool.submit(entry.compile) for name, entry in waiting.items()}
        shape = (case.batch, case.length, case.heads, case.head_dim)
        keys = jax.random.split(jax.random.key(0), 4)
        inputs = [jax.random.normal(key, shape, jnp.dtype(case.dtype)) for key in keys]
        for name, entry in waiting.items():
            progress(name)
            try:
                compiling[name].result()
                entry.start(*inputs)
                self.programs[name] = entry
            except Exception as error:
                skipped[name] = "failed: " + first_line(error)
        return [self._entry(name, skipped.get(name), case) for name in functions]

    def measure(self, seconds: float, progress: Progress) -> dict[str, dict[Pass, Json]]:
        """Time all entries for one round."""
        found: dict[str, dict[Pass, Json]] = {}
        for name, entry in self.programs.items():
            progress(name)
            found[name] = {}
            for which in PASSES:
                count = attention_cases.iterations(entry.seconds[which], seconds)
                arguments = entry.arguments(which)
                times = entry.time(which, arguments, count)
                if self.platform == "gpu":
                    times |= entry.device_time(which, arguments, count)
                found[name][which] = times
        return found

    def release(self) -> None:
        """Free the memory of the case."""
        self.programs.clear()
        gc.collect()

    def _functions(self, case: Case, exclude: Mapping[str, str]) -> dict[str, Attention | str]:
        """Return the function of every entry, or the reason to skip it."""
        shape = (case.batch, case.length, case.heads, case.head_dim)
        x = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))  # type: ignore[no-untyped-call]  # as jax is
        found: dict[str, Attention | str] = {}
        for name in backends():
            try:
                chosen_implementation(x, x, x, causal=case.causal, implementation=name)
            except ValueError as error:
                _, _, reason = str(error).partition("cannot serve this call: ")
                found["tjx/" + name] = reason.partition(";")[0] or str(error)
            else:
                found["tjx/" + name] = partial(
                    flash_attention, causal=case.causal, implementation=name
                )
        for backend in ("xla", "cudnn") if self.platform == "gpu" else ("xla",):
            found["jax.nn/" + backend] = partial(
                jax.nn.dot_product_attention, is_causal=case.causal, implementation=backend
            )
        if case.scores_bytes > DENSE_LIMIT[self.platform]:
            size = f"the scores alone would take {case.scores_bytes / 2**30:.0f} GiB"
            found |= dict.fromkeys(DENSE, size)
        return found | {name: reason for name, reason in exclude.items() if name in found}

    def _check(self, name: str, function: Attention, case: Case) -> None:
        """Measure the error against float64 at a small size."""
        small = case.small()
        if (name, small) in self.errors:
            return
        drawn = attention_cases.small_inputs(small)
        inputs = [jnp.asarray(x, jnp.dtype(case.dtype)) for x in drawn]

        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
            out, pull = jax.vjp(function, q, k, v)
            return out, *pull(dout)

        found = tuple(np.asarray(x, np.float64) for x in both(*inputs))
        right = attention_cases.oracle(small, *(np.asarray(x, np.float64) for x in inputs))
        self.errors[name, small] = attention_cases.errors(found, right)

    def _entry(self, name: str, skipped: str | None, case: Case) -> Json:
        entry: Json = {"name": name, "skipped": skipped}
        if skipped is None:
            entry["temp_bytes"] = self.programs[name].memory()
            entry["errors"] = self.errors[name, case.small()]
        return entry


if __name__ == "__main__":
    serve(Jax)
