"""Orbax checkpoints: write a pytree for programs that use Orbax, and read their checkpoints.

Orbax is imported by the functions, not by the module: it takes seconds and imports JAX.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tjx_ckpt.device_placement import sharding_of
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.pytree import describe, flatten

_METADATA = "_METADATA"  # Orbax writes it into the folder of each pytree


def write_orbax(path: str | Path, tree: Any) -> None:
    """Write a pytree of arrays to a new Orbax checkpoint.

    ``orbax.checkpoint.StandardCheckpointer().restore(path)`` reads it bit for bit.

    Parameters
    ----------
    path
        Folder of the checkpoint, which must not exist; Orbax renames it when it is complete.
    tree
        Pytree of numeric arrays in host memory or on devices.

    Raises
    ------
    ValueError
        If the folder exists, a leaf is not a numeric array or has no elements (which Orbax cannot
        store), or Orbax is not installed.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "checkpoint"
    >>> write_orbax(folder, {"params": {"w": np.ones(2, np.float32)}})
    >>> read_orbax(folder)
    {'params/w': array([1., 1.], dtype=float32)}
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"path: got {path}, which exists; expected a new folder; delete it first")
    check_not_empty(describe(flatten(tree)))
    ocp = import_orbax()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, tree)


def check_not_empty(specs: Mapping[str, LeafSpec]) -> None:
    """Check that each array has an element; raise ValueError with the keys of those without."""
    empty = [key for key, spec in specs.items() if not spec.size_bytes]
    if empty:
        raise ValueError(
            f"tree: got arrays without elements, {', '.join(empty)}; expected at least one element "
            "in each, as Orbax stores no empty arrays; leave them out"
        )


def orbax_specs(path: str | Path) -> dict[str, LeafSpec]:
    """Return shape and dtype of each array of an Orbax checkpoint, without reading arrays.

    Parameters
    ----------
    path
        Folder of a checkpoint; of one step of an ``orbax.checkpoint.CheckpointManager``, such as
        MaxText's ``checkpoints/100/items`` or ``checkpoints/100``; or of all its steps, of which
        the newest is taken.

    Returns
    -------
    dict
        By key, the names on the path to the leaf joined by ``/``: ``params/params/decoder/...``.
        Empty nodes of the tree, such as None, have no key.

    Raises
    ------
    ValueError
        If the folder is not an Orbax checkpoint, has leaves that are not arrays (such as text), or
        Orbax is not installed.
    """
    return describe(flatten(_metadata(find_orbax(path))))


def read_orbax(path: str | Path, keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of an Orbax checkpoint into host memory, with the bits that were saved.

    Parameters
    ----------
    path
        As for `orbax_specs`.
    keys
        Keys to read, a subset of the keys of `orbax_specs`; None: all.

    Returns
    -------
    dict
        Arrays by key.

    Raises
    ------
    ValueError
        As `orbax_specs`, or if a key does not exist.
    """
    specs = orbax_specs(path)
    wanted = specs.keys() if keys is None else keys
    missing = sorted(set(wanted) - specs.keys())
    if missing:
        raise ValueError(f"keys: got {', '.join(missing)}; expected keys of {find_orbax(path)}")
    return read_leaves(path, {key: np.empty(specs[key].shape, specs[key].dtype) for key in wanted})


def read_leaves(path: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Read leaves of an Orbax checkpoint with the dtypes and shardings of abstract leaves.

    Parameters
    ----------
    path
        As for `orbax_specs`.
    abstract
        By existing key, an array or abstract array of the stored shape: for a NumPy array a NumPy
        array is returned, and a leaf without sharding is placed on the default device.

    Returns
    -------
    dict
        The leaves by key.
    """
    ocp = import_orbax()

    def argument(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding_of(leaf))

    folder = find_orbax(path)
    tree = _metadata(folder)
    structure: Any = jax.tree.structure(tree)  # JAX gives no types
    keys = list(flatten(tree))
    item = structure.unflatten([abstract.get(key, ocp.PLACEHOLDER) for key in keys])
    arguments = structure.unflatten(
        [argument(abstract[key]) if key in abstract else ocp.RestoreArgs() for key in keys]
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = flatten(checkpointer.restore(folder, item=item, restore_args=arguments))
    return {
        key: np.asarray(restored[key])
        if isinstance(leaf, np.ndarray | np.generic)
        else restored[key]
        for key, leaf in abstract.items()
    }


def find_orbax(path: str | Path) -> Path:
    """Return the folder of the pytree in an Orbax checkpoint; raises like `orbax_specs`."""
    folder = Path(path).absolute()
    if (folder / _METADATA).is_file():
        return folder
    below = [each for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []
    steps = [int(each.name) for each in below if each.name.isdecimal()]
    if steps:
        return find_orbax(folder / str(max(steps)))
    items = sorted(each for each in below if (each / _METADATA).is_file())
    if len(items) == 1:
        return items[0]
    found = f"the pytrees {', '.join(each.name for each in items)}" if items else "no pytree"
    raise ValueError(
        f"path: got {folder}, which holds {found}; expected the folder of one Orbax checkpoint, "
        f"with a file {_METADATA}; name that folder"
    )


def _metadata(folder: Path) -> Any:
    ocp = import_orbax()
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.metadata(folder).item_metadata.tree


def import_orbax() -> Any:
    """Return the module ``orbax.checkpoint``; raise ValueError if it cannot be imported."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ValueError(
            f"Orbax cannot be imported ({error}); expected orbax-checkpoint; pip install "
            "'tjx-ckpt[orbax]'"
        ) from error
    return orbax.checkpoint
