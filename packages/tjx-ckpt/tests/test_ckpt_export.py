"""The subcommand ``export``: bitwise safetensors files, all or none."""

import json
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from tjx_ckpt import Checkpointer
from tjx_ckpt.cli.safetensors_export import export, plan_tensors
from tjx_ckpt.lookup import Checkpoint
from tjx_ckpt.main import main
from tjx_ckpt.store.backends import open_storage

P: Any = PartitionSpec
RNG = np.random.default_rng(0)
PARAMS: dict[str, Any] = {
    "wte": {"embedding": RNG.standard_normal((9, 4)).astype(np.float32)},
    "blocks": {
        "kernel": RNG.standard_normal((3, 8, 4)).astype(np.float32),
        "half": RNG.standard_normal(3).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
    },
    "count": np.int32(7),
    "flags": np.array([True, False, True]),
}
NAMES: dict[str, Any] = {
    "wte/embedding": PARAMS["wte"]["embedding"],
    **{f"blocks/{name}": leaf for name, leaf in PARAMS["blocks"].items()},
    "count": PARAMS["count"],
    "flags": PARAMS["flags"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 3 and 20 whose kernel has 8 pieces."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel = jax.device_put(PARAMS["blocks"]["kernel"], NamedSharding(mesh, P(None, "x", "y")))
    params = {**PARAMS, "blocks": {**PARAMS["blocks"], "kernel": kernel}}
    directory = tmp_path_factory.mktemp("run")
    with Checkpointer(directory / "checkpoints") as checkpointer:
        for step in (3, 20):
            state = {"params": params, "step": np.int32(step)}
            checkpointer.save(step, state, metrics={"eval/loss": step / 8})
    return directory


def call(*words: object) -> int:
    return main(["export", *map(str, words)])


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype)
        assert actual[name].tobytes() == array.tobytes()


def tensors_of(path: Path) -> dict[str, Any]:
    """Return the arrays that safetensors' own library reads."""
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def test_the_safetensors_library_reads_the_export_bitwise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    assert call(run, "--out", out, "--only", "params") == 0
    assert "20: 6 arrays" in capsys.readouterr().out
    assert_same_bits(tensors_of(out), NAMES)
    assert [*tmp_path.iterdir()] == [out]
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"format": "np", "step": "20", "eval/loss": "2.5"}

    assert call(run, "--out", tmp_path / "all.safetensors", "--step", 3) == 0
    everything = {f"params/{name}": leaf for name, leaf in NAMES.items()}
    loaded = load_file(tmp_path / "all.safetensors")
    assert_same_bits(loaded, {**everything, "step": np.int32(3)})


def test_names_have_the_separator(run: Path, tmp_path: Path) -> None:
    for only, expected in (
        ("params/", {name.replace("/", ".") for name in NAMES}),
        ("params/blocks", {"kernel", "half", "empty"}),
        ("params/wte/embedding", {"embedding"}),
    ):
        out = tmp_path / f"{len(expected)}.safetensors"
        assert call(run, "--out", out, "--only", only, "--separator", ".") == 0
        assert tensors_of(out).keys() == expected


def test_equal_names_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": {"b": np.ones(1)}, "a.b": np.zeros(1)})
    out = tmp_path / "w.safetensors"
    assert call(tmp_path, "--out", out, "--separator", ".") == 2
    assert "are both named a.b" in capsys.readouterr().err
    assert call(tmp_path, "--out", out) == 0


def test_dtype_converts_floats_only_and_raises_on_overflow(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w.safetensors"
    assert call(run, "--out", out, "--only", "params", "--dtype", "bfloat16") == 0
    floats = ("wte/embedding", "blocks/kernel", "blocks/empty")
    converted = {name: NAMES[name].astype(ml_dtypes.bfloat16) for name in floats}
    assert_same_bits(tensors_of(out), {**NAMES, **converted})

    values = np.array([1e5, np.inf, 2.0], np.float32)  # infinity itself is no problem
    with Checkpointer(tmp_path / "large") as checkpointer:
        checkpointer.save(1, {"a": np.ones(3, np.float32), "w": values})
    before = sorted(tmp_path.iterdir())
    words = (tmp_path / "large", "--out", tmp_path / "large.safetensors", "--dtype")
    assert call(*words, "float16") == 2
    assert "values of w overflow" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert call(*words, "bfloat16") == 0


def test_a_dtype_that_safetensors_lacks_raises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": {"w": np.ones(2, ml_dtypes.float8_e4m3b11fnuz)}})
    assert call(tmp_path, "--out", tmp_path / "w.safetensors") == 2
    assert "a/w: got dtype float8_e4m3b11fnuz" in capsys.readouterr().err
    assert call(tmp_path, "--out", tmp_path / "w.safetensors", "--dtype", "float32") == 0
    assert tensors_of(tmp_path / "w.safetensors")["a/w"].tolist() == [1, 1]


def test_large_exports_have_several_files_and_a_hugging_face_index(
    run: Path, tmp_path: Path
) -> None:
    words = ("--only", "params", "--max_shard_size", "0.2kB")
    assert call(run, "--out", tmp_path / "model.safetensors", *words) == 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in NAMES.values())
    loaded: dict[str, Any] = {}
    count = len({*index["weight_map"].values()})
    for number in range(1, count + 1):
        path = tmp_path / f"model-{number:05}-of-{count:05}.safetensors"
        tensors = tensors_of(path)
        assert dict.fromkeys(tensors, path.name).items() <= index["weight_map"].items()
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert len(sizes) == 1 or sum(sizes) <= 200
        loaded |= tensors
    assert count > 1
    assert_same_bits(loaded, NAMES)
    assert len([*tmp_path.iterdir()]) == count + 1


@pytest.mark.parametrize("taken", ["w.safetensors", "w.safetensors.index.json"])
def test_nothing_is_overwritten(
    taken: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / taken).write_text("mine")
    assert call(run, "--out", tmp_path / "w.safetensors") == 2
    assert f"{taken} exists" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_checkpoint_raises_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {f"w{number}": np.full(50, number) for number in range(9)})
    file = tmp_path / "1" / "state-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert call(tmp_path, "--out", tmp_path / "w.safetensors", "--max_shard_size", "0.5kB") == 1
    assert f"{file}: the checksum differs (w8)" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writes beyond 4 kB of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_raises_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": np.ones(9), "w": np.ones(5000)})
    before = sorted(tmp_path.iterdir())
    request.getfixturevalue("small_files")
    assert call(tmp_path, "--out", tmp_path / "w.safetensors", "--max_shard_size", "100B") == 2
    assert "File too large" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_next_export_deletes_what_a_killed_one_left(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    left, mine = tmp_path / "w.safetensors.4194305.tmp", tmp_path / "w.safetensors.tmp"
    left.write_bytes(b"part of an export")
    mine.write_text("another program's")
    assert call(run, "--out", out) == 0
    assert {path.name for path in tmp_path.iterdir()} == {out.name, mine.name}


def test_files_appear_together_at_the_end_and_one_array_is_in_memory_at_a_time(
    tmp_path: Path,
) -> None:
    size = 1 << 20
    state = {f"w{number}": np.full(size // 4, number, np.float32) for number in range(12)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    seen: list[Path] = []
    out = tmp_path / "w.safetensors"
    tracemalloc.start()
    try:
        with Checkpoint(open_storage(tmp_path), 1) as checkpoint:
            leaves = checkpoint.manifest.leaves
            tensors = plan_tensors(leaves, only="", dtype=None, separator="/")
            paths = export(
                checkpoint, tensors, out, max_shard_bytes=5 * size,
                progress=lambda _: seen.extend(tmp_path.glob("*.safetensors")),
            )  # fmt: skip
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == []
    assert len(paths) == 4
    assert peak < 3 * size
    assert_same_bits({k: v for p in paths[:-1] for k, v in tensors_of(p).items()}, state)


def test_a_file_that_appears_meanwhile_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    with Checkpoint(open_storage(run / "checkpoints"), 3) as checkpoint:
        leaves = checkpoint.manifest.leaves
        tensors = plan_tensors(leaves, only="", dtype=None, separator="/")
        with pytest.raises(ValueError, match="exists"):
            export(
                checkpoint, tensors, out, max_shard_bytes=10**9,
                progress=lambda _: (out.write_text("mine"), None)[1],
            )  # fmt: skip
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_each_tensor_starts_at_a_multiple_of_its_element_size(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert call(run, "--out", out) == 0
    data = out.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    widths = {"F32": 4, "I32": 4, "BF16": 2, "BOOL": 1}
    del header["__metadata__"]
    for tensor in header.values():
        assert (8 + length + tensor["data_offsets"][0]) % widths[tensor["dtype"]] == 0
