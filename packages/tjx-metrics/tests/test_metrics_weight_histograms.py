"""Parameter histograms on the device equal NumPy's."""

from typing import Any

import jax
import numpy as np

from tjx_metrics import named_histograms, weight_histograms

BINS = 16


def test_histograms_of_each_layer_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 50, 20)).astype(np.float32)
    tree: dict[str, Any] = {
        "blocks": {"kernel": kernel},
        "constant": np.full(7, 2.5, np.float32),
        "table": rng.standard_cauchy(1000).astype(np.float32),
    }
    depths = {"blocks": {"kernel": 1}, "constant": 0, "table": 0}
    spreads = jax.jit(lambda tree: weight_histograms(tree, depths, bins=BINS))(jax.device_put(tree))
    found = named_histograms(jax.device_get(spreads), "histograms/parameter")

    numbers = {f"blocks/kernel/{i}": layer for i, layer in enumerate(kernel)}
    numbers |= {"constant": tree["constant"], "table": tree["table"]}
    assert found.keys() == {f"histograms/parameter/{name}" for name in numbers}
    for name, values in numbers.items():
        counts, edges = found[f"histograms/parameter/{name}"]
        assert counts.sum() == values.size
        if values.min() == values.max():
            assert edges[0] == edges[-1] == values[0]
            continue
        expected, places = np.histogram(values.astype(np.float64), BINS)
        np.testing.assert_allclose(edges, places, rtol=1e-6)
        # Rounding may move a value near an edge to the next bin.
        assert np.abs(counts - expected).sum() <= 2


def test_non_finite_values_are_not_counted() -> None:
    values = np.array([np.nan, -np.inf, 1.0, 2.0, np.inf, 2.0], np.float32)
    empty = np.full(3, np.nan, np.float32)
    tree = jax.device_put({"values": values, "empty": empty})
    spreads = jax.jit(lambda tree: weight_histograms(tree, bins=4))(tree)
    found = named_histograms(jax.device_get(spreads), "h")
    assert found["h/values"].counts.tolist() == [1, 0, 0, 2]
    assert found["h/values"].edges.tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert found["h/empty"].counts.tolist() == [0, 0, 0, 0]


def test_sharded_parameters_are_counted_without_all_gather() -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    spec = jax.sharding.PartitionSpec("fsdp")  # type: ignore[no-untyped-call]  # as jax is
    sharding = jax.sharding.NamedSharding(mesh, spec)
    step = jax.jit(lambda x: weight_histograms({"w": x}, bins=BINS))
    divided = jax.device_put(whole, sharding)
    compiled = step.lower(divided).compile()
    assert "all-gather" not in (compiled.as_text() or "all-gather")
    counts = jax.device_get(compiled(divided))["w"].counts
    alone = jax.device_get(step(jax.device_put(whole)))["w"].counts
    np.testing.assert_array_equal(counts, alone)
