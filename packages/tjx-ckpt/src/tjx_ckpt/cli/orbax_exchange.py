"""Subcommands ``export --format orbax`` and ``import``; both hold the arrays in host memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tjx_ckpt.cli.key_paths import below
from tjx_ckpt.cli.safetensors_export import ExportedTensor, converted, name_below
from tjx_ckpt.lookup import Checkpoint


def export_orbax(
    checkpoint: Checkpoint,
    tensors: Sequence[ExportedTensor],
    out: Path,
    *,
    progress: Callable[[int], None],
) -> None:
    """Write arrays to a new Orbax checkpoint, as nested dicts.

    Parameters
    ----------
    checkpoint
        The checkpoint. Every byte is verified as it is read.
    tensors
        From `plan_tensors` with the separator ``/``.
    out
        Folder of the Orbax checkpoint, which must not exist.
    progress
        Called with the number of bytes read since the last call.

    Raises
    ------
    ValueError
        As `write_orbax`, or if a value overflows the dtype.
    CorruptCheckpointError
        If a file of the checkpoint is damaged.
    """
    from tjx_ckpt.orbax_format import write_orbax  # these import JAX
    from tjx_ckpt.pytree import nested_dicts

    if out.exists() or not out.parent.is_dir():
        raise ValueError(f"--out: got {out}; expected a new folder in an existing one")
    arrays = {}
    for tensor in tensors:
        saved = checkpoint.leaf(tensor.key)
        arrays[tensor.name] = converted(tensor, saved)
        progress(saved.nbytes)
    write_orbax(out, nested_dicts(arrays))


def import_orbax(path: Path, out: Path, *, step: int | None, only: str) -> tuple[int, int]:
    """Save the arrays of an Orbax checkpoint as a checkpoint of tjx-ckpt.

    Parameters
    ----------
    path
        As for `read_orbax`.
    out
        Checkpoint directory.
    step
        Step of the new checkpoint; None: the number in the folder's name, or 0.
    only
        Import arrays at or below this key, without the key in their names.

    Returns
    -------
    tuple of int
        The step, and the number of arrays.

    Raises
    ------
    ValueError
        As `read_orbax`, or if no array is selected, or the directory has this step or a later one.
    """
    from tjx_ckpt.checkpointer import Checkpointer  # these import JAX
    from tjx_ckpt.orbax_format import find_orbax, orbax_specs, read_orbax

    folder = find_orbax(path)
    if step is None:
        names = (folder.name, folder.parent.name)
        step = next((int(name) for name in names if name.isdecimal()), 0)
    keys = below(orbax_specs(folder), only)
    arrays = read_orbax(folder, keys)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(step, {name_below(key, only): arrays[key] for key in keys})
    return step, len(keys)
