"""Restoring of arrays from checkpoint files onto devices with the requested shardings."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from tjx_ckpt.store.checkpoint_reader import Box, CheckpointReader

_READERS = min(8, os.cpu_count() or 1)


def restore_leaves(reader: CheckpointReader, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Read leaves of a checkpoint and place them on the devices of their abstract leaves.

    Threads read and verify leaves ahead of the transfer to devices, so that the host holds a few
    leaves at a time.

    Parameters
    ----------
    reader : CheckpointReader
        The open checkpoint. It must have every key, with the same shape.
    abstract : mapping of str to array
        jax.ShapeDtypeStructs or jax.Arrays with the requested shardings (none: the default
        device), or NumPy arrays for NumPy arrays. Leaves are converted to their dtypes.

    Returns
    -------
    dict of str to array
        The leaves by key.

    Raises
    ------
    DamagedError
        If the content of a file differs from what was saved.
    """

    def read(item: tuple[str, Any]) -> tuple[str, dict[Box, np.ndarray]]:
        key, leaf = item
        boxes = list(dict.fromkeys(_boxes(leaf)))
        dtype = np.dtype(leaf.dtype)
        arrays = [array.astype(dtype, copy=False) for array in reader.boxes(key, boxes)]
        return key, dict(zip(boxes, arrays, strict=True))

    with ThreadPoolExecutor(_READERS, thread_name_prefix="restore") as pool:
        try:
            return {
                key: _place(abstract[key], parts)
                for key, parts in _prefetched(pool, read, abstract.items())
            }
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _place(leaf: Any, parts: dict[Box, np.ndarray]) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        (array,) = parts.values()
        return array
    shape = tuple(leaf.shape)
    make_array: Any = jax.make_array_from_callback  # JAX gives no types
    with jax.transfer_guard_host_to_device("allow"):  # an explicit transfer
        return make_array(shape, sharding_of(leaf), lambda index: parts[_box(index, shape)])


def _boxes(leaf: Any) -> list[Box]:
    """Return the boxes of a leaf that this process's devices hold."""
    shape = tuple(leaf.shape)
    if isinstance(leaf, np.ndarray | np.generic):
        return [Box((0,) * len(shape), shape)]
    indices: Any = sharding_of(leaf).addressable_devices_indices_map(shape).values()
    return [_box(index, shape) for index in indices]


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    ranges = [part.indices(length) for part, length in zip(index, shape, strict=True)]
    return Box(
        tuple(first for first, _, _ in ranges), tuple(last - first for first, last, _ in ranges)
    )


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Return the sharding of an abstract leaf; the default device if it has none."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _prefetched[T, R](
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """Yield results in order, with a bounded number of them in flight."""
    futures: collections.deque[Future[R]] = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > _READERS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
