"""Argument validation, backend selection, docstring examples and README examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tjx_kernels
from tjx_kernels import (
    chosen_implementation,
    flash_attention,
    register_backend,
    support_table,
    unregister_backend,
)
from tjx_kernels.attention.backends import xla
from tjx_kernels.attention.call import AttentionCall

README = (Path(__file__).parents[1] / "README.md").read_text()


def shaped(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


Q, KV = shaped(2, 6, 4, 8), shaped(2, 5, 2, 8)

MISTAKES: dict[str, tuple[Any, ...]] = {
    "rank": (shaped(6, 4, 8), KV, KV, {}, r"q: got shape \(6, 4, 8\)"),
    "batch": (shaped(3, 6, 4, 8), KV, KV, {}, "k: got batch 2 with q 3"),
    "k-and-v": (Q, KV, shaped(2, 4, 2, 8), {}, "v: got shape .* with k"),
    "v-of-nothing": (Q, KV, shaped(2, 5, 2, 0), {}, "head_dim: got 0"),
    "head_dim": (shaped(2, 6, 4, 16), KV, KV, {}, "k: got head_dim 8 with q 16"),
    "heads": (shaped(2, 6, 3, 8), KV, KV, {}, "q: got 3 heads with 2 in k"),
    "dtypes": (shaped(2, 6, 4, 8, dtype=np.float16), KV, KV, {}, "float16, float32, float32"),
    "integers": (*[shaped(2, 5, 2, 8, dtype=np.int32)] * 3, {}, "int32, int32, int32"),
    "window": (Q, KV, KV, {"window": 0}, "window: got 0"),
    "symmetric": (Q, KV, KV, {"symmetric_window": True}, "symmetric_window: got True"),
    "soft_cap": (Q, KV, KV, {"soft_cap": -1.0}, "soft_cap: got -1.0"),
    "scale": (Q, KV, KV, {"scale": float("nan")}, "scale: got nan"),
    "q_offset": (Q, KV, KV, {"q_offset": shaped(3, dtype=np.int32)}, r"q_offset: got int32\[3\]"),
    "bias-shape": (Q, KV, KV, {"bias": shaped(2, 3, 6, 5)}, r"\[2 or 1, 4 or 1, 6, 5\]"),
    "bias-dtype": (Q, KV, KV, {"bias": shaped(1, 1, 6, 5, dtype=bool)}, "bias: got bool"),
    "slopes": (Q, KV, KV, {"alibi_slopes": shaped(2)}, r"alibi_slopes: got float32\[2\]"),
    "sinks": (Q, KV, KV, {"sinks": shaped(2)}, r"sinks: got float32\[2\]; .* \[heads\], \[4\]"),
    "dropout-rate": (Q, KV, KV, {"dropout_rate": 1.0}, "dropout_rate: got 1.0"),
    "dropout-key": (Q, KV, KV, {"dropout_rate": 0.1}, "dropout_key: got None"),
    "one-sided-ids": (
        *(Q, KV, KV, {"q_segment_ids": shaped(2, 6, dtype=np.int32)}),
        "kv_segment_ids: got None with q_segment_ids",
    ),
    "shape-of-ids": (
        *(Q, KV, KV),
        dict.fromkeys(("q_segment_ids", "kv_segment_ids"), shaped(2, 6, dtype=np.int32)),
        r"kv_segment_ids: got shape \(2, 6\); expected .* \(2, 5\)",
    ),
    "dtype-of-ids": (
        *(Q, KV, KV),
        {"q_segment_ids": shaped(2, 6), "kv_segment_ids": shaped(2, 5)},
        "q_segment_ids: got float32",
    ),
    "name": (Q, KV, KV, {"implementation": "xlaa"}, "'xlaa'; expected one of .*xla, reference"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_arguments_raise(name: str) -> None:
    q, k, v, options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        chosen_implementation(q, k, v, **options)


def test_all_invalid_arguments_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)3 heads.*window: got 0.*soft_cap: got 0"):
        chosen_implementation(shaped(2, 6, 3, 8), KV, KV, window=0, soft_cap=0.0)


def test_flash_attention_checks_its_arguments_too() -> None:
    q, kv = jax.device_put((np.ones((2, 6, 3, 8)), np.ones((2, 5, 2, 8))))
    with pytest.raises(ValueError, match="q: got 3 heads"):
        flash_attention(q, kv, kv)


def test_a_requested_backend_has_no_fallback(request: pytest.FixtureRequest) -> None:
    def supports(call: AttentionCall) -> Any:
        return f"head_dim {call.head_dim} is not a multiple of 16" if call.head_dim % 16 else None

    register_backend("picky", xla.BACKEND._replace(supports=supports), before="cudnn")
    request.addfinalizer(lambda: unregister_backend("picky"))
    assert chosen_implementation(Q, KV, KV) == "xla"
    wide = (shaped(2, 6, 4, 16), shaped(2, 5, 2, 16), shaped(2, 5, 2, 16))
    assert chosen_implementation(*wide) == "picky"
    with pytest.raises(ValueError, match=r"'picky' cannot serve .*head_dim 8 is not a multiple"):
        chosen_implementation(Q, KV, KV, implementation="picky")


def test_xla_is_chosen_and_reference_only_by_name() -> None:
    assert chosen_implementation(Q, KV, KV, causal=True) == "xla"
    assert chosen_implementation(Q, KV, KV, implementation="reference") == "reference"


def test_readme_has_the_generated_support_table() -> None:
    assert support_table() in README


def test_examples_run() -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(tjx_kernels.__path__, "tjx_kernels.")
        if ".backends." not in found.name
    ]
    with jax.transfer_guard("allow"):
        results = [doctest.testmod(module) for module in modules]
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), {})  # noqa: S102  our own file
    unregister_backend("jax_nn")
    assert sum(result.attempted for result in results) > 5
    assert sum(result.failed for result in results) == 0


def test_arrays_on_different_devices_raise() -> None:
    first, second = jax.devices()[:2]
    x = np.zeros((1, 2, 1, 8), np.float32)
    here, there = jax.device_put(x, first), jax.device_put(x, second)
    with pytest.raises(ValueError, match=rf"v: got devices {second}; expected those of q, {first}"):
        flash_attention(here, here, there)
