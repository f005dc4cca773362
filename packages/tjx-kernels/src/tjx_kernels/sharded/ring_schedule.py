"""Which part of a sequence each device of a ring holds, and what it sees of the other parts.

All of it is known before the program runs. The ring itself is in `ring.py`.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tjx_kernels.attention.types import AttentionCall

type Order = Literal["zigzag", "contiguous"]


def zigzag[A: (jax.Array, np.ndarray)](x: A, axis_size: int, axis: int = 1) -> A:
    """Reorder a whole sequence so that `axis_size` devices hold it in zigzag order.

    The sequence is cut into 2 * axis_size chunks; device r is given chunks r and
    2 * axis_size - 1 - r. Under a causal mask early rows see few keys and late rows many: so
    each device has as much to compute as any other (Dubey et al., "The Llama 3 herd of models",
    2024, section 3.3.2). Shard the result along `axis` as usual. Tokens, labels, positions and
    segment ids must all be reordered, best in the data loader: NumPy arrays stay such.

    Parameters
    ----------
    x
        An array whose length along `axis` is a multiple of 2 * axis_size.
    axis_size
        The number of devices that the sequence is spread over.
    axis
        The sequence's axis.

    Returns
    -------
    x's shape and dtype.

    Raises
    ------
    ValueError
        For a length that does not divide.

    Examples
    --------
    >>> import numpy as np
    >>> zigzag(np.arange(8), 2, axis=0)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    return _take_chunks(x, _zigzag_chunks(axis_size), axis)


def unzigzag[A: (jax.Array, np.ndarray)](x: A, axis_size: int, axis: int = 1) -> A:
    """Bring a whole sequence back from zigzag order; the inverse of `zigzag`.

    Examples
    --------
    >>> import numpy as np
    >>> unzigzag(zigzag(np.arange(8), 2, axis=0), 2, axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return _take_chunks(x, np.argsort(_zigzag_chunks(axis_size)).tolist(), axis)


def zigzag_positions(length: int, axis_size: int) -> np.ndarray:
    """Give the position of each token of a whole sequence in zigzag order, int32 [length].

    What a model needs for its position embeddings, sharded as the sequence is.

    Examples
    --------
    >>> zigzag_positions(8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    return zigzag(np.arange(length, dtype=np.int32), axis_size, axis=0)


def _zigzag_chunks(size: int) -> list[int]:
    return [chunk for device in range(size) for chunk in _held("zigzag", size, device)]


def _held(order: Order, size: int, device: int) -> tuple[int, ...]:
    """Name the chunks that a device holds."""
    return (device, 2 * size - 1 - device) if order == "zigzag" else (device,)


def _take_chunks[A: (jax.Array, np.ndarray)](x: A, chunks: list[int], axis: int) -> A:
    length = x.shape[axis]
    if length % len(chunks):
        raise ValueError(
            f"the length along axis {axis} is {length}; zigzag order over {len(chunks) // 2} "
            f"devices needs a multiple of {len(chunks)}: pad the sequence"
        )
    axis %= x.ndim
    in_chunks = x.reshape(*x.shape[:axis], len(chunks), length // len(chunks), *x.shape[axis + 1 :])
    order = np.array(chunks)
    take = np.take if isinstance(x, np.ndarray) else jnp.take
    taken: A = take(in_chunks, order, axis).reshape(x.shape)
    return taken


class Part(NamedTuple):
    """A part of a device's rows, with a part of the keys that have just arrived, in one call.

    `rows` and `keys` are the first index and the one past the last, within what the device holds;
    `offset` is the first row's position counted from the first of these keys.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    window: int | None
    offset: int


class Schedule(NamedTuple):
    """What each device computes at each step.

    Attributes
    ----------
    cases
        Everything that some device ever does, each thing once: the parts that it computes.
    table
        Which case it is, for each step and device: int32 [steps, devices]. At step s a device
        holds the keys of the device s places before it. The last steps are left out where no
        device sees anything any more.
    """

    cases: tuple[tuple[Part, ...], ...]
    table: np.ndarray


def schedule(call: AttentionCall, order: Order, size: int) -> Schedule:
    """Plan the ring over `size` devices, for which `call` describes what one device holds."""
    cases: dict[tuple[Part, ...], int] = {}
    rows = []
    for step in range(size):
        seen = [parts(call, order, size, device, step) for device in range(size)]
        rows.append([cases.setdefault(case, len(cases)) for case in seen])
    while len(rows) > 1 and all(case == cases.get(()) for case in rows[-1]):
        rows.pop()
    return Schedule(tuple(cases), np.array(rows, np.int32))


def parts(call: AttentionCall, order: Order, size: int, device: int, step: int) -> tuple[Part, ...]:
    """Name the calls with which a device covers, at one step, all that its rows see."""
    source = (device - step) % size  # the device whose keys are here
    if call.window is not None:
        return tuple(_window_parts(call, call.window, order, size, (device, source)))
    whole = Part((0, call.q_len), (0, call.kv_len), causal=False, window=None, offset=0)
    if not call.causal:
        return (whole,)
    if step == 0:
        # In zigzag order too, a device's own rows and keys stand in the order of their positions.
        return (whole._replace(causal=True),)
    if order == "contiguous":
        return (whole,) if source < device else ()
    # The first chunk of an earlier device is seen by all rows, its second by none; both chunks of
    # a later device are seen by the second chunk of rows. Half of all pairs either way.
    half = call.q_len // 2
    if source < device:
        return (whole._replace(keys=(0, half)),)
    return (whole._replace(rows=(half, call.q_len)),)


def _window_parts(
    call: AttentionCall, window: int, order: Order, size: int, devices: tuple[int, int]
) -> Iterator[Part]:
    """Take each pair of a chunk of rows and a chunk of keys by itself."""
    chunks = [_held(order, size, device) for device in devices]
    length = call.q_len // len(chunks[0])
    for i, of_rows in enumerate(chunks[0]):
        for j, of_keys in enumerate(chunks[1]):
            offset = (of_rows - of_keys) * length
            nearest, farthest = offset - length + 1, offset + length - 1
            if nearest >= window or (call.causal and offset < 0):
                continue
            rows = (i * length, (i + 1) * length)
            keys = (j * length, (j + 1) * length)
            if farthest < window and not (call.causal and offset == 0):
                yield Part(rows, keys, causal=False, window=None, offset=0)
            else:
                yield Part(rows, keys, call.causal, window, offset)
