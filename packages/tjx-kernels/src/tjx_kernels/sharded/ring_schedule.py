"""Token order of ring attention and the static schedule of blocks that each device computes."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tjx_kernels.attention.call import AttentionCall

type Order = Literal["zigzag", "contiguous"]


def zigzag[A: (jax.Array, np.ndarray)](x: A, axis_size: int, axis: int = 1) -> A:
    """Permute a global sequence to zigzag order, which balances causal ring attention.

    The sequence is divided into 2 * axis_size chunks; device r gets chunks r and
    2 * axis_size - 1 - r. Under a causal mask early rows attend to few keys and late rows to many,
    so all devices then have the same work (Dubey et al., "The Llama 3 herd of models", 2024,
    section 3.3.2). Shard the result along `axis`. Tokens, labels, positions and segment ids all
    need the permutation, best in the data loader; a NumPy array gives a NumPy array.

    Parameters
    ----------
    x
        An array whose length along `axis` is a multiple of 2 * axis_size.
    axis_size
        Number of devices that share the sequence.
    axis
        The sequence's axis.

    Returns
    -------
    array
        The permuted array, with the shape and dtype of `x`.

    Raises
    ------
    ValueError
        If the length is no multiple of 2 * axis_size.

    Examples
    --------
    >>> import numpy as np
    >>> zigzag(np.arange(8), 2, axis=0)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    return _take_chunks(x, _zigzag_chunks(axis_size), axis)


def unzigzag[A: (jax.Array, np.ndarray)](x: A, axis_size: int, axis: int = 1) -> A:
    """Invert `zigzag`: permute a global sequence from zigzag to natural order.

    Parameters
    ----------
    x, axis_size, axis
        As for `zigzag`.

    Returns
    -------
    array
        `x` in natural order.

    Examples
    --------
    >>> import numpy as np
    >>> unzigzag(zigzag(np.arange(8), 2, axis=0), 2, axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return _take_chunks(x, np.argsort(_zigzag_chunks(axis_size)).tolist(), axis)


def zigzag_positions(length: int, axis_size: int) -> np.ndarray:
    """Return the positions of a global sequence in zigzag order, int32 [length].

    Position embeddings need them, sharded as the sequence.

    Parameters
    ----------
    length : int
        Tokens of the sequence; a multiple of twice `axis_size`.
    axis_size : int
        Number of devices along the sequence.

    Returns
    -------
    int32 array [length]
        Position of each token in zigzag order.

    Examples
    --------
    >>> zigzag_positions(8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    return zigzag(np.arange(length, dtype=np.int32), axis_size, axis=0)


def _zigzag_chunks(size: int) -> list[int]:
    return [chunk for device in range(size) for chunk in _held("zigzag", size, device)]


def _held(order: Order, size: int, device: int) -> tuple[int, ...]:
    """Return the indices of the chunks of a device."""
    return (device, 2 * size - 1 - device) if order == "zigzag" else (device,)


def _take_chunks[A: (jax.Array, np.ndarray)](x: A, chunks: list[int], axis: int) -> A:
    length = x.shape[axis]
    if length % len(chunks):
        raise ValueError(
            f"x: got length {length} along axis {axis}; expected a multiple of {len(chunks)} for "
            f"zigzag order over {len(chunks) // 2} devices; pad the sequence"
        )
    axis %= x.ndim
    in_chunks = x.reshape(*x.shape[:axis], len(chunks), length // len(chunks), *x.shape[axis + 1 :])
    order = np.array(chunks)
    take = np.take if isinstance(x, np.ndarray) else jnp.take
    taken: A = take(in_chunks, order, axis).reshape(x.shape)
    return taken


class RingBlock(NamedTuple):
    """One attention call of a ring step: a range of local rows and a range of received keys.

    `rows` and `keys` are [start, stop) in the local shards; `offset` is the position of the first
    row relative to the first key.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    window: int | None
    offset: int


class RingSchedule(NamedTuple):
    """Blocks that each device computes at each step of the ring.

    Attributes
    ----------
    cases
        Distinct lists of blocks that some device computes at some step.
    table
        Index into `cases` for each step and device, int32 [steps, devices]. At step s device d has
        the keys of device d - s. Final steps in which every block is masked are omitted.
    """

    cases: tuple[tuple[RingBlock, ...], ...]
    table: np.ndarray


def schedule(call: AttentionCall, order: Order, size: int) -> RingSchedule:
    """Return the schedule of a ring of `size` devices; `call` is the call of one device."""
    cases: dict[tuple[RingBlock, ...], int] = {}
    rows = []
    for step in range(size):
        seen = [step_blocks(call, order, size, device, step) for device in range(size)]
        rows.append([cases.setdefault(case, len(cases)) for case in seen])
    while len(rows) > 1 and all(case == cases.get(()) for case in rows[-1]):
        rows.pop()
    return RingSchedule(tuple(cases), np.array(rows, np.int32))


def step_blocks(
    call: AttentionCall, order: Order, size: int, device: int, step: int
) -> tuple[RingBlock, ...]:
    """Return the blocks that a device computes at one step."""
    source = (device - step) % size  # the device that the current keys come from
    if call.window is not None:
        return tuple(_window_blocks(call, call.window, order, size, (device, source)))
    whole = RingBlock((0, call.q_len), (0, call.kv_len), causal=False, window=None, offset=0)
    if not call.causal:
        return (whole,)
    if step == 0:
        # A device's own rows and keys are ordered by position, in zigzag order too.
        return (whole._replace(causal=True),)
    if order == "contiguous":
        return (whole,) if source < device else ()
    # All rows attend to the first chunk of an earlier device and none to its second; only the
    # second chunk of rows attends to a later device's keys. Half of all pairs in both cases.
    half = call.q_len // 2
    if source < device:
        return (whole._replace(keys=(0, half)),)
    return (whole._replace(rows=(half, call.q_len)),)


def _window_blocks(
    call: AttentionCall, window: int, order: Order, size: int, devices: tuple[int, int]
) -> Iterator[RingBlock]:
    """Yield the visible blocks of each pair of a row chunk and a key chunk."""
    chunks = [_held(order, size, device) for device in devices]
    length = call.q_len // len(chunks[0])
    for i, of_rows in enumerate(chunks[0]):
        for j, of_keys in enumerate(chunks[1]):
            offset = (of_rows - of_keys) * length
            distance = abs(offset) if call.symmetric_window else offset
            nearest, farthest = distance - length + 1, distance + length - 1
            if nearest >= window or (call.causal and offset < 0):
                continue
            rows = (i * length, (i + 1) * length)
            keys = (j * length, (j + 1) * length)
            if farthest < window and not (call.causal and offset == 0):
                yield RingBlock(rows, keys, causal=False, window=None, offset=0)
            else:
                yield RingBlock(rows, keys, call.causal, window, offset)
