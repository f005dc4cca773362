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
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention.kv_cache import cache_sizes, grow_cache
from tjx_nn.binding import Params
from tjx_nn.generation.batch_sampling import (
    BatchSamplingParams,
    SampledTokens,
    SequenceOptions,
    batch_params,
    check_sequence_options,
    sample_slots,
)
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.prompt import (
    Prompt,
    check_option_names,
    input_sharding,
    make_prompt,
    params_platform,
    read_prompt,
)
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import raise_problems


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
            (np.int32(slot), padded, batch_params(self.config, [options])), self._sharding
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
        problems = check_sequence_options(self.config, options)
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
        return _State(zeros, zeros, zeros, seen, batch_params(config, [{}] * slots), cache)


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
    chosen = sample_slots(logits_1V, params_B, draws, seen_1V)
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
    chosen = sample_slots(logits_B1V[:, 0], state.params, state.draws, state.seen)
    rows_B = jnp.arange(len(active_B))
    return _State(
        chosen.token,
        position_B + active_B,
        state.draws + active_B,
        state.seen.at[rows_B, chosen.token].set(True),
        state.params,
        cache,
    ), chosen
