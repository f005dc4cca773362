"""Tile order of the Hopper kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_kernels.attention.backends.mosaic_gpu import tile_order as mosaic_gpu_grid
from tjx_kernels.attention.backends.mosaic_gpu.tile_order import TileOrder, tile_order
from tjx_kernels.attention.call import describe_call

ORDERS = [TileOrder(5, 8, 3, True), TileOrder(4, 6, 6, False), TileOrder(1, 7, 2, True)]


@pytest.mark.parametrize("order", ORDERS)
def test_sections_process_all_tiles_with_most_work_first(order: TileOrder) -> None:
    places = jax.jit(lambda: jax.vmap(order.place)(jnp.arange(order.total)))()
    heads, tiles = jax.device_get(places)
    work = tiles if order.last_first else order.tiles - 1 - tiles
    ranks = np.lexsort((heads, -work, heads // order.section))
    np.testing.assert_array_equal(ranks, np.arange(order.total))
    assert len(set(zip(heads.tolist(), tiles.tolist(), strict=True))) == order.total


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_persistent_blocks_share_all_tiles(order: TileOrder, pairs: bool) -> None:
    programs = 3

    def one(_: Any) -> Any:
        def body(turn: Any, place: Any, found: Any) -> Any:
            return found.at[turn].set(jnp.stack(place()))

        empty = jnp.full((order.total, 2), -1)
        return order.for_each(programs, pairs, body, empty)

    run = jax.jit(lambda: jax.vmap(one, axis_name="program")(jnp.zeros(programs)))
    turns, found = jax.device_get(run())
    assert turns.sum() == order.total
    taken = found[found[..., 0] >= 0]
    assert len(np.unique(taken, axis=0)) == len(taken) == order.total
    for block in found if pairs else ():
        own = [tuple(x) for x in block[block[:, 0] >= 0].tolist()]
        while own:  # a tile is followed by its mirror image
            head, tile = own.pop(0)
            if tile != order.tiles - 1 - tile:
                assert own.pop(0) == (head, order.tiles - 1 - tile)


def test_sections_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (jax.ShapeDtypeStruct((3, 9, n, 16), jnp.bfloat16) for n in (6, 2))  # type: ignore[no-untyped-call]  # jax's
    call = describe_call(q=q, k=k, v=k, interpret=True)
    monkeypatch.setattr(mosaic_gpu_grid, "L2_BYTES", 1000)
    # Three query heads share each of the 6 key heads.
    assert [tile_order(call, 2, 6, n, last_first=True).section for n in (1, 499, 500, 2000)] == [
        18,
        6,
        6,
        3,
    ]
    assert tile_order(call, 2, 2, 400, last_first=True) == TileOrder(2, 6, 2, True)
