"""Continuous batching: sequences join and leave a batch of fixed shape between decoding steps.

One compiled program decodes a token of every slot; one program for each bucket of prompt lengths
prefills a slot. The tokens of a sequence depend only on its prompt, options and seed, not on the
other sequences of the batch.

Axes in names: B slots, T time, V vocabulary, K top tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, UInt32

from tjx_nn.attention.kv_cache import cache_sizes, grow_cache
from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.prompt import (
    Prompt,
    check_option_names,
    input_sharding,
    make_prompt,
    params_platform,
    read_prompt,
)
from tjx_nn.generation.sampling import (
    FilterOptions,
    SamplingOptions,
    SamplingParams,
    apply_repetition_penalty,
    check_sampling,
    filter_logits,
    log_probs_of,
    row_keys,
    sample_categorical,
)
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import raise_problems

# Number of top tokens that are returned with log-probabilities.
N_TOP_LOG_PROBS = 5


class SequenceOptions(FilterOptions, total=False):
    """Sampling options of one sequence.

    Attributes
    ----------
    seed
        32-bit integer, 0 by default. `generate` with the same seed samples the same tokens.
    log_probs
        Whether to compute log-probabilities.
    """

    seed: int
    log_probs: bool


class BatchSamplingParams(NamedTuple):
    """Sampling parameters of each slot, as `SamplingParams`; disabled steps have neutral values."""

    temperature: Float32[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    log_probs: Bool[Array, " B"]


class SampledTokens(NamedTuple):
    """Sampled token of each slot (after `join`, of one slot), on the device.

    Attributes
    ----------
    token
        Token id.
    log_prob
        Log-probability of the token under the model in nats, before penalty, temperature and
        filters; 0 if no slot requests log-probabilities.
    top_tokens, top_log_probs
        Most probable tokens at this position and their log-probabilities; 0 if no slot requests
        log-probabilities.
    """

    token: Int[Array, " B"]
    log_prob: Float32[Array, " B"]
    top_tokens: Int[Array, "B K"]
    top_log_probs: Float32[Array, "B K"]


class _State(NamedTuple):
    """State of all slots.

    Attributes
    ----------
    token, position
        Last token of each slot, which is not in the KV cache yet, and its position.
    draws
        Number of generated tokens.
    seen
        Tokens that occur in each slot, for the repetition penalty.
    params
        Sampling parameters of each slot.
    cache
        KV cache of each block.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    draws: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    params: BatchSamplingParams
    cache: list[Any]


class ContinuousBatcher:
    """Decoder with a fixed number of slots, each of which generates an independent sequence.

    Parameters
    ----------
    config, params
        Configuration and parameters of the model.
    slots
        Number of concurrent sequences, at least 1.
    max_len
        Maximum number of tokens of a slot, prompt and continuation; None is `max_seq_len`.

    Raises
    ------
    ValueError
        If `slots` or `max_len` is out of range.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, ContinuousBatcher, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> decoder = ContinuousBatcher(config, params, slots=2)
    >>> first = decoder.join(1, [1, 2, 3], max_new_tokens=2)
    >>> second = decoder.step([False, True])
    >>> first.token.shape, second.token.shape
    ((1,), (2,))
    """

    def __init__(
        self, config: GPTConfig, params: Params, *, slots: int, max_len: int | None = None
    ) -> None:
        self.slots = slots
        self.max_len = config.max_seq_len if max_len is None else max_len
        problems = [] if slots >= 1 else [f"slots: got {slots}; expected at least 1"]
        if not 1 <= self.max_len <= config.max_seq_len:
            problems.append(
                f"max_len: got {max_len}; expected 1 to max_seq_len {config.max_seq_len}"
            )
        raise_problems(problems)
        self.config = config
        self._weights = make_decode_weights(config, params)
        self._sharding = input_sharding(params)
        # On GPUs the KV caches grow with the longest sequence.
        self._sizes = cache_sizes(self.max_len, params_platform(params))
        self._size = self._sizes[0]
        self._lengths = np.zeros(slots, np.int64)  # of the sequences in the KV cache
        self._state = jax.device_put(self._empty(), self._sharding)

    def join(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        **options: Unpack[SequenceOptions],
    ) -> SampledTokens:
        """Prefill a slot with a prompt and sample its first token, without waiting for the device.

        The previous sequence of the slot is discarded.

        Parameters
        ----------
        slot
            Index of the slot.
        prompt
            Token ids, at least one.
        max_new_tokens
            Maximum number of tokens that will be generated.
        **options
            Sampling options of the sequence.

        Returns
        -------
        SampledTokens
            First token, with a leading axis of size 1.

        Raises
        ------
        ValueError
            If the prompt does not fit the slot or an option is invalid, with a line for each error.
        """
        assert 0 <= slot < self.slots, slot
        padded = self.check(prompt, max_new_tokens=max_new_tokens, **options)
        self._lengths[slot] = len(prompt)
        self._ensure_capacity()
        request = jax.device_put(
            (np.int32(slot), padded, _batch_params(self.config, [options])), self._sharding
        )
        sampled: SampledTokens
        self._state, sampled = _join(
            self._weights, self._state, *request, config=self.config, max_len=self._size
        )
        return sampled

    def check(
        self, prompt: Sequence[int], *, max_new_tokens: int, **options: Unpack[SequenceOptions]
    ) -> Prompt:
        """Validate the arguments of `join` and return the padded prompt, as NumPy arrays.

        Parameters
        ----------
        prompt, max_new_tokens, **options
            As for `join`.

        Returns
        -------
        Prompt
            Tokens and length of the prompt, padded to its bucket.

        Raises
        ------
        ValueError
            As `join`.
        """
        check_option_names(options, SequenceOptions)
        length = len(prompt)
        problems = _check_options(self.config, options)
        if length + max_new_tokens > self.max_len:
            problems.append(
                f"max_new_tokens: got {max_new_tokens} after a prompt of {length} tokens; expected "
                f"a sum of at most {self.max_len}, the size of a slot"
            )
        return make_prompt(
            self.config,
            np.asarray(prompt, np.int32)[None],
            np.asarray([length], np.int32),
            max_new_tokens,
            {},
            problems,
        )

    def step(self, active: Sequence[bool] | np.ndarray) -> SampledTokens:
        """Decode one token of each active slot, without waiting for the device.

        Parameters
        ----------
        active
            Whether each slot contains an unfinished sequence.

        Returns
        -------
        SampledTokens
            Next token of each slot; undefined for inactive slots.
        """
        self._lengths = np.where(active, np.minimum(self._lengths + 1, self.max_len), 0)
        self._ensure_capacity()
        on_device = jax.device_put(np.asarray(active, bool), self._sharding)
        sampled: SampledTokens
        self._state, sampled = _step(
            self._weights, self._state, on_device, config=self.config, max_len=self._size
        )
        return sampled

    def _ensure_capacity(self) -> None:
        """Grow the KV caches to the next size that holds the longest sequence."""
        needed = self._lengths.max()
        if needed > self._size:
            self._size = next(size for size in self._sizes if size >= needed)
            self._state = _grow(self._state, config=self.config, max_len=self._size)

    def _empty(self) -> Any:
        config, slots = self.config, self.slots
        one: Any = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
        _, row = jax.eval_shape(
            functools.partial(_read, config=config, max_len=self._size),
            self._weights,
            Prompt(*one),
        )
        cache = jax.tree.map(lambda x: np.zeros((slots, *x.shape[1:]), x.dtype), row)
        zeros: Any = np.zeros(slots, np.int32)
        seen: Any = np.zeros((slots, config.vocab_size), bool)
        return _State(zeros, zeros, zeros, seen, _batch_params(config, [{}] * slots), cache)


def _check_options(config: GPTConfig, options: SequenceOptions) -> list[str]:
    """List the errors in the options of one sequence."""
    numbers: Any = {
        name: x for name, x in options.items() if name in SamplingOptions.__annotations__
    }
    numbers["seeds"] = np.zeros(1, np.int64)
    seed = options.get("seed", 0)
    problems = check_sampling(config.vocab_size, 1, numbers)
    if not -(2**31) <= seed < 2**32:
        problems.append(f"seed: got {seed}; expected a 32-bit integer")
    return problems


def _batch_params(config: GPTConfig, rows: Sequence[SequenceOptions]) -> BatchSamplingParams:
    def numbers(name: str, default: Any, dtype: Any) -> Any:
        given = [row.get(name) for row in rows]
        return np.asarray([default if value is None else value for value in given], dtype)

    seeds: Any = (numbers("seed", 0, np.int64) % 2**32).astype(np.uint32)
    return BatchSamplingParams(
        numbers("temperature", 0, np.float32),
        numbers("top_k", config.vocab_size, np.int32),
        numbers("top_p", 1, np.float32),
        numbers("min_p", 0, np.float32),
        numbers("repetition_penalty", 1, np.float32),
        seeds,
        numbers("log_probs", False, bool),
    )


def _read(
    weights: DecodeWeights, prompt: Prompt, *, config: GPTConfig, max_len: int
) -> tuple[Float32[Array, "B V"], list[Any]]:
    """Prefill a KV cache of `max_len` slots, as `read_prompt`."""
    model: GPT = bind_decode_weights(config, weights)
    return read_prompt(model, weights.blocks, prompt, max_len)


@functools.partial(jax.jit, static_argnames=("config", "max_len"))
def _grow(state: _State, *, config: GPTConfig, max_len: int) -> _State:
    return state._replace(cache=grow_cache(config, state.cache, max_len))


@functools.partial(jax.jit, static_argnames=("config", "max_len"), donate_argnames="state")
def _join(
    weights: DecodeWeights,
    state: _State,
    slot: Int[Array, ""],
    prompt: Prompt,
    params_B: BatchSamplingParams,
    *,
    config: GPTConfig,
    max_len: int,
) -> tuple[_State, SampledTokens]:
    logits_1V, cache = _read(weights, prompt, config=config, max_len=max_len)
    used_1T = jnp.arange(prompt.tokens.shape[1])[None] < prompt.lengths[:, None]
    seen_1V = jnp.zeros(logits_1V.shape, bool).at[0, prompt.tokens[0]].max(used_1T[0])
    draws = jnp.zeros_like(prompt.lengths)
    chosen = _choose(logits_1V, params_B, draws, seen_1V)
    seen_1V = seen_1V.at[0, chosen.token].set(True)
    row = _State(chosen.token, prompt.lengths, draws + 1, seen_1V, params_B, cache)
    return jax.tree.map(lambda held, new: held.at[slot].set(new[0]), state, row), chosen


@functools.partial(jax.jit, static_argnames=("config", "max_len"), donate_argnames="state")
def _step(
    weights: DecodeWeights,
    state: _State,
    active_B: Bool[Array, " B"],
    *,
    config: GPTConfig,
    max_len: int,
) -> tuple[_State, SampledTokens]:
    model: GPT = bind_decode_weights(config, weights)
    # Inactive slots overwrite position 0, which the next prompt overwrites again.
    position_B = jnp.where(active_B, jnp.minimum(state.position, max_len - 1), 0)
    logits_B1V, cache = model.decode(
        weights.blocks, state.token[:, None], position_B[:, None], state.cache
    )
    chosen = _choose(logits_B1V[:, 0], state.params, state.draws, state.seen)
    rows_B = jnp.arange(len(active_B))
    return _State(
        chosen.token,
        position_B + active_B,
        state.draws + active_B,
        state.seen.at[rows_B, chosen.token].set(True),
        state.params,
        cache,
    ), chosen


def _choose(
    logits_BV: Float32[Array, "B V"],
    params_B: BatchSamplingParams,
    draws_B: Int[Array, " B"],
    seen_BV: Bool[Array, "B V"],
) -> SampledTokens:
    """Sample a token of each row, as `sample_tokens` with its own parameters."""
    penalised_BV = jax.vmap(apply_repetition_penalty)(
        logits_BV[:, None], seen_BV[:, None], params_B.repetition_penalty
    )[:, 0]
    random_B = params_B.temperature > 0
    sampling = SamplingParams(
        jnp.where(random_B, params_B.temperature, 1), params_B.top_k, params_B.top_p, params_B.min_p
    )
    filters_B = (params_B.top_k < logits_BV.shape[1]) | (params_B.top_p < 1) | (params_B.min_p > 0)

    def restricted(logits_BV: Array) -> Array:
        # Sorting dominates the cost of sampling: skip it if no slot filters.
        scaled: Array = jax.lax.cond(
            (random_B & filters_B).any(),
            jax.vmap(lambda row, each: filter_logits(row[None], each)[0]),
            lambda rows, all_: rows / all_.temperature[:, None],
            logits_BV,
            sampling,
        )
        return scaled

    def drawn(logits_BV: Array) -> Array:
        keys_B = row_keys(SamplingParams(seeds=params_B.seed), draws_B)
        return jnp.where(random_B, sample_categorical(keys_B, restricted(logits_BV)), greedy_B)

    greedy_B = penalised_BV.argmax(-1).astype(jnp.int32)
    token_B = jax.lax.cond(random_B.any(), drawn, lambda _: greedy_B, penalised_BV)
    return SampledTokens(token_B, *_log_probs(logits_BV, token_B, params_B.log_probs))


def _log_probs(
    logits_BV: Float32[Array, "B V"], token_B: Int[Array, " B"], requested_B: Bool[Array, " B"]
) -> tuple[Float32[Array, " B"], Int[Array, "B K"], Float32[Array, "B K"]]:
    """Compute log-probabilities and top tokens; zeros if no slot requests them."""
    count = min(N_TOP_LOG_PROBS, logits_BV.shape[1])

    def compute(logits_BV: Array) -> Any:
        log_p_BK, top_BK = jax.lax.top_k(jax.nn.log_softmax(logits_BV, -1), count)
        return log_probs_of(logits_BV, token_B), top_BK.astype(jnp.int32), log_p_BK

    def zeros(logits_BV: Array) -> Any:
        shapes = jax.eval_shape(compute, logits_BV)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    log_probs: tuple[Array, Array, Array] = jax.lax.cond(
        requested_B.any(), compute, zeros, logits_BV
    )
    return log_probs
