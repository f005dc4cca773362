"""Sampling of tokens from logits: repetition penalty, temperature, top-k, top-p and min-p.

The steps apply in this order; top-p applies to what top-k keeps. All numbers are traced, so new
values do not recompile; None leaves a step out of the program.

Axes in names: B batch (rows), V vocabulary, S stop tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key, UInt32

Number = Float32[Array, ""]


class FilterOptions(TypedDict, total=False):
    """Options of the distribution from which tokens are sampled.

    Attributes
    ----------
    temperature
        Temperature; 0, the default, is greedy decoding.
    top_k, top_p, min_p, repetition_penalty
        Filters and penalty, as of `SamplingParams`; None disables a step.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None


class SamplingOptions(FilterOptions, total=False):
    """Sampling options of a caller.

    Attributes
    ----------
    key
        PRNG key.
    seeds
        32-bit integer for each row, which together with the key determines the row's samples. None
        is the index of the row. A temperature above 0 needs seeds or a key.
    """

    key: Array | None
    seeds: Int[Array | np.ndarray, " B"] | None


class SamplingParams(NamedTuple):
    """Sampling parameters as arrays.

    Attributes
    ----------
    temperature
        Divisor of the logits; None is greedy decoding, which ignores the filters.
    top_k
        Number of most probable tokens to keep; ties with the last one are kept too.
    top_p
        Keep the smallest set of most probable tokens whose probabilities reach this sum (Holtzman
        et al. 2020, "The Curious Case of Neural Text Degeneration").
    min_p
        Keep tokens with at least this fraction of the largest probability (Nguyen et al. 2024, "Min
        P Sampling").
    repetition_penalty
        Divisor of positive logits, and factor of negative logits, of tokens that already occur in
        the row (Keskar et al. 2019, "CTRL", section 4.1).
    key
        PRNG key of all rows; None is `jax.random.key(0)`.
    seeds
        Seed of each row, uint32 [batch].
    """

    temperature: Number | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    key: Array | None = None
    seeds: UInt32[Array, " B"] | None = None

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature is None


def make_sampling(rows: int, options: SamplingOptions) -> SamplingParams:
    """Convert sampling options to NumPy scalars; greedy decoding drops filters, key and seeds.

    Raises
    ------
    jax.errors.KeyReuseError
        With ``jax_debug_key_reuse``, if the key was used before.
    """

    def number(name: Literal["temperature", "top_p", "min_p", "repetition_penalty"]) -> Any:
        value = options.get(name)
        return None if value is None else np.float32(value)

    penalty = number("repetition_penalty")
    if not options.get("temperature"):
        return SamplingParams(repetition_penalty=penalty)
    key = options.get("key")
    if jax.config.jax_debug_key_reuse and key is not None:
        # JAX does not count `fold_in` as a use of the key; drawing bits is one.
        with jax.transfer_guard("allow"):
            jax.random.bits(key)
    top_k = options.get("top_k")
    at_most: Any = None if top_k is None else np.int32(top_k)
    seeds: Any = (_seeds(options, rows) % 2**32).astype(np.uint32)
    filters = (at_most, number("top_p"), number("min_p"))
    return SamplingParams(number("temperature"), *filters, penalty, key, seeds)


def check_sampling(vocab_size: int, rows: int, options: SamplingOptions) -> list[str]:
    """List the errors in sampling options."""
    problems = []
    temperature = options.get("temperature", 0.0)
    if not 0 <= temperature < math.inf:
        problems.append(
            f"temperature: got {temperature}; expected 0 (greedy) or a finite positive number"
        )
    elif temperature and options.get("key") is None and options.get("seeds") is None:
        problems.append(
            f"temperature: got {temperature} without key and seeds; expected a key or seeds for "
            "sampling; give one, or temperature 0"
        )
    top_k = options.get("top_k")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        problems.append(f"top_k: got {top_k}; expected 1 to vocab_size {vocab_size}, or None")
    if (top_p := options.get("top_p")) is not None and not 0 < top_p <= 1:
        problems.append(f"top_p: got {top_p}; expected a probability in (0, 1], or None")
    if (min_p := options.get("min_p")) is not None and not 0 <= min_p <= 1:
        problems.append(f"min_p: got {min_p}; expected a fraction in [0, 1], or None")
    penalty = options.get("repetition_penalty")
    if penalty is not None and not 0 < penalty < math.inf:
        problems.append(
            f"repetition_penalty: got {penalty}; expected a finite positive number, or None"
        )
    seeds = _seeds(options, rows)
    if seeds.shape != (rows,) or seeds.min(initial=0) < -(2**31) or seeds.max(initial=0) >= 2**32:
        problems.append(
            f"seeds: got shape {list(seeds.shape)} with values from {seeds.min(initial=0)} to "
            f"{seeds.max(initial=0)}; expected shape [{rows}] of 32-bit integers"
        )
    return problems


def _seeds(options: SamplingOptions, rows: int) -> np.ndarray:
    seeds = options.get("seeds")
    return np.arange(rows) if seeds is None else np.asarray(jax.device_get(seeds), np.int64)


def sample(
    logits: Float32[Array, "B V"],
    key: Array,
    *,
    temperature: float | Array = 1.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
) -> Int[Array, " B"]:
    """Sample a token id from each row of logits.

    Parameters
    ----------
    logits
        Logits, float32 [batch, vocabulary].
    key
        PRNG key.
    temperature
        Positive divisor of the logits. For greedy decoding use ``logits.argmax(-1)``.
    top_k, top_p, min_p
        Filters as in `SamplingParams`; None disables a filter.

    Returns
    -------
    Array
        Token ids, int32 [batch].

    Examples
    --------
    >>> from tjx_nn import sample
    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    >>> sample(logits, jax.random.key(0), temperature=0.7, top_k=1).tolist()
    [0, 2]
    """
    numbers = [None if x is None else jnp.float32(x) for x in (temperature, top_p, min_p)]
    temperature_, top_p_, min_p_ = numbers
    k = None if top_k is None else jnp.int32(top_k)
    filtered = filter_logits(logits, SamplingParams(temperature_, k, top_p_, min_p_))
    return jax.random.categorical(key, filtered).astype(jnp.int32)


def sample_tokens(
    logits_BV: Float32[Array, "B V"],
    sampling: SamplingParams,
    step: Int[Array, "..."],
    seen_BV: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Choose the next token of each row, greedily or by sampling.

    Parameters
    ----------
    logits_BV
        Logits of the model.
    sampling
        Sampling parameters.
    step
        Index of the generated token, for all rows or for each; it is folded into the keys.
    seen_BV
        Tokens that occur in each row (prompt and continuation), for the repetition penalty.

    Returns
    -------
    Array
        Token ids, int32 [batch].
    """
    if sampling.repetition_penalty is not None:
        assert seen_BV is not None
        logits_BV = apply_repetition_penalty(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.greedy:
        return logits_BV.argmax(-1).astype(jnp.int32)
    return sample_categorical(row_keys(sampling, step), filter_logits(logits_BV, sampling))


def apply_repetition_penalty(
    logits_BV: Float32[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: Number
) -> Float32[Array, "B V"]:
    """Apply the repetition penalty to tokens that occur in a row."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def filter_logits(
    logits_BV: Float32[Array, "B V"], sampling: SamplingParams
) -> Float32[Array, "B V"]:
    """Apply temperature, top-k, top-p and min-p; logits of removed tokens become -inf.

    Ties with the least probable kept token are kept.
    """
    assert sampling.temperature is not None
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    logits_BV = logits_BV / sampling.temperature
    largest_B1 = logits_BV.max(-1, keepdims=True)
    least_B1 = jnp.full_like(largest_B1, -jnp.inf)
    if top_k is not None or top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        kept_BV = jnp.ones_like(sorted_BV, bool)
        if top_k is not None:
            kept_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[1])[None] < top_k, kept_BV.shape)
        if top_p is not None:
            p_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), -1)
            # Sum of the preceding tokens; by rounding it can exceed 1 before the last token.
            kept_BV &= (jnp.cumsum(p_BV, -1) - p_BV < top_p) | (top_p >= 1)
        least_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
    if min_p is not None:
        least_B1 = jnp.maximum(least_B1, largest_B1 + jnp.log(min_p))
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def probabilities(
    logits_BV: Float32[Array, "B V"], sampling: SamplingParams
) -> Float32[Array, "B V"]:
    """Return the distribution of `sample_tokens`, without the repetition penalty."""
    if sampling.greedy:
        return jax.nn.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(filter_logits(logits_BV, sampling), -1)


def row_keys(sampling: SamplingParams, step: Int[Array, "..."]) -> Key[Array, " B"]:
    """Derive the PRNG key of each row from the key, the row's seed and the step."""
    assert sampling.seeds is not None
    key = jax.random.key(0) if sampling.key is None else sampling.key
    seeds_B, fold = sampling.seeds, jax.random.fold_in
    steps_B = jnp.broadcast_to(step, seeds_B.shape)
    keys_B: Array = jax.vmap(lambda seed, step: fold(fold(key, seed), step))(seeds_B, steps_B)
    return keys_B


def sample_categorical(
    keys_B: Key[Array, " B"], logits_BV: Float32[Array, "B V"]
) -> Int[Array, " B"]:
    """Sample from the softmax of each row with its own key; int32."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def log_probs_of(
    logits_BV: Float32[Array, "B V"], tokens_B: Int[Array, " B"]
) -> Float32[Array, " B"]:
    """Compute the log-probability of each row's token, in nats."""
    chosen_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)
    return chosen_B1[:, 0] - jax.nn.logsumexp(logits_BV, -1)


def matches_any(tokens_B: Int[Array, " B"], stop_S: Int[Array, " S"]) -> Bool[Array, " B"]:
    """Return whether each token is one of `stop_S`."""
    return (tokens_B[:, None] == stop_S[None]).any(-1)


def stop_tokens(stop_token: int | Sequence[int] | None) -> Any:
    """Convert one or several stop tokens to an int32 array [number of stop tokens]."""
    if stop_token is None:
        return np.zeros(0, np.int32)
    return np.atleast_1d(np.asarray(stop_token, np.int32))
