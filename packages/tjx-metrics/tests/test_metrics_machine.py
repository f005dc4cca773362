"""Peak memory, compilation counts and recompilation warnings."""

import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_metrics import RecompileWarning, compile_counter, peak_memory, watch_recompiles
from tjx_metrics.performance import memory
from tjx_metrics.performance.compilation import CompileCounter


def test_host_peak_memory_grows_with_allocations() -> None:
    before = memory.host_peak_bytes()
    assert before is not None
    # Exceed the previous peak.
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  no path of a user
        resident = int(file.read().split()[1]) * 4096
    size = max(before - resident, 0) + 64 * 2**20
    held = np.ones(size // 8)
    after = memory.host_peak_bytes()
    assert after is not None
    assert after - before == pytest.approx(64 * 2**20, abs=24 * 2**20)
    assert held.sum() == len(held)
    assert "device_peak_bytes" not in peak_memory()  # of a CPU


def test_device_peak_memory_is_the_maximum_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def holding(*peaks: Any) -> Callable[[], list[Any]]:
        return lambda: [SimpleNamespace(memory_stats=lambda p=peak: p) for peak in peaks]

    stats = [{"peak_bytes_in_use": peak, "bytes_in_use": 1} for peak in (5, 9, 7)]
    monkeypatch.setattr(jax, "local_devices", holding(*stats))
    assert peak_memory()["device_peak_bytes"] == 9
    monkeypatch.setattr(jax, "local_devices", holding(*stats, None))
    assert memory.device_peak_bytes() is None


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    """Return a separate counter for the test."""
    counter = CompileCounter()
    yield counter
    counter.close()


def test_each_program_counts_once(counter: CompileCounter) -> None:
    double = jax.jit(lambda x: 2 * x + jnp.sin(x))
    small, large = (jax.device_put(np.ones(n, np.float32)) for n in (3, 4))

    def compile_both() -> None:
        for x in (small, large, small):
            double(x)

    thread = threading.Thread(target=compile_both)
    thread.start()
    thread.join()
    assert (counter.count, counter.count_of_thread) == (2, 0)
    assert counter.seconds > 0
    double(jax.device_put(np.ones(5, np.float32)))
    assert (counter.count, counter.count_of_thread) == (3, 1)
    counter.close()
    double(jax.device_put(np.ones(6, np.float32)))
    assert counter.count == 3


def test_nested_time_spans_count_once(counter: CompileCounter) -> None:
    prefix = "/jax/core/compile/"
    for event, begin, end in (
        ("jaxpr_trace_duration", 1.0, 2.0),
        ("jaxpr_trace_duration", 3.5, 4.0),
        ("jaxpr_to_mlir_module_duration", 3.0, 5.0),
        ("backend_compile_duration", 5.0, 9.0),
    ):
        monitoring.record_event_time_span(prefix + event, begin, end)
    monitoring.record_event_time_span("/jax/other", 0.0, 100.0)
    assert (counter.count, counter.seconds) == (1, 7.0)


def test_a_process_has_one_counter() -> None:
    assert compile_counter() is compile_counter()


def steps() -> Any:
    """Return a watched step that donates its state."""

    def step(state: Any, batch: Any, rate: float = 0.1) -> Any:
        return {name: x - rate * batch["tokens"].sum() for name, x in state.items()}

    return watch_recompiles(jax.jit(step, donate_argnums=0, static_argnames="rate"), "train_step")


MESH = Mesh(np.array(jax.devices()), ("data",))


def arrays(*shape: int, dtype: Any = np.float32, axes: tuple[str, ...] = ()) -> Any:
    spec = PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # as jax is
    return jax.device_put(np.ones(shape, dtype), NamedSharding(MESH, spec))


def test_a_recompilation_warning_names_the_changes() -> None:
    first, batch = {"w": arrays(8), "b": arrays(8)}, {"tokens": arrays(8, 16, dtype=np.int32)}
    step = steps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = step(first, batch)  # the warm-up
        state = step(state, batch)

    def message(state: Any, batch: Any, **more: Any) -> str:
        with pytest.warns(RecompileWarning) as caught:
            step(state, batch, **more)
        assert len(caught) == 1
        return str(caught[0].message)

    def fresh(**other: Any) -> Any:
        return {"w": arrays(8), "b": arrays(8)} | other

    short = {"tokens": arrays(3, 16, dtype=np.int32)}
    assert message(fresh(), short) == (
        "train_step was compiled again at call 3: "
        "batch['tokens'] was int32[8,16] as P() on (data=8) "
        "and is int32[3,16] as P() on (data=8)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(fresh(), short)  # known by now
        step(fresh(), batch)
    cases = {
        "is bfloat16[8]": (fresh(b=arrays(8, dtype=jnp.bfloat16)),),
        "state['x'] is new": (fresh(x=arrays(2)),),
        "rate was float 0.1 and is float 0.2": (fresh(), 0.2),
        "as P() on (data=8) and is float32[8] as P('data',) on": (
            fresh(w=arrays(8, axes=("data",))),
        ),
    }
    for want, (state, *rate) in cases.items():
        assert want in message(state, batch, **({"rate": rate[0]} if rate else {}))
    weak = jax.jit(lambda: jnp.full((8,), 1.0), out_shardings=batch["tokens"].sharding)()
    assert weak.weak_type
    assert "float32[8] (weak type)" in message(fresh(w=weak), batch)


def test_changed_settings_are_reported_and_long_lists_are_truncated() -> None:
    step = watch_recompiles(jax.jit(lambda xs: [x + 1 for x in xs]), "step")
    step([arrays(2) for _ in range(9)])
    with (
        jax.default_matmul_precision("highest"),
        pytest.warns(RecompileWarning, match="are unchanged"),
    ):
        step([arrays(2) for _ in range(9)])
    with pytest.warns(RecompileWarning, match=r"xs\[4\] was .* is float32\[3\].*; and 4 more$"):
        step([arrays(3) for _ in range(9)])
    assert step.lower([arrays(2)]).as_text()  # type: ignore[attr-defined]  # as jit's
