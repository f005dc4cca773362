"""`save_tree` and `load_tree`: any pytree in one folder, restored without a template.

Arrays are the leaves of a checkpoint; its metadata describe the tree: nested dicts, lists and
tuples, Python scalars, and the implementation of PRNG keys. No class is imported when it is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tjx_ckpt.checkpointer import Checkpointer
from tjx_ckpt.errors import NoCheckpointError
from tjx_ckpt.pytree import flatten
from tjx_ckpt.store.manifest import Manifest

_SCALARS = {kind.__name__: kind for kind in (bool, int, float, complex, str)}
_METADATA = "tree"


def save_tree(path: str | Path, tree: Any) -> None:
    """Save a pytree; wait until it is on disk.

    Saving to the same folder again replaces the tree atomically.

    Parameters
    ----------
    path
        Local folder or fsspec URL.
    tree
        Pytree of JAX and NumPy arrays, typed PRNG keys, and Python scalars and text.

    Raises
    ------
    ValueError
        If a leaf is something else, or two leaves have the same key; names the leaf. If the folder
        holds the checkpoints of a run, which would be replaced.
    SaveError
        If the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_tree(folder, {"key": jax.random.key(0), "layers": [np.ones(2), (3, None)]})
    >>> load_tree(folder)["layers"]
    [array([1., 1.]), (3, None)]
    """
    arrays: dict[str, Any] = {}
    described = _describe(tree, (), arrays)
    with Checkpointer(path, keep=1) as checkpointer:
        latest = checkpointer.latest_step()
        if latest is not None:
            _described(path, checkpointer.manifest(latest))
        step = 0 if latest is None else latest + 1
        checkpointer.save(step, arrays, metadata={_METADATA: described})


def load_tree(path: str | Path, like: Any = None) -> Any:
    """Load a pytree that `save_tree` saved, verified and with the same bits.

    JAX arrays are placed on the default device. Nodes of other classes than dict, list, tuple and
    None, such as named tuples and dataclasses, are dicts of their fields, unless `like` is given.

    Parameters
    ----------
    path
        The folder.
    like
        Pytree with the structure of the saved one, whose leaves are not read: the loaded leaves
        are put into its nodes.

    Returns
    -------
    pytree
        The tree, with arrays of the stored dtypes.

    Raises
    ------
    NoCheckpointError
        If there is no tree in the folder.
    CorruptCheckpointError
        If a file is damaged.
    ValueError
        If the folder holds another checkpoint, or `like` has other keys.
    """
    with Checkpointer(path) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise NoCheckpointError(f"no tree in {path}; save one with save_tree")
        manifest = checkpointer.manifest(step)
        described = _described(path, manifest)
        on_host = {node["array"] for node in _nodes(described) if node.get("numpy")}
        arrays = checkpointer.restore(
            {
                key: np.empty(spec.shape, spec.dtype)
                if key in on_host
                else jax.ShapeDtypeStruct(spec.shape, spec.dtype)  # type: ignore[no-untyped-call]
                for key, spec in manifest.leaves.items()
            },
            step,
        )
    tree = _rebuild(described, arrays)
    return tree if like is None else _into(like, tree)


def _described(path: str | Path, manifest: Manifest) -> dict[str, Any]:
    """Return the description of the tree in a checkpoint of `save_tree`."""
    described = manifest.metadata.get(_METADATA)
    if not isinstance(described, dict):
        raise ValueError(
            f"path: got {path}, which holds checkpoints of a Checkpointer; expected a folder of "
            "save_tree; use Checkpointer there, or another folder"
        )
    return described


def _describe(node: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON description of a tree, and add its arrays by key."""
    if node is None:
        return {"none": True}
    if type(node) is dict and all(isinstance(key, str) for key in node):
        return {"dict": {key: _describe(x, (*path, key), arrays) for key, x in node.items()}}
    if type(node) in (list, tuple):
        children = [_describe(x, (*path, str(i)), arrays) for i, x in enumerate(node)]
        return {type(node).__name__: children}
    key = "/".join(path) or "value"
    if type(node) in _SCALARS.values():
        # repr reads back exactly, also NaN, which JSON lacks; text needs none.
        return {type(node).__name__: node if isinstance(node, str) else repr(node)}
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        if key in arrays:
            raise ValueError(f"tree: got two leaves with the key {key!r}; expected one; rename one")
        if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            prng_key: Any = node
            arrays[key] = jax.random.key_data(prng_key)
            return {"array": key, "prng": str(jax.random.key_impl(prng_key))}
        arrays[key] = np.asarray(node) if isinstance(node, np.generic) else node
        return {"array": key, "numpy": not isinstance(node, jax.Array)}
    return {"dict": _children(node, path, arrays, key)}


def _children(
    node: Any, path: tuple[str, ...], arrays: dict[str, Any], key: str
) -> dict[str, dict[str, Any]]:
    """Return the descriptions of the children of a node of another class."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    if any(child is node for _, child in children):
        raise ValueError(
            f"tree: got a {type(node).__name__} at {key!r}; expected an array, a PRNG key, a "
            "Python scalar or text; remove it, or register its class with jax.tree_util"
        )
    found = {}
    for child_path, child in children:
        name = jax.tree_util.keystr(child_path, simple=True, separator="/")
        found[name] = _describe(child, (*path, name), arrays)
    return found


def _nodes(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a description and those of all its children."""
    inner = described.get("dict", described.get("list", described.get("tuple", ())))
    children = inner.values() if isinstance(inner, dict) else inner
    return [described, *(node for child in children for node in _nodes(child))]


def _rebuild(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    match described:
        case {"none": _}:
            return None
        case {"dict": children}:
            return {key: _rebuild(child, arrays) for key, child in children.items()}
        case {"list": children}:
            return [_rebuild(child, arrays) for child in children]
        case {"tuple": children}:
            return tuple(_rebuild(child, arrays) for child in children)
        case {"array": key, "prng": implementation}:
            return jax.random.wrap_key_data(arrays[key], impl=implementation)
        case {"array": key}:
            return arrays[key]
    ((name, text),) = described.items()
    return text == "True" if name == "bool" else _SCALARS[name](text)


def _into(like: Any, tree: Any) -> Any:
    """Put the leaves of a loaded tree into the nodes of another."""
    wanted, loaded = flatten(like), flatten(tree)
    differing = sorted(wanted.keys() ^ loaded.keys())
    if differing:
        raise ValueError(
            f"like: got other keys than the saved tree ({', '.join(differing)}); expected a tree "
            "of the same structure; leave like out to see what was saved"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[key] for key in wanted])
