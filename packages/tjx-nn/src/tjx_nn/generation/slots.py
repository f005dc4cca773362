"""Generation of many rows in fewer slots: a row that ends makes room for the next one.

All of it is one compiled loop. Each shard of the rows has slots and a queue of its own, so that no
row moves between devices.

Axes in names: D shards, R rows of a shard, P prompts of a shard, S slots of a shard, N slots of all
shards, T time.
"""

import functools
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Int

from tjx_nn.attention.kv_cache import grow_cache
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights
from tjx_nn.generation.decoding_loop import (
    GenerationRequest,
    GenerationState,
    choose_tokens,
    read_prompts,
)
from tjx_nn.generation.prompt import GenerativeConfig, GenerativeModel, row_shards


class _Rows(NamedTuple):
    """Rows that wait for a slot.

    Attributes
    ----------
    first
        State of each row after its first token, without a cache.
    cache
        KV cache of each prompt.
    lengths, seeds
        Length of the prompt and seed of each row.
    """

    first: GenerationState
    cache: Any
    lengths: Int[Array, "D R"]
    seeds: Any

    @property
    def per_shard(self) -> int:
        """Rows of a shard."""
        return int(self.lengths.shape[1])


class _Slots(NamedTuple):
    """State of the loop.

    Attributes
    ----------
    state
        State of the slots, with the step of each.
    row
        Row of its shard in each slot; R, the number of rows, for an empty slot.
    waiting
        Next row of each shard.
    outputs
        Tokens, -1 where there is none yet, and log-probabilities if requested.
    steps
        Number of decoding steps.
    """

    state: GenerationState
    row: Int[Array, "D S"]
    waiting: Int[Array, " D"]
    outputs: tuple[Int[Array, "D R T"], Float32[Array, "D R T"] | None]
    steps: Int[Array, ""]


@functools.partial(
    jax.jit,
    static_argnames=(
        "config", "capacity", "size", "with_log_probs", "samples", "slots", "sharding"
    ),
)  # fmt: skip
def generate_in_slots(
    weights: DecodeWeights,
    request: GenerationRequest,
    *,
    config: GenerativeConfig,
    capacity: int,
    size: int,
    with_log_probs: bool,
    samples: int,
    slots: int,
    sharding: NamedSharding | None,
) -> tuple[Int[Array, "B T"], Float32[Array, "B T"] | None, Int[Array, ""]]:
    """Generate `capacity` columns of tokens, their log-probabilities, and count the steps.

    Parameters
    ----------
    weights, request, config, capacity, with_log_probs, samples
        As of `run_request`.
    size
        Tokens that the KV cache of a slot holds.
    slots
        Number of slots; less than the rows, and a multiple of their shards.
    sharding
        Sharding of the rows, or None.
    """
    model = bind_decode_weights(config, weights)
    shards = 1 if sharding is None else row_shards(sharding)

    def keep_sharded(tree: Any) -> Any:
        if sharding is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding)  # type: ignore[no-untyped-call]

    width = request.prompt.tokens.shape[1]
    state = read_prompts(model, weights.blocks, request, width, with_log_probs, samples)
    rows = _waiting_rows(state, request, shards)
    cache = jax.eval_shape(lambda cache: grow_cache(model.config, cache, size), state.cache)
    state, row, waiting = keep_sharded(_empty_slots(rows, cache, slots))
    outputs = _first_outputs(rows.first, capacity)
    held = _Slots(state, row, waiting, outputs, jnp.int32(0))

    def can_fill(held: _Slots) -> Array:
        fillable: Array = (held.row == rows.per_shard).any(1) & (held.waiting < rows.per_shard)
        return fillable

    def fill(held: _Slots) -> _Slots:
        filled = _fill(rows, held, can_fill(held), samples)
        return filled._replace(state=keep_sharded(filled.state))

    def step(held: _Slots) -> _Slots:
        held = jax.lax.while_loop(lambda held: can_fill(held).any(), fill, held)
        return _decode(model, weights.blocks, request, rows, held)

    def is_unfinished(held: _Slots) -> Array:
        has_rows = held.row < rows.per_shard
        unfinished: Array = has_rows.any() | (held.waiting < rows.per_shard).any()
        return unfinished

    held = jax.lax.while_loop(is_unfinished, step, held)
    tokens_BT, log_probs_BT = _flat(held.outputs)
    last_B1 = (tokens_BT >= 0).sum(1, keepdims=True) - 1
    stop_B1 = jnp.take_along_axis(tokens_BT, last_B1, 1)
    return jnp.where(tokens_BT < 0, stop_B1, tokens_BT), log_probs_BT, held.steps


def _waiting_rows(state: GenerationState, request: GenerationRequest, shards: int) -> _Rows:
    """Divide the state after the first tokens, and the prompts, among the shards."""
    first = state._replace(
        step=jnp.ones_like(state.token), done=state.done | (request.limit <= 1), cache=[]
    )
    given = first, state.cache, request.prompt.lengths, request.sampling.seeds
    return _Rows(*_by_shard(given, shards))


def _empty_slots(rows: _Rows, cache: Any, slots: int) -> tuple[GenerationState, Array, Array]:
    """Return state and rows of empty slots, and the first row that waits in each shard."""
    shards = len(rows.lengths)

    def zeros(x: Any) -> Array:
        return jnp.zeros((slots, *x.shape[1:]), x.dtype)

    state = jax.tree.map(zeros, _flat(rows.first))._replace(cache=jax.tree.map(zeros, cache))
    state = state._replace(done=jnp.ones(slots, bool))
    return (
        state,
        jnp.full((shards, slots // shards), rows.per_shard),
        jnp.zeros(shards, jnp.int32),
    )


def _first_outputs(first: GenerationState, capacity: int) -> tuple[Array, Array | None]:
    """Return the outputs with the first token of each row."""

    def columns(x_DR: Array, empty: int) -> Array:
        return jnp.full((*x_DR.shape, capacity), empty, x_DR.dtype).at[:, :, 0].set(x_DR)

    log_probs = None if first.log_prob is None else columns(first.log_prob, 0)
    return columns(first.token, -1), log_probs


def _fill(rows: _Rows, held: _Slots, fills_D: Array, samples: int) -> _Slots:
    """Fill the first empty slot of each shard, if it can be filled, with its next row."""
    slot_D = jnp.where(fills_D, (held.row == rows.per_shard).argmax(1), held.row.shape[1])
    row_D = jnp.minimum(held.waiting, rows.per_shard - 1)
    new = _take(rows.first, row_D)._replace(cache=_take(rows.cache, row_D // samples))
    state = _flat(_put(_by_shard(held.state, len(slot_D)), slot_D, new))
    # A row that ends with its first token takes no slot.
    row_DS = _put(held.row, slot_D, jnp.where(new.done, rows.per_shard, row_D))
    return held._replace(state=state, row=row_DS, waiting=held.waiting + fills_D)


def _decode(
    model: GenerativeModel, blocks: Any, request: GenerationRequest, rows: _Rows, held: _Slots
) -> _Slots:
    """Decode a token of every slot, write it to the outputs of its row, and empty ended slots."""
    state, row_DS = held.state, jnp.minimum(held.row, rows.per_shard - 1)
    lengths_N, seeds_N = _flat(jax.vmap(_at)((rows.lengths, rows.seeds), row_DS))
    of_slots = request._replace(sampling=request.sampling._replace(seeds=seeds_N))
    # Empty slots write to position 0, which the next prompt overwrites.
    positions_N = jnp.where(state.done, 0, lengths_N + state.step - 1)
    logits_N1V, cache = model.decode(
        blocks, state.token[:, None], positions_N[:, None], state.cache
    )
    column_DS = _by_shard(state.step, len(held.row))
    state = choose_tokens(state, logits_N1V[:, 0], cache, of_slots)
    state = state._replace(done=state.done | (state.step >= request.limit))
    found = _by_shard((state.token, state.log_prob), len(held.row))
    outputs = jax.tree.map(
        lambda y_DRT, x_DS: jax.vmap(_write)(y_DRT, x_DS, held.row, column_DS), held.outputs, found
    )
    row_DS = jnp.where(_by_shard(state.done, len(held.row)), rows.per_shard, held.row)
    return _Slots(state, row_DS, held.waiting, outputs, held.steps + 1)


def _by_shard(tree: Any, shards: int) -> Any:
    """Divide the first axis by shards."""
    return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _flat(tree: Any) -> Any:
    """Join the axes of shards and of their rows or slots."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _write(y_RT: Array, x_S: Array, row_S: Array, column_S: Array) -> Array:
    """Write an output of each slot; none of empty slots, whose row is beyond the last."""
    return y_RT.at[row_S, column_S].set(x_S, mode="drop")


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _take(tree: Any, index_D: Int[Array, " D"]) -> Any:
    """Return an entry of each shard."""
    return jax.vmap(_at)(tree, index_D)


def _put(tree: Any, slot_D: Int[Array, " D"], entries: Any) -> Any:
    """Write an entry to the start of a slot of each shard; none to a slot beyond the last."""

    def put(x_S: Array, slot: Array, entry: Array) -> Array:
        place = (slot, *(slice(length) for length in entry.shape))
        return x_S.at[place].set(entry, mode="drop")

    return jax.tree.map(lambda x, entry: jax.vmap(put)(x, slot_D, entry), tree, entries)


def slot_steps(lengths: Sequence[int], slots: int, shards: int = 1) -> int:
    """Return the number of decoding steps that rows take in slots, as `generate` refills them.

    Parameters
    ----------
    lengths
        Number of tokens of each row, at least 1; the first is no decoding step.
    slots
        Number of slots.
    shards
        Parts of the rows, each with slots of its own.

    Examples
    --------
    >>> from tjx_nn.generation.slots import slot_steps
    >>> slot_steps([3, 9, 3, 3], slots=2), slot_steps([3, 9, 3, 3], slots=4)
    (8, 8)
    """
    rows, longest = len(lengths) // shards, 0
    for shard in range(shards):
        ends = [0] * (slots // shards)
        for length in lengths[shard * rows : (shard + 1) * rows]:
            heapq.heapreplace(ends, ends[0] + length - 1)
        longest = max(longest, *ends)
    return longest
