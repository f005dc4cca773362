"""Autoregressive generation in one compiled loop (`generate`) or as a stream of tokens (`stream`).

Axes in names: B batch, T time, V vocabulary, S stop tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention.kv_cache import cache_sizes, grow_cache
from tjx_nn.binding import Params
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
        Number of generated tokens.
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

    step: Int[Array, ""]
    token: Int[Array, " B"]
    log_prob: Float32[Array, " B"] | None
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    cache: list[Any]


class GenerationOptions(SamplingOptions, PromptOptions, total=False):
    """Optional arguments of `generate`: `SamplingOptions` and `PromptOptions`."""


@overload
def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    samples: int = ...,
    return_log_probs: Literal[False] = ...,
    **arguments: Unpack[GenerationOptions],
) -> Int[Array, "rows new"]: ...


@overload
def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    samples: int = ...,
    return_log_probs: Literal[True],
    **arguments: Unpack[GenerationOptions],
) -> tuple[Int[Array, "rows new"], Float32[Array, "rows new"]]: ...


def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    samples: int = 1,
    return_log_probs: bool = False,
    **arguments: Unpack[GenerationOptions],
) -> Int[Array, "rows new"] | tuple[Int[Array, "rows new"], Float32[Array, "rows new"]]:
    """Generate up to `max_new_tokens` tokens after each prompt; call it outside of `jax.jit`.

    Prompt and continuation lengths are rounded up to powers of two. Other lengths in the same
    bucket, and other values of numeric options, do not recompile.

    Parameters
    ----------
    config, params
        Configuration and parameters of the model.
    prompt
        Token ids, [batch, columns]; columns beyond a row's length are ignored. No special token is
        added: decoders of the trainer expect the end-of-text token first
        (`tjx_data.Tokenizer.encode_prompt` adds it), encoder-decoders their start token.
    prompt_lengths
        Number of tokens of each prompt, at least 1, [batch].
    max_new_tokens
        Number of tokens to generate.
    samples
        Rows of each prompt, next to each other: the prompt is read once, and its KV cache repeated.
        Seeds are those of the rows.
    return_log_probs
        Whether to return the log-probability of each token.
    **arguments
        Sampling options (`SamplingOptions`): temperature (0, the default, is greedy), top_k, top_p,
        min_p, repetition_penalty, key and seeds. Prompt options (`PromptOptions`): stop_token, and
        source and source_mask of an encoder-decoder.

    Returns
    -------
    tokens : int32 [batch * samples, max_new_tokens]
        Generated tokens, without the prompts. After a stop token a row repeats it.
    log_probs : float32 [batch * samples, max_new_tokens], only with `return_log_probs`
        Log-probability of each token under the model in nats, before penalty, temperature and
        filters; 0 after a stop token.

    Raises
    ------
    ValueError
        If arguments are invalid, with a line for each error.

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
    problems = [f"samples: got {samples}; expected at least 1"] if samples < 1 else []
    if samples > 1:
        prompt, prompt_lengths, arguments = _repeated(prompt, prompt_lengths, arguments, samples)
    request = make_request(
        config, params, prompt, prompt_lengths, max_new_tokens, arguments, problems
    )
    shape = (len(prompt), max_new_tokens)
    if 0 in shape:
        tokens, log_probs = jax.device_put((np.zeros(shape, np.int32), np.zeros(shape, np.float32)))
        return (tokens, log_probs) if return_log_probs else tokens
    tokens, log_probs = run_request(
        config,
        make_decode_weights(config, params),
        request,
        capacity=new_capacity(config, max_new_tokens),
        with_log_probs=return_log_probs,
        samples=samples,
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
    """Stream the tokens of `generate`: yield one token of each row at a time, int32 [batch].

    The stream ends after `max_new_tokens` tokens, or when every row has generated a stop token.

    Parameters
    ----------
    config, params, prompt, prompt_lengths, max_new_tokens, **arguments
        As for `generate`.
    tokens_per_call
        Tokens that the device generates at a time, while the host reads the previous ones. Fewer
        tokens lower the latency, more tokens raise the throughput.

    Yields
    ------
    int32 array [batch]
        The next token of each row; a finished row repeats its stop token.

    Raises
    ------
    ValueError
        As `generate`, before the first token is requested.

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
    problems = [f"tokens_per_call: got {tokens_per_call}; expected at least 1"]
    request = make_request(
        config, params, prompt, prompt_lengths, max_new_tokens, arguments,
        problems if tokens_per_call < 1 else (),
    )  # fmt: skip
    if 0 in (len(prompt), max_new_tokens):
        return iter(())
    sizes = _sizes(config, params, request, new_capacity(config, max_new_tokens))
    return _stream(config, make_decode_weights(config, params), request, sizes, tokens_per_call)


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
    problems = [*check_sampling(config.vocab_size, rows, arguments), *problems]
    limit: Any = np.int32(max_new_tokens)
    tokens: Any = given
    request = GenerationRequest(
        make_prompt(config, prompt, prompt_lengths, max_new_tokens, arguments, problems, columns),
        make_sampling(rows, arguments),
        stop_tokens(arguments.get("stop_token")),
        limit,
        tokens,
    )
    on_device: GenerationRequest = jax.device_put(request, input_sharding(params))
    return on_device


def new_capacity(config: GenerativeConfig, max_new_tokens: int) -> int:
    """Return the number of new tokens that the program of a request has room for."""
    return min(bucket(max_new_tokens), config.max_seq_len)


def run_request(
    config: GenerativeConfig,
    weights: DecodeWeights,
    request: GenerationRequest,
    *,
    capacity: int,
    with_log_probs: bool,
    samples: int = 1,
) -> tuple[Int[Array, "B new"], Float32[Array, "B new"] | None]:
    """Generate `capacity` columns of tokens, and their log-probabilities if requested.

    Every `samples` rows of the request have the same prompt.
    """
    sizes = _sizes(config, weights, request, capacity)
    tokens, log_probs = _generate(
        weights,
        request,
        config=config,
        capacity=capacity,
        sizes=sizes,
        with_log_probs=with_log_probs,
        samples=samples,
    )
    return tokens, log_probs


def _repeated(
    prompt: Any, prompt_lengths: Any, arguments: GenerationOptions, samples: int
) -> tuple[Any, Any, GenerationOptions]:
    """Return the inputs of each prompt `samples` times, on the host."""
    names = [name for name in ("source", "source_mask") if arguments.get(name) is not None]
    given = (prompt, prompt_lengths, {name: arguments[name] for name in names})  # type: ignore[literal-required]
    prompt, prompt_lengths, sources = jax.tree.map(
        lambda x: np.repeat(x, samples, axis=0), jax.device_get(given)
    )
    options: Any = {**arguments, **sources}
    return prompt, prompt_lengths, options


def _sizes(
    config: GenerativeConfig, params: Any, request: GenerationRequest, capacity: int
) -> tuple[int, ...]:
    """Return the successive cache sizes in slots; the first one holds the prompt."""
    width = request.prompt.tokens.shape[1]
    sizes = cache_sizes(min(width + capacity, config.max_seq_len), params_platform(params))
    return tuple(size for size in sizes[:-1] if size > width) + sizes[-1:]


@functools.partial(
    jax.jit, static_argnames=("config", "capacity", "sizes", "with_log_probs", "samples")
)
def _generate(
    weights: DecodeWeights,
    request: GenerationRequest,
    *,
    config: GenerativeConfig,
    capacity: int,
    sizes: tuple[int, ...],
    with_log_probs: bool,
    samples: int,
) -> tuple[Int[Array, "B new"], Float32[Array, "B new"] | None]:
    model = bind_decode_weights(config, weights)
    first = _begin(model, weights.blocks, request, sizes[0], with_log_probs, samples)
    state, *rest = _continue(model, weights.blocks, request, first, capacity - 1, sizes)
    tokens, log_probs = jax.tree.map(
        lambda x, more: jnp.concatenate([x[:, None], more], 1),
        (first.token, first.log_prob),
        tuple(rest),
    )
    # The loop ends when all rows have stopped; fill the remaining columns.
    generated = jnp.arange(capacity)[None] < state.step
    return jnp.where(generated, tokens, state.token[:, None]), log_probs


def _stream(
    config: GenerativeConfig,
    weights: DecodeWeights,
    request: GenerationRequest,
    sizes: tuple[int, ...],
    room: int,
) -> Iterator[np.ndarray]:
    state, tokens, device_step = _stream_begin(weights, request, config=config, slots=sizes[0])
    size, yielded = sizes[0], 0
    filled = request.prompt.tokens.shape[1]  # upper bound of the filled slots
    while True:
        filled += room
        if filled > size and size < sizes[-1]:
            size = next((each for each in sizes if each >= filled), sizes[-1])
            state = _grow(state, config=config, slots=size)
        # Dispatch the next tokens before reading these: the device does not wait for the host.
        state, next_tokens, next_step = _stream_continue(
            weights, request, state, config=config, room=room
        )
        host_tokens, step = jax.device_get((tokens, device_step))
        if step == yielded:
            return
        yield from host_tokens.T[: step - yielded]
        yielded, tokens, device_step = step, next_tokens, next_step


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _grow(state: GenerationState, *, config: GenerativeConfig, slots: int) -> GenerationState:
    return state._replace(cache=grow_cache(config, state.cache, slots))


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _stream_begin(
    weights: DecodeWeights, request: GenerationRequest, *, config: GenerativeConfig, slots: int
) -> tuple[GenerationState, Int[Array, "B 1"], Int[Array, ""]]:
    model = bind_decode_weights(config, weights)
    state = _begin(model, weights.blocks, request, slots, False)
    return state, state.token[:, None], state.step + 0


@functools.partial(jax.jit, static_argnames=("config", "room"), donate_argnames="state")
def _stream_continue(
    weights: DecodeWeights,
    request: GenerationRequest,
    state: GenerationState,
    *,
    config: GenerativeConfig,
    room: int,
) -> tuple[GenerationState, Int[Array, "B room"], Int[Array, ""]]:
    model = bind_decode_weights(config, weights)
    state, tokens, _ = _continue(model, weights.blocks, request, state, room)
    return state, tokens, state.step + 0


def _begin(
    model: GenerativeModel,
    blocks: Any,
    request: GenerationRequest,
    slots: int,
    with_log_probs: bool,
    samples: int = 1,
) -> GenerationState:
    """Prefill a cache of `slots` slots and choose the first token of each row."""
    tokens_BT, lengths_B = request.prompt.tokens, request.prompt.lengths
    prompts = jax.tree.map(lambda x: x[::samples], request.prompt)
    logits_BV, cache = jax.tree.map(
        lambda x: jnp.repeat(x, samples, axis=0), read_prompt(model, blocks, prompts, slots)
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
    return _choose(state, logits_BV, cache, request)


def _continue(
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
        state = _choose(state, logits_B1V[:, 0], cache, request)
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


def _choose(
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
