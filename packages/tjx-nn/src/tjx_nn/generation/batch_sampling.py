"""Sampling of a token for each slot of a batch, with sampling parameters of its own.

Axes in names: B slots, V vocabulary, K top tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, UInt32

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
from tjx_nn.models.gpt_config import GPTConfig

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


def check_sequence_options(config: GPTConfig, options: SequenceOptions) -> list[str]:
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


def batch_params(config: GPTConfig, rows: Sequence[SequenceOptions]) -> BatchSamplingParams:
    """Convert the options of each sequence to NumPy arrays."""

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


def sample_slots(
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
