"""Train step with the same bits on every mesh of data and fsdp devices (`train.reproducible mesh`).

A microbatch is divided into ``train.virtual_shards`` virtual shards, a number that does not depend
on the mesh. Each device loops over its virtual shards with the same loop body and adds their
gradients in a binary tree over the index of the virtual shard; devices continue the same tree. The
rest of the step runs on whole arrays on each device. So meshes differ in the trip count of the loop
and in which additions cross devices, not in the order of any sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

import tjx_nn
import tjx_optim
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.train_step import Gradients, make_loss_sum

_lax: Any = lax  # JAX gives no types for these functions
# Mesh axes over which virtual shards are distributed, outer to inner.
SHARD_AXES = ("data", "fsdp")


class VirtualShardLayout(tjx_nn.Layout):
    """Layout of one device that leaves no choice to the number of devices.

    Parameters
    ----------
    platform : str
        Platform of the devices. Elsewhere than on CPUs the defaults depend on shapes only.
    """

    def __init__(self, platform: str) -> None:
        self.keep_logits = False if platform == "cpu" else None


def on_each_device[F: Callable[..., Any]](update: F, *, mesh: Mesh) -> F:
    """Run a train step on each device, with the whole state and the device's rows of the batch.

    Parameters
    ----------
    update : callable
        From (state, batch) to (state, metrics), equal on all devices.
    mesh : jax.sharding.Mesh
        The device mesh.
    """

    def isolated(state: Any, batch: Any) -> Any:
        # Barriers keep XLA from fusing the step with gathers and slices, which the mesh decides. A
        # gather also decides the memory layout of its result, and a reduction follows the layout.
        state, batch = jax.tree.map(_row_major, _lax.optimization_barrier((state, batch)))
        return jax.tree.map(_row_major, _lax.optimization_barrier(update(state, batch)))

    whole, rows = PartitionSpec(), PartitionSpec(SHARD_AXES)  # type: ignore[no-untyped-call]
    mapped: F = jax.shard_map(  # type: ignore[assignment]  # of the same signature
        isolated, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False
    )
    return mapped


def _row_major(x: jax.Array) -> jax.Array:
    layout = Layout(tuple(range(x.ndim)))
    constrained: jax.Array = with_layout_constraint(x, layout)  # type: ignore[no-untyped-call]
    return constrained


def make_gradients(config: Config, mesh: Mesh) -> Gradients:
    """Return the gradient function of `on_each_device`, a sum over virtual shards.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : jax.sharding.Mesh
        The device mesh.

    Returns
    -------
    callable
        As `train_step.make_gradients` returns it; microbatches hold the rows of the device. The
        dropout key of a virtual shard is a function of its microbatch's key and its index.
    """
    layout = VirtualShardLayout(mesh.devices.flat[0].platform)
    loss_sum = make_loss_sum(config, layout)
    local_shards = config.train.virtual_shards // mesh.size

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        assert base is None  # the configuration refuses adapters in reproducible mode
        scale = jnp.float32(1) if loss_scale is None else loss_scale
        first = lax.axis_index(SHARD_AXES) * local_shards

        def sums_of(index: jax.Array) -> Any:
            shard = _virtual_shard(microbatches, index, local_shards, first)
            inputs = _lax.optimization_barrier((params, shard, scale))
            found = tjx_optim.gradient_sums(loss_sum, *inputs[:2], loss_scale=inputs[2])
            return _lax.optimization_barrier(found)

        local = local_tree_sum(sums_of, local_shards)
        found, totals = _lax.optimization_barrier(_tree_sum_over_devices(local, mesh))
        return tjx_optim.mean_gradients(found, totals, loss_scale=scale)

    return gradients


def _virtual_shard(microbatches: Any, index: jax.Array, count: int, first: jax.Array) -> Any:
    """Return the rows of one of `count` local virtual shards in each microbatch [k, rows, ...]."""

    def rows_of(x: jax.Array) -> jax.Array:
        k, rows = x.shape[:2]
        shards = x.reshape(k, count, rows // count, *x.shape[2:])
        shard: jax.Array = lax.dynamic_index_in_dim(shards, index, axis=1, keepdims=False)
        return shard

    shard = {name: rows_of(x) for name, x in microbatches.items() if name != "dropout_key"}
    if "dropout_key" in microbatches:
        fold = jax.vmap(jax.random.fold_in, (0, None))
        shard["dropout_key"] = fold(microbatches["dropout_key"], first + index)
    return shard


def local_tree_sum(term: Callable[[jax.Array], Any], count: int) -> Any:
    """Add term(0) ... term(count - 1) in a balanced binary tree; `count` is a power of 2.

    The loop is a binary counter: slot `level` holds a sum of 2**level terms that waits for its
    sibling. It is a loop for one term, too: the bound is hidden from XLA, which would inline it.
    """
    levels = count.bit_length() - 1
    bound = _lax.optimization_barrier(jnp.int32(count))

    def add(carry: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        index, slots = carry
        total = term(index)
        with jax.named_scope("gradients"):  # the planner finds its operations by this name
            return index + 1, _count_up(index, slots, total)

    shapes = jax.eval_shape(term, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = (jnp.int32(0), [zeros for _ in range(levels + 1)])
    _, slots = lax.while_loop(lambda carry: carry[0] < bound, add, start)
    return slots[levels]


def _count_up(index: jax.Array, slots: list[Any], total: Any) -> list[Any]:
    """Add a term to the slots: the sums of the low bits that `index` has set are carried."""
    slots = list(slots)
    carrying: jax.Array = jnp.bool_(True)
    for level, waiting in enumerate(slots):
        is_set = carrying & (index >> level & 1 == 1)
        slots[level] = _select(carrying & ~is_set, total, waiting)
        total = _select(is_set, jax.tree.map(jnp.add, waiting, total), total)
        carrying = is_set
    return slots


def _select(condition: jax.Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: lax.select(condition, a, b), chosen, other)


@jax.named_scope("gradients")
def _tree_sum_over_devices(local: Any, mesh: Mesh) -> Any:
    """Add the sums of all devices in a balanced binary tree; each device gets the same bits.

    Recursive doubling: at each level a device adds its sum to that of its sibling. Addition is
    commutative, so both compute the same value.
    """
    total = local
    for axis in reversed(SHARD_AXES):
        size, distance = mesh.shape[axis], 1
        while distance < size:
            pairs = [(device, device ^ distance) for device in range(size)]
            sibling = jax.tree.map(lambda x, a=axis, p=pairs: _lax.ppermute(x, a, p), total)
            total = jax.tree.map(jnp.add, total, sibling)
            distance *= 2
    return total
