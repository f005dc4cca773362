"""Settings that every test of every package shares: strict JAX, eight CPU devices, fixed seeds."""

import gc
import json
import os
import random
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

# Set before JAX is imported, and in the environment so that child processes inherit them.
# Compilation dominates the suite: skip LLVM's optimizations, make kernels without MLIR (whose
# contexts take longer than the kernels of small models), generate code in one piece, and compile
# equal programs once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "tjx" / "test-compilations")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis
import jax
import numpy as np
import pytest

for name, value in {
    "jax_num_cpu_devices": 8,
    # A forgotten axis is an error, not a silent broadcast.
    "jax_numpy_rank_promotion": "raise",
    # An implicit transfer is an error: use jax.device_put and jax.device_get.
    "jax_transfer_guard": "disallow",
}.items():
    jax.config.update(name, value)  # type: ignore[no-untyped-call]  # as jax is


# A busy machine may pause any example for long.
hypothesis.settings.register_profile("tjx", deadline=None)
hypothesis.settings.load_profile("tjx")

# Tracing makes many objects and few cycles: with Python's threshold of 700, a twentieth to a tenth
# of a test's CPU time is garbage collection.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish() -> None:
    """Exclude what imports made from garbage collection, and record the seconds until then."""
    gc.collect()
    gc.freeze()
    _record("start", {"cpu": time.process_time(), **_seconds})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Make a random key that is consumed twice an error; a test that repeats a draw clones its key.

    JAX then calls compiled functions from Python, which is a sixth of the CPU time of an app's
    tests: those of apps are checked where they are marked.
    """
    checked = "packages" in item.path.parts or item.get_closest_marker("key_reuse") is not None
    jax.config.update("jax_debug_key_reuse", checked)  # type: ignore[no-untyped-call]  # as jax is


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the legacy state is what forgetful code would use


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail tests that are skipped, or expected to fail, without a reason."""
    report = yield
    reason = getattr(report, "wasxfail", None)
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped").removeprefix(": ")
    if reason in ("", "unconditional skip"):
        report.outcome = "failed"
        report.longrepr = "skipped or expected to fail without a reason: give reason=..."
    return report


# What JAX spends its time on, as `tools/profile_tests.py` names it.
_PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_seconds = dict.fromkeys(_PHASES.values(), 0.0)


def pytest_configure() -> None:
    """Listen to JAX's timings where `TJX_TEST_TIMES` names a folder for them."""
    if os.environ.get("TJX_TEST_TIMES"):

        def add(event: str, duration_secs: float, **_: str | int) -> None:
            if phase := _PHASES.get(event):
                _seconds[phase] += duration_secs

        jax.monitoring.register_event_duration_secs_listener(add)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Record the seconds of a test."""
    before = _clocks()
    result = yield
    _record(item.nodeid, {name: now - before[name] for name, now in _clocks().items()})
    return result


def _clocks() -> dict[str, float]:
    """Return the seconds so far: wall, CPU, CPU of children that were waited for, and JAX's."""
    times = os.times()
    children = times.children_user + times.children_system
    clocks = {"wall": time.perf_counter(), "cpu": time.process_time(), "children": children}
    return {**clocks, **_seconds}


def _record(test: str, seconds: Mapping[str, float]) -> None:
    """Append a line to the folder that `TJX_TEST_TIMES` names."""
    if folder := os.environ.get("TJX_TEST_TIMES"):
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps({"test": test, **rounded}) + "\n")
