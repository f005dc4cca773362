"""Generation: a prompt's continuation, token by token, in one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int

from tjx_nn.config import GPTConfig
from tjx_nn.functional import Params, bind
from tjx_nn.gpt import GPT
from tjx_nn.layers import KeysValues
from tjx_nn.tokens import check_ids

# Shorter prompts and continuations share one compiled program.
_SMALLEST_BUCKET = 16
_NO_TOKEN = -1


def generate(
    config: GPTConfig,
    params: Params,
    prompt: Int[Array | np.ndarray, "B T"],
    prompt_lengths: Int[Array | np.ndarray, " B"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: Array | None = None,
    stop_token: int | None = None,
) -> Int[Array, "B new"]:
    """Continue each prompt by up to `max_new_tokens` tokens; outside `jax.jit`.

    Lengths are rounded up to powers of two, so that a new prompt length within a bucket runs the
    program that is already compiled; so does a new temperature.

    Parameters
    ----------
    config, params
        The model.
    prompt
        Token ids, a row each. What lies beyond a row's length is not looked at.
    prompt_lengths
        Tokens of each prompt, at least 1.
    max_new_tokens
        Length of the continuation in tokens.
    temperature
        Divides the logits; 0 takes the likeliest token (greedy).
    top_k
        Sample only from this many likeliest tokens.
    key
        Key of the sampling; needed when temperature is above 0.
    stop_token
        A row ends with this token; the rest of it is filled with the same token.

    Returns
    -------
    Array
        int32 [batch, max_new_tokens]: the continuations without their prompts.

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
    prompt_host = np.asarray(jax.device_get(prompt))
    lengths = np.asarray(jax.device_get(prompt_lengths))
    _check(config, prompt_host, lengths, max_new_tokens, temperature, top_k, key)
    longest = int(lengths.max(initial=1))
    prompt_slots = min(_bucket(longest), config.max_seq_len)
    capacity = min(_bucket(max_new_tokens), config.max_seq_len)
    tokens = np.zeros((len(lengths), prompt_slots), np.int32)
    tokens[:, :longest] = np.where(
        np.arange(longest) < lengths[:, None], prompt_host[:, :longest], 0
    )
    scalars = (
        np.int32(max_new_tokens),
        np.float32(temperature),
        np.int32(_NO_TOKEN if stop_token is None else stop_token),
    )
    put = functools.partial(jax.device_put, device=_replicated(params))
    new = _generate(
        params,
        *put((tokens, lengths.astype(np.int32), *scalars)),
        None if temperature == 0 else put(key),
        config=config,
        capacity=capacity,
        top_k=top_k,
    )
    return jax.lax.slice_in_dim(new, 0, max_new_tokens, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "top_k"))
def _generate(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    limit: Int[Array, ""],
    temperature: Float32[Array, ""],
    stop_token: Int[Array, ""],
    key: Array | None,
    *,
    config: GPTConfig,
    capacity: int,
    top_k: int | None,
) -> Int[Array, "B new"]:
    model = bind(config, _cast_matrices(params, config.dtype))
    blocks = model.unstacked_blocks()
    slots = min(tokens.shape[1] + capacity, config.max_seq_len)
    logits, cache = _read_prompt(model, tokens, lengths, slots)

    def choose(step: Array, logits: Array, done: Array) -> tuple[Array, Array]:
        token = _sample(logits, step, temperature, key, top_k)
        token = jnp.where(done, stop_token, token)
        return token, done | (token == stop_token)

    def more(state: tuple[Any, ...]) -> Array:
        step, _, done, _, _ = state
        going_on: Array = (step < limit) & ~done.all()
        return going_on

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, new, cache = state
        logits, cache = model.decode(blocks, token, lengths + step - 1, cache)
        token, done = choose(step, logits, done)
        return step + 1, token, done, new.at[:, step].set(token), cache

    token, done = choose(jnp.int32(0), logits, jnp.zeros(len(lengths), bool))
    new = jnp.full((len(lengths), capacity), stop_token).at[:, 0].set(token)
    state = jax.lax.while_loop(more, body, (jnp.int32(1), token, done, new, cache))
    return state[3]


def _read_prompt(
    model: GPT, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: int
) -> tuple[Float32[Array, "B V"], list[KeysValues]]:
    """Return the logits after each row's last token, and a cache with room for `slots` tokens.

    Beyond a row's length the cache holds the keys of padding: decoding looks only at slots up to
    its own position, and writes each of them before it looks there.
    """
    hidden, kv = model.prefill(tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    room = ((0, 0), (0, slots - tokens.shape[1]), (0, 0), (0, 0))
    return model.logits(last), [(jnp.pad(k, room), jnp.pad(v, room)) for k, v in kv]


def _sample(
    logits: Float32[Array, "B V"],
    step: Int[Array, ""],
    temperature: Float32[Array, ""],
    key: Array | None,
    top_k: int | None,
) -> Int[Array, " B"]:
    if key is None:
        return logits.argmax(-1).astype(jnp.int32)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    # A key for each row: what a row draws does not depend on how many others there are.
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(
        jnp.arange(len(logits))
    )
    return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)


def _cast_matrices(params: Params, dtype: str) -> Params:
    """Cast once, before the loop, what each step would cast: kernels and tables, not norms."""

    def cast(path: tuple[jax.tree_util.DictKey, ...], p: Array) -> Array:
        return p.astype(dtype) if path[-1].key in ("kernel", "embedding") else p

    cast_params: Params = jax.tree.map_with_path(cast, params)
    return cast_params


def _bucket(length: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _replicated(params: Params) -> jax.sharding.Sharding | None:
    """Where the inputs go: whole onto every device that holds parameters."""
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array):
        return None  # NumPy arrays go where JAX puts everything
    if isinstance(leaf.sharding, NamedSharding):
        whole = PartitionSpec()  # type: ignore[no-untyped-call]  # as jax is
        return NamedSharding(leaf.sharding.mesh, whole)
    return leaf.sharding


def _check(
    config: GPTConfig,
    prompt: np.ndarray,
    lengths: np.ndarray,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    key: Array | None,
) -> None:
    problems = []
    longest = int(lengths.max(initial=1))
    if lengths.min(initial=1) < 1 or longest > prompt.shape[1]:
        problems.append(
            f"prompt_lengths are from {lengths.min()} to {longest} and prompt has "
            f"{prompt.shape[1]} columns: give lengths from 1 to {prompt.shape[1]}"
        )
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}: give at least 1")
    elif longest + max_new_tokens > config.max_seq_len:
        problems.append(
            f"the longest prompt has {longest} tokens, max_new_tokens is {max_new_tokens} and "
            f"max_seq_len is {config.max_seq_len}: together they must not exceed max_seq_len"
        )
    if temperature < 0:
        problems.append(f"temperature is {temperature}: give 0 (greedy) or more")
    if temperature > 0 and key is None:
        problems.append(f"temperature is {temperature} and key is None: give a key to sample with")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        problems.append(
            f"top_k is {top_k} and vocab_size is {config.vocab_size}: give 1 to {config.vocab_size}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    used = np.arange(prompt.shape[1]) < lengths[:, None]
    check_ids("prompt ids", prompt[used], config.vocab_size, "vocab_size")
