"""Generation: a prompt's continuation, token by token, in one compiled loop.

Axes in names: B batch, T time, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention.kv_cache import cache_sizes, grow
from tjx_nn.functional import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
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
    read_prompt,
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
from tjx_nn.tokens import Ids


class GenerationRequest(NamedTuple):
    """What was asked for, on the device."""

    prompt: Prompt
    sampling: SamplingParams
    stop: Int[Array, " S"]
    limit: Int[Array, ""]


class GenerationState(NamedTuple):
    """Where generation is: `step` tokens are chosen, the last of them is not in the cache yet."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    log_prob: Float32[Array, " B"] | None
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    cache: list[Any]


class GenerationOptions(SamplingOptions, PromptOptions, total=False):
    """What else there is to be said: see `sampling.Options` and `prompt.Task`."""


@overload
def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    return_log_probs: Literal[False] = ...,
    **arguments: Unpack[GenerationOptions],
) -> Int[Array, "B new"]: ...


@overload
def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    return_log_probs: Literal[True],
    **arguments: Unpack[GenerationOptions],
) -> tuple[Int[Array, "B new"], Float32[Array, "B new"]]: ...


def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    return_log_probs: bool = False,
    **arguments: Unpack[GenerationOptions],
) -> Int[Array, "B new"] | tuple[Int[Array, "B new"], Float32[Array, "B new"]]:
    """Continue each prompt by up to `max_new_tokens` tokens; outside `jax.jit`.

    Lengths are rounded up to powers of two, so that a new prompt length within a bucket runs the
    program that is already compiled; so do new numbers in the options.

    Parameters
    ----------
    config, params
        The model.
    prompt
        Token ids, a row each, used as they are: a decoder that the trainer trained continues a
        document after its end-of-text token (`tjx_data.Tokenizer.encode_prompt` puts it first). An
        encoder-decoder's is the beginning of the target, at first its start token. What lies beyond
        a row's length is not looked at.
    prompt_lengths
        Tokens of each prompt, at least 1.
    max_new_tokens
        Length of the continuation in tokens.
    return_log_probs
        Also return how likely each token was.
    **arguments
        Of the choice of tokens: temperature (0, the default, is greedy), top_k, top_p, min_p,
        repetition_penalty, and key or seeds (one for each row) or both, which decide the draws; see
        `sampling.Options`. stop_token ends a row, or any of several; the rest of the row is filled
        with it. source and source_mask are what an encoder-decoder reads.

    Returns
    -------
    tokens : int32 [batch, max_new_tokens]
        The continuations without their prompts.
    log_probs : float32 [batch, max_new_tokens], only with `return_log_probs`
        Natural logarithm of each token's probability under the model, before penalty, temperature
        and filters; 0 for what fills a row behind its stop token.

    Raises
    ------
    ValueError
        Naming everything that is wrong with the arguments, one a line.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, generate, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> prompt = jnp.array([[1, 2, 3], [4, 0, 0]])
    >>> generate(config, params, prompt, jnp.array([3, 1]), max_new_tokens=5).shape
    (2, 5)
    """
    request = make_request(config, params, prompt, prompt_lengths, max_new_tokens, arguments)
    shape = (len(prompt), max_new_tokens)
    if 0 in shape:
        tokens, log_probs = jax.device_put((np.zeros(shape, np.int32), np.zeros(shape, np.float32)))
        return (tokens, log_probs) if return_log_probs else tokens
    capacity = min(bucket(max_new_tokens), config.max_seq_len)
    weights = make_decode_weights(config, params)
    tokens, log_probs = _generate(
        weights,
        request,
        config=config,
        capacity=capacity,
        sizes=_sizes(config, params, request, capacity),
        with_log_probs=return_log_probs,
    )
    tokens = jax.lax.slice_in_dim(tokens, 0, max_new_tokens, axis=1)
    if log_probs is None:
        return tokens
    return tokens, jax.lax.slice_in_dim(log_probs, 0, max_new_tokens, axis=1)


def stream(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    tokens_per_call: int = 4,
    **arguments: Unpack[GenerationOptions],
) -> Iterator[np.ndarray]:
    """Yield what `generate` returns while it is made: int32 [batch], one token of each row.

    Ends after `max_new_tokens`, or when every row has stopped.

    Parameters
    ----------
    config, params, prompt, prompt_lengths, max_new_tokens, **arguments
        As for `generate`.
    tokens_per_call
        So many tokens are made by one call to the device, which makes the next ones while these are
        read: fewer come sooner, more cost less.

    Raises
    ------
    ValueError
        As `generate`; at the call, before the first token is asked for.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, init, stream
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> prompt = jnp.array([[1, 2, 3]])
    >>> len(list(stream(config, params, prompt, jnp.array([3]), max_new_tokens=5)))
    5
    """
    problems = [f"tokens_per_call is {tokens_per_call}: give at least 1"]
    request = make_request(
        config, params, prompt, prompt_lengths, max_new_tokens, arguments,
        problems if tokens_per_call < 1 else (),
    )  # fmt: skip
    if 0 in (len(prompt), max_new_tokens):
        return iter(())
    capacity = min(bucket(max_new_tokens), config.max_seq_len)
    sizes = _sizes(config, params, request, capacity)
    return _stream(config, make_decode_weights(config, params), request, sizes, tokens_per_call)


def make_request(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    max_new_tokens: int,
    arguments: GenerationOptions,
    problems: Sequence[str] = (),
) -> GenerationRequest:
    """Check what was asked for, and put it beside the parameters."""
    check_option_names(arguments, GenerationOptions)
    rows = len(prompt)
    problems = [*check_sampling(config.vocab_size, rows, arguments), *problems]
    limit: Any = np.int32(max_new_tokens)
    request = GenerationRequest(
        make_prompt(config, prompt, prompt_lengths, max_new_tokens, arguments, problems),
        make_sampling(rows, arguments),
        stop_tokens(arguments.get("stop_token")),
        limit,
    )
    on_device: GenerationRequest = jax.device_put(request, input_sharding(params))
    return on_device


def _sizes(
    config: GenerativeConfig, params: Params, request: GenerationRequest, capacity: int
) -> tuple[int, ...]:
    """Return the slots of the caches, one size after the other; the prompt fits into the first."""
    width = request.prompt.tokens.shape[1]
    sizes = cache_sizes(min(width + capacity, config.max_seq_len), params_platform(params))
    return tuple(size for size in sizes[:-1] if size > width) + sizes[-1:]


@functools.partial(jax.jit, static_argnames=("config", "capacity", "sizes", "with_log_probs"))
def _generate(
    weights: DecodeWeights,
    request: GenerationRequest,
    *,
    config: GenerativeConfig,
    capacity: int,
    sizes: tuple[int, ...],
    with_log_probs: bool,
) -> tuple[Int[Array, "B new"], Float32[Array, "B new"] | None]:
    model = bind_decode_weights(config, weights)
    first = _begin(model, weights.blocks, request, sizes[0], with_log_probs)
    state, *rest = _go_on(model, weights.blocks, request, first, capacity - 1, sizes)
    tokens, log_probs = jax.tree.map(
        lambda x, more: jnp.concatenate([x[:, None], more], 1),
        (first.token, first.log_prob),
        tuple(rest),
    )
    # The rest of rows that have all stopped was not computed.
    made = jnp.arange(capacity)[None] < state.step
    return jnp.where(made, tokens, state.token[:, None]), log_probs


def _stream(
    config: GenerativeConfig,
    weights: DecodeWeights,
    request: GenerationRequest,
    sizes: tuple[int, ...],
    room: int,
) -> Iterator[np.ndarray]:
    state, tokens, now = _stream_begin(weights, request, config=config, slots=sizes[0])
    size, before = sizes[0], 0
    filled = request.prompt.tokens.shape[1]  # slots, at most
    while True:
        filled += room
        if filled > size and size < sizes[-1]:
            size = next((each for each in sizes if each >= filled), sizes[-1])
            state = _grown(state, config=config, slots=size)
        # The device works on the next tokens while these are read.
        state, coming, then = _stream_on(weights, request, state, config=config, room=room)
        read, step = jax.device_get((tokens, now))
        if step == before:
            return
        yield from read.T[: step - before]
        before, tokens, now = step, coming, then


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _grown(state: GenerationState, *, config: GenerativeConfig, slots: int) -> GenerationState:
    return state._replace(cache=grow(config, state.cache, slots))


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _stream_begin(
    weights: DecodeWeights, request: GenerationRequest, *, config: GenerativeConfig, slots: int
) -> tuple[GenerationState, Int[Array, "B 1"], Int[Array, ""]]:
    model = bind_decode_weights(config, weights)
    state = _begin(model, weights.blocks, request, slots, False)
    return state, state.token[:, None], state.step + 0


@functools.partial(jax.jit, static_argnames=("config", "room"), donate_argnames="state")
def _stream_on(
    weights: DecodeWeights,
    request: GenerationRequest,
    state: GenerationState,
    *,
    config: GenerativeConfig,
    room: int,
) -> tuple[GenerationState, Int[Array, "B room"], Int[Array, ""]]:
    model = bind_decode_weights(config, weights)
    state, tokens, _ = _go_on(model, weights.blocks, request, state, room)
    return state, tokens, state.step + 0


def _begin(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    slots: int,
    with_log_probs: bool,
) -> GenerationState:
    """Read the prompt into a cache with `slots` slots, and choose each row's first token."""
    tokens_BT, lengths_B = request.prompt.tokens, request.prompt.lengths
    logits_BV, cache = read_prompt(model, blocks, request.prompt, slots)
    seen_BV = None
    if request.sampling.repetition_penalty is not None:
        rows_B1 = jnp.arange(len(lengths_B))[:, None]
        used_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].max(used_BT)
    zeros_B = jnp.zeros_like(lengths_B)
    state = GenerationState(
        step=jnp.int32(0),
        token=zeros_B,
        log_prob=zeros_B.astype(jnp.float32) if with_log_probs else None,
        done=zeros_B.astype(bool),
        seen=seen_BV,
        cache=cache,
    )
    return _choose(state, logits_BV, cache, request)


def _go_on(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    state: GenerationState,
    room: int,
    sizes: tuple[int, ...] = (),
) -> tuple[GenerationState, Int[Array, "B room"], Float32[Array, "B room"] | None]:
    """Choose `room` more tokens, or fewer where that is enough; what is left of them is 0.

    With `sizes` the cache has each of them in turn, in a loop of its own: within a loop its size is
    known to the compiler.
    """
    first, width = state.step, request.prompt.tokens.shape[1]
    end = jnp.minimum(first + room, request.limit)

    def more(stop: Array, carry: tuple[GenerationState, Any]) -> Array:
        going_on: Array = (carry[0].step < stop) & ~carry[0].done.all()
        return going_on

    def body(carry: tuple[GenerationState, Any]) -> tuple[GenerationState, Any]:
        state, made = carry
        positions_B1 = (request.prompt.lengths + state.step - 1)[:, None]
        logits_B1V, cache = model.decode(blocks, state.token[:, None], positions_B1, state.cache)
        column = state.step - first
        state = _choose(state, logits_B1V[:, 0], cache, request)
        new = (state.token, state.log_prob)
        return state, jax.tree.map(lambda all_BT, x_B: all_BT.at[:, column].set(x_B), made, new)

    made = jax.tree.map(
        lambda x_B: jnp.zeros((len(x_B), room), x_B.dtype), (state.token, state.log_prob)
    )
    for size in sizes[:-1]:
        # At step s the token at position `width` + s - 1, at most, is written.
        stop = jnp.minimum(end, size - width + 1)
        state, made = jax.lax.while_loop(functools.partial(more, stop), body, (state, made))
        following = sizes[sizes.index(size) + 1]
        state = state._replace(cache=grow(model.config, state.cache, following))
    last = jax.lax.while_loop(functools.partial(more, end), body, (state, made))
    state, (tokens, log_probs) = last
    return state, tokens, log_probs


def _choose(
    state: GenerationState,
    logits_BV: Float32[Array, "B V"],
    cache: list[Any],
    request: GenerationRequest,
) -> GenerationState:
    """Choose the next token of each row; rows that are done repeat their last."""
    done_B = state.done
    chosen_B = sample_tokens(logits_BV, request.sampling, state.step, state.seen)
    token_B = jnp.where(done_B, state.token, chosen_B)
    log_prob_B, seen_BV = state.log_prob, state.seen
    if log_prob_B is not None:
        log_prob_B = jnp.where(done_B, 0, log_probs_of(logits_BV, token_B))
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    done_B = done_B | matches_any(token_B, request.stop)
    return GenerationState(state.step + 1, token_B, log_prob_B, done_B, seen_BV, cache)
