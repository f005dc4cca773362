"""The subcommand ``diff``: numbers equal to NumPy, bitwise comparison."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import Checkpointer
from tjx_ckpt.cli import array_diff
from tjx_ckpt.cli.array_diff import Change, compare
from tjx_ckpt.main import main

P: Any = PartitionSpec
W = np.random.default_rng(0).standard_normal((3, 8, 4)).astype(np.float32)
STATE: dict[str, Any] = {
    "params": {
        "blocks": {"w": W, "b": W[:, :, 0]},
        "wte": W[0],
        "half": W[1].astype(ml_dtypes.bfloat16),
    },
    "mu": {"blocks": {"w": W * 2}},
    "step": np.int64(7),
}


def save(directory: Path, state: Any, step: int = 1, **about: Any) -> Path:
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(step, state, **about)
    return directory


def changed(**params: Any) -> dict[str, Any]:
    return {**STATE, "params": {**STATE["params"], **params}}


def diff(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["diff", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def report(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["diff", *map(str, words)]) == 1
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[2:])) <= 100  # the first two have the directories
    return text


def test_equality_does_not_depend_on_sharding_and_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3], axis_types=(AxisType.Auto,))
    sharded = jax.device_put(STATE["params"]["blocks"], NamedSharding(mesh, P("x")))
    a = save(tmp_path / "a", STATE, metadata={"devices": 1})
    b = save(tmp_path / "b", changed(blocks=sharded), 2, metadata={"devices": 3})
    assert len([*(b / "2").iterdir()]) > 1
    code, found = diff(capsys, a, b)
    assert code == 0
    assert found["equal"]
    assert found["metadata"] == [{"name": "devices", "a": 1, "b": 3}]
    assert all(array["relative_change"] == 0 for array in found["arrays"])


def test_norms_and_changes_of_arrays_and_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = W.copy()
    other[1] *= 1.5
    other[2, 0, 0] += 10
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.save(2, changed(blocks={"w": other, "b": other[:, :, 0]}))
    code, found = diff(capsys, tmp_path, 1, 2)
    assert code == 1
    by_key = {array["key"]: array for array in found["arrays"]}
    assert [*by_key] == [
        "mu/blocks/w", "params/blocks/b", "params/blocks/w", "params/half", "params/wte", "step",
    ]  # fmt: skip
    wide, other_wide = W.astype(np.float64), other.astype(np.float64)
    for row, a, b in [
        (by_key["params/blocks/w"], wide, other_wide),
        *zip(by_key["params/blocks/w"]["layers"], wide, other_wide, strict=True),
    ]:
        assert row["norm_a"] == pytest.approx(np.linalg.norm(a), rel=1e-12)
        assert row["norm_b"] == pytest.approx(np.linalg.norm(b), rel=1e-12)
        change = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert row["relative_change"] == pytest.approx(change, rel=1e-12)
        assert row["largest_change"] == np.abs(a - b).max()
        assert row["equal"] == (change == 0)
    assert not by_key["params/wte"]["layers"]

    text = report(capsys, tmp_path, 1, 2)
    assert "params/blocks, layer" in text
    assert "mu/blocks, layer" in text
    together = math.hypot(np.linalg.norm(wide[1]), np.linalg.norm(wide[1, :, 0]))
    (layer,) = [line.split() for line in text.splitlines() if line.startswith("  1 ")][1:]
    assert layer[1] == f"{together:#.4g}"
    assert layer[3] == "0.5000"


def test_top_and_only_select_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
        other = changed(wte=W[0] * 1.1, half=STATE["params"]["half"] * 2)
        checkpointer.save(2, {**other, "step": np.int64(900)})
    _, found = diff(capsys, tmp_path, 1, 2, "--top", 2)
    assert [array["key"] for array in found["arrays"]] == ["step", "params/half"]
    _, found = diff(capsys, tmp_path, 1, 2, "--top", 1, "--only", "params")
    assert [array["key"] for array in found["arrays"]] == ["params/half"]
    assert diff(capsys, tmp_path, 1, 2, "--only", "params/blocks")[0] == 0
    text = report(capsys, tmp_path, 1, 2, "--top", "1", "--layers")
    assert "  step " in text
    assert "and 11 with smaller changes" in text  # 3 arrays of 3 layers, 3 others, 1 shown


def test_structural_differences_are_listed_and_other_arrays_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"w": W, "gone": W, "shape": W, "type": W}
    other = {"w": W, "new": W, "shape": W[:2], "type": W.astype(np.float64)}
    deep = {"config": {"lr": 0.1, "same": 1}, "x" * 200: "y" * 200}
    other_deep = {"config": {"lr": 0.2, "same": 1}}
    metrics = {"loss": float("nan")}
    a = save(tmp_path / "a", params, metadata=deep, metrics=metrics)
    b = save(tmp_path / "b", other, metadata=other_deep, metrics=metrics)
    code, found = diff(capsys, a, b)
    assert code == 1
    assert {entry["key"] for entry in found["structure"]} == {"gone", "new", "shape", "type"}
    assert {array["key"]: array["equal"] for array in found["arrays"]} == {"w": True, "type": False}
    assert found["metadata"][0] == {"name": "config.lr", "a": 0.1, "b": 0.2}
    assert found["metrics"] == []  # NaN both times
    text = report(capsys, a, b)
    for line in (
        "gone: A float32 [3,8,4], B absent",
        "shape: A float32 [3,8,4], B float32 [2,8,4]",
        "type: A float32 [3,8,4], B float64 [3,8,4]",
        "config.lr: A 0.1, B 0.2",
        "4 incompatible",
    ):
        assert line in text


def test_a_missing_array_makes_states_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(tmp_path / "a", STATE), save(tmp_path / "b", {"params": STATE["params"]})
    assert diff(capsys, a, b)[0] == diff(capsys, b, a)[0] == 1
    assert diff(capsys, a, b, "--only", "params")[0] == 0
    assert diff(capsys, a, b, "--only", "mu")[0] == 1


def test_a_damaged_checkpoint_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(tmp_path / "a", STATE), save(tmp_path / "b", STATE)
    file = b / "1" / "params-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["diff", str(a), str(b)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{file}: the checksum differs" in printed.err  # which of the two, and which file
    assert main(["diff", str(a), str(b), "--only", "mu"]) == 0


@given(data=st.data())
@settings(max_examples=60)
def test_numbers_equal_numpy_for_any_chunks(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 7))
    numbers = st.lists(st.floats(-100, 100, width=16), min_size=count, max_size=count)
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16", "float64", "complex64"]))
    a, b = (np.array(data.draw(numbers), np.float32).astype(dtype) for _ in range(2))
    if dtype == "complex64":
        a, b = a + 1j * b, b - 1j * a
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_diff, "_CHUNK", data.draw(st.integers(1, 8)))
        change = compare(a, b)
    parts = "complex128" if dtype == "complex64" else "float64"
    wide = [array.astype(parts).view(np.float64) for array in (a, b)]
    assert change.squares == pytest.approx((wide[0] ** 2).sum(), rel=1e-12)
    assert change.other_squares == pytest.approx((wide[1] ** 2).sum(), rel=1e-12)
    assert change.difference_squares == pytest.approx(((wide[0] - wide[1]) ** 2).sum(), rel=1e-12)
    assert change.largest == np.abs(wide[0] - wide[1]).max(initial=0)
    assert change.equal == (a.tobytes() == b.tobytes())


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int8", "uint32"])
def test_differences_of_integers_are_exact(dtype: str) -> None:
    info = np.iinfo(dtype)
    assert compare(*np.array([[info.min], [info.max]], dtype)).largest == 2**info.bits - 1
    assert compare(*np.array([[info.max], [info.max - 1]], dtype)).largest == 1


@pytest.mark.parametrize(
    ("a", "b", "largest", "equal"),
    [
        (0.0, -0.0, 0, False),
        (math.inf, math.inf, 0, True),
        (math.nan, math.nan, 0, True),
        (math.inf, -math.inf, math.inf, False),
        (1.0, math.nan, math.nan, False),
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 2.0**-23, False),
    ],
)
def test_special_values(a: float, b: float, largest: float, equal: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_diff, "_CHUNK", 1)  # the others must not hide it
        change = compare(np.array([1, a, 1], np.float32), np.array([1, b, 1], np.float32))
    assert change.equal == equal
    assert change.largest == pytest.approx(largest, nan_ok=True)
    assert change.relative == 0 or not change.equal


def test_equal_infinities_and_nan_count_as_equal() -> None:
    a, b = np.array([math.inf, math.nan, 1]), np.array([math.inf, math.nan, 3])
    assert compare(a, b).largest == 2


def test_other_dtypes_of_ml_dtypes_and_booleans_are_compared() -> None:
    for dtype in (ml_dtypes.int4, ml_dtypes.float8_e4m3fn, np.bool_):
        a, b = np.array([1, 0, 1]).astype(dtype), np.array([1, 1, 1]).astype(dtype)
        assert compare(a, b).largest == 1
        assert compare(a, a) == Change(2.0, 2.0)


def test_a_change_from_zero_is_infinite() -> None:
    assert compare(np.zeros(2), np.ones(2)).relative == math.inf


def test_two_arrays_are_in_memory_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_diff, "_CHUNK", 1 << 12)
    size = 1 << 20
    state = {f"w{number}": np.full(size // 4, number, np.float32) for number in range(12)}
    a, b = save(tmp_path / "a", state), save(tmp_path / "b", state)
    tracemalloc.start()
    try:
        assert main(["diff", str(a), str(b)]) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    capsys.readouterr()
    assert peak < 3 * size
