"""How attention in plain JAX cuts its work: chunks of query rows in bands that read the same keys.

A chunk is what scores exist for at one time. A band is a run of chunks of one size that are looped
over, so that one program serves them all.
"""

from typing import NamedTuple

from tjx_kernels.attention.masks import key_blocks
from tjx_kernels.attention.types import AttentionCall

# Rows of a chunk: large enough that the matrix products run at full speed, small enough that the
# scores of a chunk stay a small part of memory.
CHUNK = 128
# Bands are unrolled, chunks within them are looped over. More bands skip more of the upper
# triangle (n bands compute (n + 1) / 2n of it) and take longer to compile.
MAX_BANDS = 8


class Band(NamedTuple):
    """Chunks of query rows that read `width` keys each.

    Attributes
    ----------
    start, chunks, rows
        `chunks` chunks of `rows` rows, from the row `start` on.
    first_key, width
        The keys [first_key, first_key + width) are read.
    slides
        The keys read move with the chunk, and `first_key` means nothing.
    """

    start: int
    chunks: int
    rows: int
    first_key: int
    width: int
    slides: bool


def plan_bands(call: AttentionCall) -> list[Band]:
    """Cut the query rows into bands; the last, shorter chunk is a band of its own."""
    whole, rest = divmod(call.q_len, CHUNK)
    slides = _slides(call)
    count = 1 if slides or not call.causal or call.q_offset is None else MAX_BANDS
    per_band = max(1, -(-whole // count))
    sizes = [
        (first * CHUNK, min(per_band, whole - first), CHUNK) for first in range(0, whole, per_band)
    ]
    if rest:
        sizes.append((whole * CHUNK, 1, rest))
    return [Band(*size, *_keys_read(call, *size, slides), slides) for size in sizes]


def _slides(call: AttentionCall) -> bool:
    if not call.causal or call.window is None or call.window + CHUNK > call.kv_len:
        return False
    # Where each batch row has a window of its own, a bias would have to be cut for each, one that
    # they share too. It is quadratic anyway: all keys are read.
    return call.bias is None or call.q_offset is not None


def _keys_read(
    call: AttentionCall, start: int, chunks: int, rows: int, slides: bool
) -> tuple[int, int]:
    """Find the first key and the number of keys that a band reads."""
    if slides:
        assert call.window is not None
        return 0, call.window + rows - 1
    if call.q_offset is None:
        return 0, call.kv_len
    seen = key_blocks(call, call.q_offset + start, chunks * rows, 1)
    assert isinstance(seen.start, int)
    assert isinstance(seen.stop, int)
    # A band of dead rows still reads one key, which the mask then hides.
    first = min(seen.start, call.kv_len - 1)
    return first, max(seen.stop - first, 1)
