"""`save_tree` and `load_tree` keep every bit, type and structure without a template."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tjx_ckpt import Checkpointer, CorruptCheckpointError, NoCheckpointError, load_tree, save_tree


class Moments(NamedTuple):
    """A node of another class, as in optimizer states."""

    second: Any
    first: Any


def tree() -> dict[str, Any]:
    with jax.transfer_guard("allow"):
        return {
            "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 2)],
            "raw": jax.random.PRNGKey(7),
            "half": jax.device_put(np.arange(3).astype(ml_dtypes.bfloat16)),
            "host": np.array([[1, 2]], np.int64),
            "zero_d": np.float32(0.5),
            "empty": np.zeros((0, 2), np.float32),
            "scalars": (True, 3, float("nan"), -0.0, 1e-320, 2 + 1j, "text", None),
            "nothing": [{}, [], ()],
        }


def assert_equal(actual: Any, expected: Any) -> None:
    found_structure, structure = (jax.tree.structure(each) for each in (actual, expected))
    assert bool(found_structure == structure)  # type: ignore[operator]  # JAX's stub
    for found, leaf in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        assert type(found) is type(leaf)
        if isinstance(leaf, jax.Array | np.ndarray):
            assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                found, leaf = jax.random.key_data(found), jax.random.key_data(leaf)
            found, leaf = jax.device_get(found), jax.device_get(leaf)
            assert found.tobytes() == leaf.tobytes()
        else:
            assert repr(found) == repr(leaf)


def test_tree_comes_back_and_is_replaced(tmp_path: Path) -> None:
    expected = tree()
    save_tree(tmp_path / "a", {"old": np.ones(2)})
    save_tree(tmp_path / "a", expected)
    loaded = load_tree(tmp_path / "a")
    assert_equal(loaded, expected)
    with jax.transfer_guard("allow"):
        drawn = jax.random.normal(loaded["keys"][0]), jax.random.normal(expected["keys"][0])
    assert drawn[0] == drawn[1]
    with Checkpointer(tmp_path / "a") as checkpointer:
        assert checkpointer.steps() == [1], "the old tree is deleted"


@pytest.mark.parametrize("value", [3, "text", None, np.ones(2), (), {"a/b": np.ones(1)}])
def test_single_leaves_and_empty_trees(value: Any, tmp_path: Path) -> None:
    save_tree(tmp_path, value)
    assert_equal(load_tree(tmp_path), value)


def test_other_nodes_are_dicts_without_a_template(tmp_path: Path) -> None:
    state = {"adam": Moments(np.ones(1), [np.zeros(2), 4])}
    save_tree(tmp_path, state)
    assert_equal(load_tree(tmp_path), {"adam": {"first": [np.zeros(2), 4], "second": np.ones(1)}})
    assert_equal(load_tree(tmp_path, like=state), state)
    with pytest.raises(ValueError, match=r"like: got other keys .*adam/first/2"):
        load_tree(tmp_path, like={"adam": Moments(0, [0, 0, 0])})


def test_errors_name_the_leaf(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a object at 'a/1'; expected an array"):
        save_tree(tmp_path / "a", {"a": [1, object()]})
    with pytest.raises(ValueError, match="two leaves with the key 'a/b'"):
        save_tree(tmp_path / "a", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
    assert not (tmp_path / "a").exists()
    with pytest.raises(NoCheckpointError, match="save_tree"):
        load_tree(tmp_path / "a")
    with Checkpointer(tmp_path / "b") as checkpointer:
        checkpointer.save(1, {"w": np.ones(1)})
    for access in (load_tree, lambda folder: save_tree(folder, 1)):
        with pytest.raises(ValueError, match="holds checkpoints of a Checkpointer"):
            access(tmp_path / "b")
    save_tree(tmp_path / "c", {"w": np.ones(1)})
    (file,) = (tmp_path / "c" / "0").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptCheckpointError):
        load_tree(tmp_path / "c")
