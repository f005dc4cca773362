"""Generation as a stream of tokens: the host reads tokens while the device computes the next.

Axes in names: B batch.
"""

import functools
from collections.abc import Iterator
from typing import Unpack

import jax
import numpy as np
from jaxtyping import Array, Int

from tjx_nn.attention.kv_cache import grow_cache
from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.decoding_loop import (
    GenerationOptions,
    GenerationRequest,
    GenerationState,
    decode_tokens,
    first_state,
    loop_sizes,
    make_request,
    new_capacity,
)
from tjx_nn.generation.prompt import GenerativeConfig, Lengths
from tjx_nn.inputs import Ids


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
    sizes = loop_sizes(config, params, request, new_capacity(config, max_new_tokens))
    return _stream(config, make_decode_weights(config, params), request, sizes, tokens_per_call)


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
    state = first_state(model, weights.blocks, request, slots, False)
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
    state, tokens, _ = decode_tokens(model, weights.blocks, request, state, room)
    return state, tokens, state.step + 0
