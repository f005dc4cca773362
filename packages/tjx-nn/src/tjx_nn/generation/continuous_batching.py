"""Decoding in slots: sequences join and leave a batch of fixed shape between its steps.

A server's batch: one program makes a token for each slot, whoever is in them, and one for each
bucket of prompt lengths reads a prompt into a slot. What a sequence gets depends on its prompt, its
options and its seed, never on who shares the batch.

Axes in names: B slots, T time, V vocabulary, K likeliest tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, UInt32

from tjx_nn.attention.kv_cache import cache_sizes, grow
from tjx_nn.functional import Params
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
from tjx_nn.sub_configs import raise_problems

# So many of the likeliest tokens are told of, where log-probabilities are asked for.
N_TOP_LOG_PROBS = 5


class SequenceOptions(TypedDict, total=False):
    """What may be said of one sequence; numbers as in `sampling.Options`.

    Attributes
    ----------
    temperature
        0, the default, takes the likeliest token.
    top_k, top_p, min_p, repetition_penalty
        None leaves the step out.
    seed
        An integer of 32 bits; 0 by default. `generate` with these `seeds` draws the same.
    log_probs
        Whether to tell how likely the tokens were.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int
    log_probs: bool


class BatchSamplingParams(NamedTuple):
    """How each slot's tokens are chosen; as `sampling.Sampling`, with numbers that do nothing."""

    temperature: Float32[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    log_probs: Bool[Array, " B"]


class SampledTokens(NamedTuple):
    """A token of each slot (of one slot, after `join`), on the device.

    Attributes
    ----------
    token
        Its id.
    log_prob
        Natural logarithm of its probability under the model, before penalty, temperature and
        filters; 0 where no slot asked for it.
    likeliest, likeliest_log_probs
        The likeliest tokens in its place, and theirs; 0 where no slot asked.
    """

    token: Int[Array, " B"]
    log_prob: Float32[Array, " B"]
    top_tokens: Int[Array, "B K"]
    top_log_probs: Float32[Array, "B K"]


class _State(NamedTuple):
    """What lies in the slots: the newest token, which is not in the cache yet, and its position."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    draws: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    choices: BatchSamplingParams
    cache: list[Any]


class ContinuousBatcher:
    """A batch of slots, of which each writes a sequence of its own.

    Parameters
    ----------
    config, params
        The model.
    slots
        Sequences at once, at least 1.
    max_len
        Tokens that a slot has room for, prompt and continuation; None is `max_seq_len`.

    Raises
    ------
    ValueError
        If a size is not possible.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, SlotDecoder, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> decoder = SlotDecoder(config, params, slots=2)
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
        problems = [] if slots >= 1 else [f"slots is {slots}: give at least 1"]
        if not 1 <= self.max_len <= config.max_seq_len:
            problems.append(f"max_len is {max_len}: give 1 to max_seq_len, {config.max_seq_len}")
        raise_problems(problems)
        self.config = config
        self._weights = make_decode_weights(config, params)
        self._beside = input_sharding(params)
        # On GPUs the caches grow with the longest sequence so far.
        self._sizes = cache_sizes(self.max_len, params_platform(params))
        self._size = self._sizes[0]
        self._lengths = np.zeros(slots, np.int64)  # tokens in each slot's cache
        self._state = jax.device_put(self._empty(), self._beside)

    def join(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        **options: Unpack[SequenceOptions],
    ) -> SampledTokens:
        """Read a prompt into a slot; return its first token, that of one row.

        Nothing waits for the device. What was in the slot is forgotten.

        Parameters
        ----------
        slot
            Which one, from 0.
        prompt
            Token ids, at least one.
        max_new_tokens
            How many tokens will be asked for, at most; what is beyond the room is refused.
        **options
            How the tokens are chosen.

        Raises
        ------
        ValueError
            Naming everything that is wrong, one a line.
        """
        assert 0 <= slot < self.slots, slot
        read = self.check(prompt, max_new_tokens=max_new_tokens, **options)
        self._lengths[slot] = len(prompt)
        self._make_room()
        request = jax.device_put(
            (np.int32(slot), read, _choices(self.config, [options])), self._beside
        )
        chosen: SampledTokens
        self._state, chosen = _join(
            self._weights, self._state, *request, config=self.config, max_len=self._size
        )
        return chosen

    def check(
        self, prompt: Sequence[int], *, max_new_tokens: int, **options: Unpack[SequenceOptions]
    ) -> Prompt:
        """Refuse what `join` would refuse; return the prompt as NumPy arrays of a bucket's length.

        Raises
        ------
        ValueError
            Naming everything that is wrong, one a line.
        """
        check_option_names(options, SequenceOptions)
        length = len(prompt)
        problems = _wrong(self.config, options)
        if length + max_new_tokens > self.max_len:
            problems.append(
                f"the prompt has {length} tokens and {max_new_tokens} new ones are asked for; a "
                f"slot has room for {self.max_len}"
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
        """Write one more token into each active slot; return a token of every slot.

        Nothing waits for the device. Tokens of slots that are not active mean nothing.

        Parameters
        ----------
        active
            For each slot whether something is in it that is to go on.
        """
        self._lengths = np.where(active, np.minimum(self._lengths + 1, self.max_len), 0)
        self._make_room()
        on_device = jax.device_put(np.asarray(active, bool), self._beside)
        chosen: SampledTokens
        self._state, chosen = _step(
            self._weights, self._state, on_device, config=self.config, max_len=self._size
        )
        return chosen

    def _make_room(self) -> None:
        """Let the caches grow to the next size that holds every slot's tokens."""
        needed = self._lengths.max()
        if needed > self._size:
            self._size = next(size for size in self._sizes if size >= needed)
            self._state = _grown(self._state, config=self.config, max_len=self._size)

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
        return _State(zeros, zeros, zeros, seen, _choices(config, [{}] * slots), cache)


def _wrong(config: GPTConfig, options: SequenceOptions) -> list[str]:
    """Say what is wrong with the options of one sequence, a line each."""
    numbers: Any = {
        name: x for name, x in options.items() if name in SamplingOptions.__annotations__
    }
    numbers["seeds"] = np.zeros(1, np.int64)
    seed = options.get("seed", 0)
    problems = check_sampling(config.vocab_size, 1, numbers)
    if not -(2**31) <= seed < 2**32:
        problems.append(f"seed is {seed}: give an integer of 32 bits")
    return problems


def _choices(config: GPTConfig, rows: Sequence[SequenceOptions]) -> BatchSamplingParams:
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
    """Return what `read_prompt` returns, with caches of a slot's size."""
    model: GPT = bind_decode_weights(config, weights)
    return read_prompt(model, weights.blocks, prompt, max_len)


@functools.partial(jax.jit, static_argnames=("config", "max_len"))
def _grown(state: _State, *, config: GPTConfig, max_len: int) -> _State:
    return state._replace(cache=grow(config, state.cache, max_len))


@functools.partial(jax.jit, static_argnames=("config", "max_len"), donate_argnames="state")
def _join(
    weights: DecodeWeights,
    state: _State,
    slot: Int[Array, ""],
    prompt: Prompt,
    choices: BatchSamplingParams,
    *,
    config: GPTConfig,
    max_len: int,
) -> tuple[_State, SampledTokens]:
    logits_1V, cache = _read(weights, prompt, config=config, max_len=max_len)
    used_1T = jnp.arange(prompt.tokens.shape[1])[None] < prompt.lengths[:, None]
    seen_1V = jnp.zeros(logits_1V.shape, bool).at[0, prompt.tokens[0]].max(used_1T[0])
    draws = jnp.zeros_like(prompt.lengths)
    chosen = _choose(logits_1V, choices, draws, seen_1V)
    seen_1V = seen_1V.at[0, chosen.token].set(True)
    row = _State(chosen.token, prompt.lengths, draws + 1, seen_1V, choices, cache)
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
    # What is not active writes where the next prompt will lie, and looks back over nothing.
    position_B = jnp.where(active_B, jnp.minimum(state.position, max_len - 1), 0)
    logits_B1V, cache = model.decode(
        weights.blocks, state.token[:, None], position_B[:, None], state.cache
    )
    chosen = _choose(logits_B1V[:, 0], state.choices, state.draws, state.seen)
    rows_B = jnp.arange(len(active_B))
    return _State(
        chosen.token,
        position_B + active_B,
        state.draws + active_B,
        state.seen.at[rows_B, chosen.token].set(True),
        state.choices,
        cache,
    ), chosen


def _choose(
    logits_BV: Float32[Array, "B V"],
    choices: BatchSamplingParams,
    draws_B: Int[Array, " B"],
    seen_BV: Bool[Array, "B V"],
) -> SampledTokens:
    """Choose as `sampling.choose` does, each row by its own numbers."""
    penalised_BV = jax.vmap(apply_repetition_penalty)(
        logits_BV[:, None], seen_BV[:, None], choices.repetition_penalty
    )[:, 0]
    random_B = choices.temperature > 0
    sampling = SamplingParams(
        jnp.where(random_B, choices.temperature, 1), choices.top_k, choices.top_p, choices.min_p
    )
    filters_B = (choices.top_k < logits_BV.shape[1]) | (choices.top_p < 1) | (choices.min_p > 0)

    def restricted(logits_BV: Array) -> Array:
        # The sorting is most of what a choice costs: it is left out where nobody wants it.
        scaled: Array = jax.lax.cond(
            (random_B & filters_B).any(),
            jax.vmap(lambda row, each: filter_logits(row[None], each)[0]),
            lambda rows, all_: rows / all_.temperature[:, None],
            logits_BV,
            sampling,
        )
        return scaled

    def drawn(logits_BV: Array) -> Array:
        keys_B = row_keys(SamplingParams(seeds=choices.seed), draws_B)
        return jnp.where(random_B, sample_categorical(keys_B, restricted(logits_BV)), greedy_B)

    greedy_B = penalised_BV.argmax(-1).astype(jnp.int32)
    token_B = jax.lax.cond(random_B.any(), drawn, lambda _: greedy_B, penalised_BV)
    return SampledTokens(token_B, *_likelihoods(logits_BV, token_B, choices.log_probs))


def _likelihoods(
    logits_BV: Float32[Array, "B V"], token_B: Int[Array, " B"], asked_B: Bool[Array, " B"]
) -> tuple[Float32[Array, " B"], Int[Array, "B K"], Float32[Array, "B K"]]:
    """Return how likely each token was, and the likeliest tokens; zeros where nobody asked."""
    count = min(N_TOP_LOG_PROBS, logits_BV.shape[1])

    def found(logits_BV: Array) -> Any:
        log_p_BK, likeliest_BK = jax.lax.top_k(jax.nn.log_softmax(logits_BV, -1), count)
        return log_probs_of(logits_BV, token_B), likeliest_BK.astype(jnp.int32), log_p_BK

    def nothing(logits_BV: Array) -> Any:
        shapes = jax.eval_shape(found, logits_BV)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    likelihoods: tuple[Array, Array, Array] = jax.lax.cond(asked_B.any(), found, nothing, logits_BV)
    return likelihoods
