"""From logits to a token: repetition penalty, temperature, filters, and the draw.

The order is: repetition penalty, temperature, top-k, top-p of what top-k left, min-p. All numbers
are traced, so that new ones run the program that is compiled; None leaves a step out of it.

Axes in names: B batch (rows), V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key, UInt32

Number = Float32[Array, ""]


class SamplingOptions(TypedDict, total=False):
    """What a caller may say of how tokens are chosen; `Sampling` explains the numbers.

    Attributes
    ----------
    temperature
        0, the default, takes the likeliest token (greedy).
    top_k, top_p, min_p, repetition_penalty
        None leaves the step out.
    key
        Key of the draws.
    seeds
        An integer of 32 bits for each row; with the key it decides what the row draws. None is the
        number of the row. Temperature above 0 needs seeds or a key.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    key: Array | None
    seeds: Int[Array | np.ndarray, " B"] | None


class SamplingParams(NamedTuple):
    """How a token is chosen.

    Attributes
    ----------
    temperature
        Divides the logits; None takes the likeliest token (greedy), whatever the filters are.
    top_k
        Only this many likeliest tokens can be drawn, and those as likely as the last of them.
    top_p
        Only the smallest set of likeliest tokens whose probabilities sum to this, with the token
        that reaches the sum (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
    min_p
        Only tokens at least this many times as probable as the likeliest (Nguyen et al. 2024, "Min
        P Sampling").
    repetition_penalty
        Positive logits of tokens that the row has are divided by it, negative ones multiplied
        (Keskar et al. 2019, "CTRL", section 4.1).
    key
        Of all rows' draws; None is key 0.
    seeds
        Of each row's draws, uint32 [batch].
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
        """Whether the likeliest token is taken."""
        return self.temperature is None


def make_sampling(rows: int, options: SamplingOptions) -> SamplingParams:
    """Return the options as NumPy scalars; greedy ones need no filters, no key and no seeds.

    With ``jax_debug_key_reuse`` a key that was used before raises `jax.errors.KeyReuseError`.
    """

    def number(name: Literal["temperature", "top_p", "min_p", "repetition_penalty"]) -> Any:
        value = options.get(name)
        return None if value is None else np.float32(value)

    penalty = number("repetition_penalty")
    if not options.get("temperature"):
        return SamplingParams(repetition_penalty=penalty)
    key = options.get("key")
    if jax.config.jax_debug_key_reuse and key is not None:
        # Draws fold numbers into the key, which JAX does not count as its use.
        with jax.transfer_guard("allow"):
            jax.random.bits(key)
    top_k = options.get("top_k")
    at_most: Any = None if top_k is None else np.int32(top_k)
    seeds: Any = (_seeds(options, rows) % 2**32).astype(np.uint32)
    filters = (at_most, number("top_p"), number("min_p"))
    return SamplingParams(number("temperature"), *filters, penalty, key, seeds)


def check_sampling(vocab_size: int, rows: int, options: SamplingOptions) -> list[str]:
    """Say what is wrong with the options, a line each."""
    problems = []
    temperature = options.get("temperature", 0.0)
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature is {temperature}: give 0 (greedy) or more")
    elif temperature and options.get("key") is None and options.get("seeds") is None:
        problems.append(
            f"temperature is {temperature} and key and seeds are None: give a key or seeds to "
            "sample with"
        )
    top_k = options.get("top_k")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        problems.append(
            f"top_k is {top_k} and vocab_size is {vocab_size}: give 1 to {vocab_size}, or None"
        )
    if (top_p := options.get("top_p")) is not None and not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}: give a probability above 0 and up to 1, or None")
    if (min_p := options.get("min_p")) is not None and not 0 <= min_p <= 1:
        problems.append(f"min_p is {min_p}: give a share of the largest probability, 0 to 1")
    penalty = options.get("repetition_penalty")
    if penalty is not None and not 0 < penalty < math.inf:
        problems.append(f"repetition_penalty is {penalty}: give a number above 0; 1 does nothing")
    seeds = _seeds(options, rows)
    if seeds.shape != (rows,) or seeds.min(initial=0) < -(2**31) or seeds.max(initial=0) >= 2**32:
        problems.append(
            f"seeds have the shape {list(seeds.shape)} and are from {seeds.min(initial=0)} to "
            f"{seeds.max(initial=0)}: give {rows}, of 32 bits"
        )
    return problems


def _seeds(options: SamplingOptions, rows: int) -> np.ndarray:
    seeds = options.get("seeds")
    return np.arange(rows) if seeds is None else np.asarray(jax.device_get(seeds), np.int64)


def sample_tokens(
    logits_BV: Float32[Array, "B V"],
    sampling: SamplingParams,
    step: Int[Array, "..."],
    seen_BV: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Return a token for each row, int32.

    Parameters
    ----------
    logits_BV
        The model's.
    sampling
        How to choose.
    step
        Number of the draw, the same for all rows or one for each; each has a key of its own.
    seen_BV
        Which tokens each row has, in prompt and continuation; for the repetition penalty.
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
    """Make tokens that a row has less likely."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def filter_logits(
    logits_BV: Float32[Array, "B V"], sampling: SamplingParams
) -> Float32[Array, "B V"]:
    """Return logits of the distribution to draw from: temperature and filters; -inf is never drawn.

    Tokens that are as likely as the last one that is kept are kept too.
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
            # What comes before a token: with rounding, the sum may be above 1 before the last one.
            kept_BV &= (jnp.cumsum(p_BV, -1) - p_BV < top_p) | (top_p >= 1)
        least_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
    if min_p is not None:
        least_B1 = jnp.maximum(least_B1, largest_B1 + jnp.log(min_p))
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def probabilities(
    logits_BV: Float32[Array, "B V"], sampling: SamplingParams
) -> Float32[Array, "B V"]:
    """Return the distribution that `choose` draws from, but for the repetition penalty."""
    if sampling.greedy:
        return jax.nn.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(filter_logits(logits_BV, sampling), -1)


def row_keys(sampling: SamplingParams, step: Int[Array, "..."]) -> Key[Array, " B"]:
    """Return a key for each row; it depends on key, the row's seed and the step alone."""
    assert sampling.seeds is not None
    key = jax.random.key(0) if sampling.key is None else sampling.key
    seeds_B, fold = sampling.seeds, jax.random.fold_in
    steps_B = jnp.broadcast_to(step, seeds_B.shape)
    keys_B: Array = jax.vmap(lambda seed, step: fold(fold(key, seed), step))(seeds_B, steps_B)
    return keys_B


def sample_categorical(
    keys_B: Key[Array, " B"], logits_BV: Float32[Array, "B V"]
) -> Int[Array, " B"]:
    """Draw a token for each row, int32."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def log_probs_of(
    logits_BV: Float32[Array, "B V"], tokens_B: Int[Array, " B"]
) -> Float32[Array, " B"]:
    """Return the natural logarithm of the probability that the logits give each row's token."""
    chosen_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)
    return chosen_B1[:, 0] - jax.nn.logsumexp(logits_BV, -1)


def matches_any(tokens_B: Int[Array, " B"], stop_S: Int[Array, " S"]) -> Bool[Array, " B"]:
    """Return which tokens are among `stop_S`."""
    return (tokens_B[:, None] == stop_S[None]).any(-1)


def stop_tokens(stop_token: int | Sequence[int] | None) -> Any:
    """Return the stop tokens as int32 [number]."""
    if stop_token is None:
        return np.zeros(0, np.int32)
    return np.atleast_1d(np.asarray(stop_token, np.int32))
