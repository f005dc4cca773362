"""Arrays between devices and files, by Orbax. The only module that knows Orbax."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax_v1

# Orbax re-exports its names in a way that type checkers take for private; JAX leaves out types.
ocp: Any = orbax_v1
_Abstract: Any = jax.ShapeDtypeStruct


def start_writing(path: Path, leaves: Mapping[str, Any]) -> Callable[[], None]:
    """Start to write arrays below ``path``.

    Returns when the arrays' buffers may be donated.

    Returns
    -------
    Callable
        Waits until everything is written (not: flushed); raises what went wrong.
    """
    # Orbax refuses arrays without elements. They have no content, so shape and dtype suffice.
    stored = {key: np.asarray(leaf) if np.isscalar(leaf) else leaf for key, leaf in leaves.items()}
    stored = {key: leaf for key, leaf in stored.items() if leaf.size}
    if not stored:
        path.mkdir(parents=True)
        return lambda: None
    context = ocp.Context()
    # Weights are noise to a compressor: it takes the cores from training and saves a few percent.
    context.array.saving.use_compression = False
    with context:
        response = ocp.save_async(path, stored)
    return lambda: response.result()


def read(path: Path, abstract_leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Read arrays onto the shardings of ``abstract_leaves``; all of them must be there."""
    abstract = {key: _with_sharding(leaf) for key, leaf in abstract_leaves.items()}
    stored = {key: leaf for key, leaf in abstract.items() if leaf.size}
    leaves: dict[str, Any] = dict(ocp.load(path, stored)) if stored else {}
    for key, leaf in abstract.items():
        if not leaf.size:
            empty = np.zeros(leaf.shape, leaf.dtype)
            on_device = isinstance(leaf, jax.ShapeDtypeStruct)
            leaves[key] = jax.device_put(empty, leaf.sharding) if on_device else empty
    return leaves


def barrier(name: str) -> None:
    """Wait until all processes are here; safe in a thread, since no device takes part."""
    if jax.process_count() > 1:
        asyncio.run(ocp.multihost.sync_global_processes(name, operation_id="tjx-ckpt"))


def _with_sharding(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return _Abstract(leaf.shape, leaf.dtype, sharding=sharding)
