"""Tile order of the Hopper kernels: L2 reuse and load balance.

A tile is a block of query rows (forward, dq) or of keys (dk, dv) of one head. Its thread block
streams keys and values (or queries and their gradients) of that head through shared memory. A tile
of 128 rows does 128 FLOPs per streamed byte (bfloat16), and device memory provides 4.0 TB/s
(H100: 3.3): without reuse in the L2 cache that is 512 TFLOP/s at most (H100: 430), below the
tensor cores' rate. So the order has sections: all tiles of the heads whose streamed operands fit
the L2 cache together, then the next heads. Within a section heads vary fastest and tiles with most
work come first, so that concurrent thread blocks have equal work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.call import AttentionCall

# Part of the 50 MB of L2 of an H100 or H200: other operands and outputs pass through it too.
L2_BYTES = 32 * 2**20
# Streaming multiprocessors of H100 SXM and H200. With fewer, some thread blocks of a persistent
# kernel start after others have ended: slower, but correct.
PROCESSORS = {"sm_90": 132, "interpret": 5}


class TileOrder(NamedTuple):
    """Order of all tiles of a call.

    Attributes
    ----------
    tiles
        Tiles of one head.
    heads
        Heads of all batch rows: head n of batch row b has index b * heads + n.
    section
        Heads in a section; the last section may have fewer.
    last_first
        Whether the last tile of a head comes first.
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
        """Return the head and the tile at a position of the order, int32.

        `tiles` restricts the order to the first tiles of each head.
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

        Persistent thread block i (axis "program") of `programs` processes the tiles i,
        i + programs, ... of the order. With `pairs` it processes pairs of a tile and its mirror
        image (first and last tile of a head, second and last but one, ...). Under a causal mask all
        pairs have the same work, so this static assignment is nearly as good as a dynamic one. The
        middle tile of an odd number has no partner.

        Parameters
        ----------
        programs
            Thread blocks of the grid.
        pairs
            Whether to take pairs of tiles.
        body
            (number of earlier tiles of this thread block, `place`, carry) -> carry. `place()`
            returns the tile's head and index; it recomputes them to keep no registers occupied.
        carry
            Initial carry.

        Returns
        -------
        The number of tiles of this thread block, and the final carry.
        """
        tiles = -(-self.tiles // 2) if pairs else self.tiles
        units = tiles * self.heads

        def step(state: Any) -> Any:
            unit, second, turn, carry = state

            def place() -> tuple[Any, Any]:
                # The barrier prevents the compiler from reusing the result between calls.
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
    """Return a tile order whose sections stream no more than fits the L2 cache.

    Parameters
    ----------
    call
        The call.
    tiles
        Tiles of one head.
    heads
        Heads per batch row that have tiles: query heads or key heads.
    streamed
        Bytes streamed by all tiles of a key head. Query heads of a group stay together.
    last_first
        Whether the last tiles have the most work.
    """
    together = heads // call.kv_heads
    section = together * max(1, L2_BYTES // max(streamed, 1))
    return TileOrder(tiles, call.batch * heads, min(section, call.batch * heads), last_first)
