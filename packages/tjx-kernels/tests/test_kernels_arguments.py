"""Mistakes are named, the choice of implementation can be asked for, the README is true."""

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
from tjx_kernels import chosen_implementation, flash_attention, support_table
from tjx_kernels.attention import api
from tjx_kernels.attention.types import AttentionCall

README = (Path(__file__).parents[1] / "README.md").read_text()


def shaped(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


Q, KV = shaped(2, 6, 4, 8), shaped(2, 5, 2, 8)

MISTAKES: dict[str, tuple[Any, ...]] = {
    "rank": (shaped(6, 4, 8), KV, KV, {}, r"q has shape \(6, 4, 8\)"),
    "batch": (shaped(3, 6, 4, 8), KV, KV, {}, "q has batch 3 and k 2"),
    "k-and-v": (Q, KV, shaped(2, 4, 2, 8), {}, "k has shape .* and v"),
    "v-of-nothing": (Q, KV, shaped(2, 5, 2, 0), {}, "head_dim is 0"),
    "head_dim": (shaped(2, 6, 4, 16), KV, KV, {}, "q has head_dim 16 and k 8"),
    "heads": (shaped(2, 6, 3, 8), KV, KV, {}, "q has 3 heads and k has 2"),
    "dtypes": (shaped(2, 6, 4, 8, dtype=np.float16), KV, KV, {}, "float16, float32, float32"),
    "integers": (*[shaped(2, 5, 2, 8, dtype=np.int32)] * 3, {}, "int32, int32, int32"),
    "window": (Q, KV, KV, {"window": 0}, "window is 0"),
    "soft_cap": (Q, KV, KV, {"soft_cap": -1.0}, "soft_cap is -1.0"),
    "scale": (Q, KV, KV, {"scale": float("nan")}, "scale is nan"),
    "q_offset": (Q, KV, KV, {"q_offset": shaped(3, dtype=np.int32)}, r"q_offset is int32\[3\]"),
    "bias-shape": (Q, KV, KV, {"bias": shaped(2, 3, 6, 5)}, r"\[2 or 1, 4 or 1, 6, 5\]"),
    "bias-dtype": (Q, KV, KV, {"bias": shaped(1, 1, 6, 5, dtype=bool)}, "bias is bool"),
    "slopes": (Q, KV, KV, {"alibi_slopes": shaped(2)}, r"alibi_slopes is float32\[2\]"),
    "dropout-rate": (Q, KV, KV, {"dropout_rate": 1.0}, "dropout_rate is 1.0"),
    "dropout-key": (Q, KV, KV, {"dropout_rate": 0.1}, "dropout_key is missing"),
    "one-sided-ids": (
        *(Q, KV, KV, {"q_segment_ids": shaped(2, 6, dtype=np.int32)}),
        "q_segment_ids is given without kv_segment_ids",
    ),
    "shape-of-ids": (
        *(Q, KV, KV),
        dict.fromkeys(("q_segment_ids", "kv_segment_ids"), shaped(2, 6, dtype=np.int32)),
        r"kv_segment_ids has shape \(2, 6\); it must be \(2, 5\)",
    ),
    "dtype-of-ids": (
        *(Q, KV, KV),
        {"q_segment_ids": shaped(2, 6), "kv_segment_ids": shaped(2, 5)},
        "q_segment_ids is float32",
    ),
    "name": (Q, KV, KV, {"implementation": "xlaa"}, "'xlaa'; it must be one of .*xla, reference"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    q, k, v, options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        chosen_implementation(q, k, v, **options)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)3 heads.*window is 0.*soft_cap is 0"):
        chosen_implementation(shaped(2, 6, 3, 8), KV, KV, window=0, soft_cap=0.0)


def test_flash_attention_checks_its_arguments_too() -> None:
    q, kv = jax.device_put((np.ones((2, 6, 3, 8)), np.ones((2, 5, 2, 8))))
    with pytest.raises(ValueError, match="q has 3 heads"):
        flash_attention(q, kv, kv)


def test_an_implementation_asked_for_by_name_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supports(call: AttentionCall) -> Any:
        return f"head_dim {call.head_dim} is not a multiple of 16" if call.head_dim % 16 else None

    picky = api.BACKENDS["xla"]._replace(supports=supports)
    table = {"picky": picky, **api.BACKENDS}
    monkeypatch.setattr(api, "BACKENDS", table)
    assert chosen_implementation(Q, KV, KV) == "xla"
    wide = (shaped(2, 6, 4, 16), shaped(2, 5, 2, 16), shaped(2, 5, 2, 16))
    assert chosen_implementation(*wide) == "picky"
    with pytest.raises(ValueError, match=r"'picky' cannot serve .*head_dim 8 is not a multiple"):
        chosen_implementation(Q, KV, KV, implementation="picky")


def test_xla_is_chosen_and_reference_only_by_name() -> None:
    assert chosen_implementation(Q, KV, KV, causal=True) == "xla"
    assert chosen_implementation(Q, KV, KV, implementation="reference") == "reference"


def test_readme_holds_the_table_that_the_code_gives() -> None:
    assert support_table() in README


def test_examples_run() -> None:
    modules = [
        importlib.import_module(f"tjx_kernels.{found.name}")
        for found in pkgutil.iter_modules(tjx_kernels.__path__)
    ]
    with jax.transfer_guard("allow"):
        results = [doctest.testmod(module) for module in modules]
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), {})  # noqa: S102  our own file
    assert sum(result.attempted for result in results) > 5
    assert sum(result.failed for result in results) == 0


def test_arrays_on_different_devices_are_named() -> None:
    first, second = jax.devices()[:2]
    x = np.zeros((1, 2, 1, 8), np.float32)
    here, there = jax.device_put(x, first), jax.device_put(x, second)
    with pytest.raises(ValueError, match=rf"q is on {first} and v on {second}; they must be"):
        flash_attention(here, here, there)
