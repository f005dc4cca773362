"""Autoregressive generation in one compiled loop.

Axes in names: B batch, T time.
"""

import functools
import math
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.decoding_loop import (
    GenerationOptions,
    GenerationRequest,
    decode_tokens,
    first_state,
    loop_sizes,
    make_request,
    new_capacity,
)
from tjx_nn.generation.prompt import GenerativeConfig, Lengths, input_sharding, row_shards
from tjx_nn.generation.slots import generate_in_slots
from tjx_nn.inputs import Ids


@overload
def generate(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    samples: int = ...,
    slots: int | None = ...,
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
    slots: int | None = ...,
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
    slots: int | None = None,
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
    slots
        Largest number of rows that are decoded at once, a multiple of the parts of `sharding`: a
        row that ends makes room for the next one, and the KV cache is that of the slots. Tokens are
        those without slots up to rounding of the logits, as the program has other shapes.
    return_log_probs
        Whether to return the log-probability of each token.
    **arguments
        Sampling options (`SamplingOptions`): temperature (0, the default, is greedy), top_k, top_p,
        min_p, repetition_penalty, key and seeds. Prompt options (`PromptOptions`): stop_token, and
        source and source_mask of an encoder-decoder. `sharding` (`GenerationOptions`) divides the
        rows among devices, also of several processes.

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
    sharding = arguments.get("sharding")
    shards = 1 if sharding is None else row_shards(sharding)
    if slots is not None and (slots < 1 or slots % shards):
        rule = f"a multiple of {shards}, by sharding" if shards > 1 else "at least 1"
        problems.append(f"slots: got {slots}; expected {rule}")
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
        # Each shard of the rows reads its own prompts.
        samples=math.gcd(samples, len(prompt) // shards),
        slots=slots,
    )
    tokens = jax.lax.slice_in_dim(tokens, 0, max_new_tokens, axis=1)
    if log_probs is None:
        return tokens
    return tokens, jax.lax.slice_in_dim(log_probs, 0, max_new_tokens, axis=1)


def run_request(
    config: GenerativeConfig,
    weights: DecodeWeights,
    request: GenerationRequest,
    *,
    capacity: int,
    with_log_probs: bool,
    samples: int = 1,
    slots: int | None = None,
) -> tuple[Int[Array, "B new"], Float32[Array, "B new"] | None]:
    """Generate `capacity` columns of tokens, and their log-probabilities if requested.

    Every `samples` rows of the request have the same prompt. At most `slots` rows are decoded at
    once.
    """
    sizes = loop_sizes(config, weights, request, capacity)
    shapes: Any = {
        "config": config, "capacity": capacity, "with_log_probs": with_log_probs,
        "samples": samples,
    }  # fmt: skip
    rows = request.prompt.tokens
    if slots is None or slots >= len(rows):
        tokens, log_probs = _generate(weights, request, sizes=sizes, **shapes)
    else:
        sharding = None if rows.is_fully_replicated else rows.sharding
        tokens, log_probs, _ = generate_in_slots(
            weights, request, size=sizes[-1], slots=slots, sharding=sharding, **shapes
        )
    if not tokens.is_fully_replicated:  # each process reads all rows
        tokens, log_probs = jax.device_put((tokens, log_probs), input_sharding(tokens.sharding))
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
    first = first_state(model, weights.blocks, request, sizes[0], with_log_probs, samples)
    state, *rest = decode_tokens(model, weights.blocks, request, first, capacity - 1, sizes)
    tokens, log_probs = jax.tree.map(
        lambda x, more: jnp.concatenate([x[:, None], more], 1),
        (first.token, first.log_prob),
        tuple(rest),
    )
    # The loop ends when all rows have stopped; fill the remaining columns.
    generated = jnp.arange(capacity)[None] < state.step
    return jnp.where(generated, tokens, state.token[:, None]), log_probs
