"""The order in which the thread blocks of the Hopper kernels take their tiles.

A tile is a block of query rows (forward, dq) or of keys (dk, dv) of one head. Its thread block
streams keys and values (or queries and their gradients) of that head through shared memory. A tile
of 128 rows does 128 FLOPs for every byte of them (bfloat16), and device memory gives 4.0 TB/s
(H100: 3.3): without reuse in the L2 cache that is 512 TFLOP/s at most (H100: 430), below what the
tensor cores do. So tiles are taken in sections: the heads whose streamed operands fit the L2 cache
together, all tiles of these heads, then the next section. Within a section, heads vary fastest, and
the tiles with most work come first: thread blocks that run at the same time have equal work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.types import AttentionCall

# Of the 50 MB of L2 of an H100 or H200: the other operands and the outputs pass through it too.
L2_BYTES = 32 * 2**20
# Streaming multiprocessors of H100 SXM and H200. On a GPU with fewer, some thread blocks of a
# persistent kernel start when others have ended, which is slower but correct.
PROCESSORS = {"sm_90": 132, "interpret": 5}


class TileOrder(NamedTuple):
    """The order of all tiles of a call.

    Attributes
    ----------
    tiles
        Tiles of one head.
    heads
        Heads of all batch rows: head n of batch row b has the number b * heads + n.
    section
        Heads in a section; the last section may have fewer.
    last_first
        Whether the last tile of a head comes first; otherwise the first one.
    """

    tiles: int
    heads: int
    section: int
    last_first: bool

    @property
    def total(self) -> int:
        """Number of tiles."""
        return self.tiles * self.heads

    def place(self, index: Any, tiles: int | None = None) -> tuple[Any, Any]:
        """Return the head and the tile at a place of the order, int32.

        With `tiles`, the order is that of the first so many tiles of each head.
        """
        tiles = self.tiles if tiles is None else tiles
        index = jnp.int32(index)
        first: Any = 0
        heads: Any = self.heads
        if self.section < self.heads:
            size = jnp.int32(self.section * tiles)
            first = lax.div(index, size) * self.section
            index, heads = lax.rem(index, size), self.section
            if self.heads % self.section:
                heads = jnp.minimum(heads, self.heads - first)
        tile = lax.div(index, jnp.int32(heads))
        head = first + lax.rem(index, jnp.int32(heads))
        return head, self.tiles - 1 - tile if self.last_first else tile

    def for_each(self, programs: int, pairs: bool, body: Callable[..., Any], carry: Any) -> Any:
        """Run `carry = body(turn, place, carry)` for the tiles of this thread block.

        Of `programs` persistent thread blocks, number i (axis "program") takes the tiles i,
        i + programs, ... of the order. With `pairs` it takes pairs of a tile and its mirror image
        (the first tile of a head with the last, the second with the last but one, ...), which have
        the same work under a causal mask: all pairs cost the same, so that taking them in turn is
        nearly as good as taking the next one when free. The middle tile of an odd number has no
        partner.

        Parameters
        ----------
        programs
            Thread blocks of the grid.
        pairs
            Whether to take pairs of tiles.
        body
            Given the number of earlier tiles of this thread block, `place` and the carry, returns
            the carry. `place()` returns the tile's head and number; it computes them anew each
            time, so that they need no registers between its uses.
        carry
            The carry of the first tile.

        Returns
        -------
        The number of tiles of this thread block, and the last carry.
        """
        tiles = -(-self.tiles // 2) if pairs else self.tiles
        units = tiles * self.heads

        def step(state: Any) -> Any:
            unit, second, turn, carry = state

            def place() -> tuple[Any, Any]:
                # The compiler cannot know that this is the same number every time.
                number = lax.optimization_barrier(unit)  # type: ignore[no-untyped-call]  # jax's
                head, tile = self.place(number, tiles)
                return head, jnp.where(second == 1, self.tiles - 1 - tile, tile) if pairs else tile

            carry = body(turn, place, carry)
            following = unit + programs
            if pairs:
                _, tile = self.place(unit, tiles)
                alone = tile == self.tiles - 1 - tile
                following = jnp.where((second == 1) | alone, following, unit)
                second = jnp.where(following == unit, 1, 0)
            return following, second, turn + 1, carry

        zero = jnp.int32(0)
        start = (lax.axis_index("program"), zero, zero, carry)
        return lax.while_loop(lambda state: state[0] < units, step, start)[2:]


def tile_order(
    call: AttentionCall, tiles: int, heads: int, streamed: int, *, last_first: bool
) -> TileOrder:
    """Order tiles so that what a section streams fits the L2 cache.

    Parameters
    ----------
    call
        The call.
    tiles
        Tiles of one head.
    heads
        Heads of a batch row that have tiles: the query heads or the key heads.
    streamed
        Bytes that all tiles that share a key head stream. Query heads of one group stay together.
    last_first
        Whether the last tiles have most work.
    """
    together = heads // call.kv_heads
    section = together * max(1, L2_BYTES // max(streamed, 1))
    return TileOrder(tiles, call.batch * heads, min(section, call.batch * heads), last_first)
