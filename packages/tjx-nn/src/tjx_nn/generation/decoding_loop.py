"""Loop over new tokens: its inputs, its state, prefill and decoding steps, inside of `jax.jit`.

Axes in names: B batch, T time, V vocabulary, S stop tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention.kv_cache import cache_sizes, grow_cache
from tjx_nn.binding import Params
from tjx_nn.generation.prompt import (
    GenerativeConfig,
    GenerativeModel,
    Lengths,
    Prompt,
    PromptOptions,
    bucket,
    check_option_names,
    input_sharding,
    make_prompt,
    params_platform,
    put_on_devices,
    read_prompt,
    row_shards,
)
from tjx_nn.generation.sampling import (
    SamplingOptions,
    SamplingParams,
    check_sampling,
    log_probs_of,
    make_sampling,
    matches_any,
    sample_tokens,
    stop_tokens,
)
from tjx_nn.inputs import Ids


class GenerationRequest(NamedTuple):
    """Arguments of a generation on the device.

    Attributes
    ----------
    prompt
        Padded prompts.
    sampling
        Sampling parameters.
    stop
        Stop tokens.
    limit
        Maximum number of new tokens.
    given
        Tokens to choose instead of sampled ones, from the first new token on; -1 where none is
        given.
    """

    prompt: Prompt
    sampling: SamplingParams
    stop: Int[Array, " S"]
    limit: Int[Array, ""]
    given: Int[Array, "B new"] | None = None


class GenerationState(NamedTuple):
    """State of the decoding loop.

    Attributes
    ----------
    step
        Number of generated tokens; with slots that of each.
    token
        Last token of each row; it is not in the KV cache yet.
    log_prob
        Log-probability of the last token, if requested.
    done
        Whether a row has generated a stop token.
    seen
        Tokens that occur in each row, for the repetition penalty.
    cache
        KV cache of each block.
    """

    step: Int[Array, "..."]
    token: Int[Array, " B"]
    log_prob: Float32[Array, " B"] | None
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    cache: list[Any]


class GenerationOptions(SamplingOptions, PromptOptions, total=False):
    """Optional arguments of `generate`: `SamplingOptions`, `PromptOptions`, and the sharding.

    Attributes
    ----------
    sharding
        Sharding of rows [batch, ...] over the mesh of the parameters, whose processes all give the
        same arguments; it divides the rows. None computes all rows on every device.
    """

    sharding: NamedSharding | None


def make_request(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    max_new_tokens: int,
    arguments: GenerationOptions,
    problems: Sequence[str] = (),
    *,
    columns: int = 1,
    given: np.ndarray | None = None,
) -> GenerationRequest:
    """Validate the arguments of a generation and transfer them to the devices of the parameters.

    The prompts are padded to the bucket of at least `columns` tokens.

    Raises
    ------
    ValueError
        With a line for each error, those in `problems` last.
    """
    check_option_names(arguments, GenerationOptions)
    rows = len(prompt)
    sharding = arguments.get("sharding")
    problems = [*check_sampling(config.vocab_size, rows, arguments), *problems]
    if sharding is not None and rows % (parts := row_shards(sharding)):
        problems.append(f"prompt: got {rows} rows; expected a multiple of {parts}, by sharding")
    limit: Any = np.int32(max_new_tokens)
    tokens: Any = given
    request = GenerationRequest(
        make_prompt(config, prompt, prompt_lengths, max_new_tokens, arguments, problems, columns),
        make_sampling(rows, arguments),
        stop_tokens(arguments.get("stop_token")),
        limit,
        tokens,
    )
    whole: Any = input_sharding(params if sharding is None else sharding)
    by_row: Any = whole if sharding is None else sharding
    sampling = SamplingParams(*[whole] * len(SamplingParams._fields))._replace(seeds=by_row)
    shardings = GenerationRequest(by_row, sampling, whole, whole, by_row)
    return put_on_devices(request, None if whole is None else shardings)


def new_capacity(config: GenerativeConfig, max_new_tokens: int) -> int:
    """Return the number of new tokens that the program of a request has room for."""
    return min(bucket(max_new_tokens), config.max_seq_len)


def loop_sizes(
    config: GenerativeConfig, params: Any, request: GenerationRequest, capacity: int
) -> tuple[int, ...]:
    """Return the successive cache sizes in slots; the first one holds the prompt."""
    width = request.prompt.tokens.shape[1]
    sizes = cache_sizes(min(width + capacity, config.max_seq_len), params_platform(params))
    return tuple(size for size in sizes[:-1] if size > width) + sizes[-1:]


def first_state(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    slots: int,
    with_log_probs: bool,
    samples: int = 1,
) -> GenerationState:
    """Prefill a cache of `slots` slots and choose the first token of each row."""
    state = read_prompts(model, blocks, request, slots, with_log_probs, samples)
    return state._replace(cache=_repeat(state.cache, samples))


def read_prompts(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    slots: int,
    with_log_probs: bool,
    samples: int,
) -> GenerationState:
    """Return the state of `first_state` with a cache of the prompts, not of their samples."""
    tokens_BT, lengths_B = request.prompt.tokens, request.prompt.lengths
    prompts = jax.tree.map(lambda x: x[::samples], request.prompt)
    logits_PV, cache = read_prompt(model, blocks, prompts, slots)
    # Without the barrier, XLA compiles greedy choices of repeated rows for minutes on CPUs.
    logits_BV: Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]  # as jax is
        _repeat(logits_PV, samples)
    )
    seen_BV = None
    if request.sampling.repetition_penalty is not None:
        rows_B1 = jnp.arange(len(lengths_B))[:, None]
        is_prompt_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].max(is_prompt_BT)
    zeros_B = jnp.zeros_like(lengths_B)
    state = GenerationState(
        step=jnp.int32(0),
        token=zeros_B,
        log_prob=zeros_B.astype(jnp.float32) if with_log_probs else None,
        done=zeros_B.astype(bool),
        seen=seen_BV,
        cache=cache,
    )
    return choose_tokens(state, logits_BV, cache, request)


def _repeat(tree: Any, samples: int) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), tree)


def decode_tokens(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    state: GenerationState,
    room: int,
    sizes: tuple[int, ...] = (),
) -> tuple[GenerationState, Int[Array, "B room"], Float32[Array, "B room"] | None]:
    """Generate up to `room` more tokens; the columns of tokens that are not generated are 0.

    With `sizes` the cache grows through these sizes. Each has its own loop, as the state of a loop
    has a static shape.
    """
    first, width = state.step, request.prompt.tokens.shape[1]
    end = jnp.minimum(first + room, request.limit)

    def is_unfinished(stop: Array, carry: tuple[GenerationState, Any]) -> Array:
        unfinished: Array = (carry[0].step < stop) & ~carry[0].done.all()
        return unfinished

    def body(carry: tuple[GenerationState, Any]) -> tuple[GenerationState, Any]:
        state, outputs = carry
        positions_B1 = (request.prompt.lengths + state.step - 1)[:, None]
        logits_B1V, cache = model.decode(blocks, state.token[:, None], positions_B1, state.cache)
        column = state.step - first
        state = choose_tokens(state, logits_B1V[:, 0], cache, request)
        new = (state.token, state.log_prob)
        return state, jax.tree.map(lambda y_BT, x_B: y_BT.at[:, column].set(x_B), outputs, new)

    outputs = jax.tree.map(
        lambda x_B: jnp.zeros((len(x_B), room), x_B.dtype), (state.token, state.log_prob)
    )
    for size in sizes[:-1]:
        # Step s writes the token at position `width` + s - 1 or before.
        stop = jnp.minimum(end, size - width + 1)
        loop = functools.partial(is_unfinished, stop)
        state, outputs = jax.lax.while_loop(loop, body, (state, outputs))
        following = sizes[sizes.index(size) + 1]
        state = state._replace(cache=grow_cache(model.config, state.cache, following))
    loop = functools.partial(is_unfinished, end)
    state, (tokens, log_probs) = jax.lax.while_loop(loop, body, (state, outputs))
    return state, tokens, log_probs


def choose_tokens(
    state: GenerationState,
    logits_BV: Float32[Array, "B V"],
    cache: list[Any],
    request: GenerationRequest,
) -> GenerationState:
    """Choose the next token of each row; finished rows repeat their last token."""
    done_B = state.done
    chosen_B = sample_tokens(logits_BV, request.sampling, state.step, state.seen)
    if request.given is not None:
        given_B = jax.lax.dynamic_index_in_dim(request.given, state.step, axis=1, keepdims=False)
        chosen_B = jnp.where(given_B < 0, chosen_B, given_B)
    token_B = jnp.where(done_B, state.token, chosen_B)
    log_prob_B, seen_BV = state.log_prob, state.seen
    if log_prob_B is not None:
        log_prob_B = jnp.where(done_B, 0, log_probs_of(logits_BV, token_B))
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    done_B = done_B | matches_any(token_B, request.stop)
    return GenerationState(state.step + 1, token_B, log_prob_B, done_B, seen_BV, cache)
