"""Beam search with a length penalty and early termination.

Axes in names: B batch, K beams, V vocabulary, E stop tokens, T new tokens.
"""

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from tjx_nn.attention.kv_cache import select_rows
from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.prompt import (
    GenerativeConfig,
    Lengths,
    Prompt,
    PromptOptions,
    bucket,
    check_option_names,
    input_sharding,
    make_prompt,
    read_prompt,
)
from tjx_nn.generation.sampling import stop_tokens
from tjx_nn.inputs import Ids


def beam_search(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    **task: Unpack[PromptOptions],
) -> tuple[Int[Array, "B K new"], Float32[Array, "B K"]]:
    """Find the most probable continuations of each prompt by beam search; outside of `jax.jit`.

    Each step extends the `beams` best unfinished sequences of each row by every token; a stop token
    moves a sequence to the finished ones. The search ends when no unfinished sequence can surpass
    the worst finished one, or at the maximum length.

    Parameters
    ----------
    config, params
        Configuration and parameters of the model.
    prompt, prompt_lengths
        As for `generate`.
    beams
        Number of sequences of each row.
    max_new_tokens
        Maximum number of generated tokens.
    length_penalty
        Exponent of the score log p / n ** length_penalty of a sequence of n new tokens, the stop
        token included. 0 favors short sequences; larger values favor longer ones.
    **task
        `PromptOptions`: stop_token, and source and source_mask of an encoder-decoder.

    Returns
    -------
    tokens : int32 [batch, beams, max_new_tokens]
        Generated tokens, best sequence first. After a stop token a sequence repeats it.
    scores : float32 [batch, beams]
        Scores in descending order; -inf if there are fewer distinct sequences than beams.

    Raises
    ------
    ValueError
        If arguments are invalid, with a line for each error.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, beam_search, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> prompt, lengths = jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([3, 1])
    >>> tokens, scores = beam_search(config, params, prompt, lengths, beams=3, max_new_tokens=5)
    >>> tokens.shape, scores.shape
    ((2, 3, 5), (2, 3))
    """
    check_option_names(task, PromptOptions)
    problems = []
    if beams < 1:
        problems.append(f"beams: got {beams}; expected at least 1")
    if not np.isfinite(length_penalty):
        problems.append(f"length_penalty: got {length_penalty}; expected a finite number")
    request = make_prompt(config, prompt, prompt_lengths, max_new_tokens, task, problems)
    numbers = (np.int32(max_new_tokens), np.float32(length_penalty))
    shape = (len(prompt), beams, max_new_tokens)
    if 0 in shape:
        empty = np.zeros(shape, np.int32), np.zeros(shape[:2], np.float32)
        tokens, scores = jax.device_put(empty, input_sharding(params))
        return tokens, scores
    tokens, scores = _search(
        make_decode_weights(config, params),
        *jax.device_put(
            (request, stop_tokens(task.get("stop_token")), *numbers), input_sharding(params)
        ),
        config=config,
        beams=beams,
        capacity=min(bucket(max_new_tokens), config.max_seq_len),
    )
    return jax.lax.slice_in_dim(tokens, 0, max_new_tokens, axis=2), scores


class _Sequences(NamedTuple):
    """Sequences of new tokens and their scores."""

    tokens: Int[Array, "B K T"]
    scores: Float32[Array, "B K"]


class _State(NamedTuple):
    """State of the search: unfinished sequences by log-probability, and finished ones by score."""

    step: Int[Array, ""]
    alive: _Sequences
    finished: _Sequences
    cache: list[Any]


@functools.partial(jax.jit, static_argnames=("config", "beams", "capacity"))
def _search(
    weights: DecodeWeights,
    prompt: Prompt,
    stop_E: Int[Array, " E"],
    limit: Int[Array, ""],
    length_penalty: Float32[Array, ""],
    *,
    config: GenerativeConfig,
    beams: int,
    capacity: int,
) -> _Sequences:
    model: Any = bind_decode_weights(config, weights)
    batch = len(prompt.lengths)
    slots = min(prompt.tokens.shape[1] + capacity, config.max_seq_len)
    logits_BV, cache = read_prompt(model, weights.blocks, prompt, slots)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), cache)
    logits_BKV = jnp.repeat(logits_BV[:, None], beams, 1)
    starts = jnp.repeat(prompt.lengths, beams)

    def score(log_probs: Array, length: Array) -> Array:
        return log_probs / length.astype(jnp.float32) ** length_penalty

    def is_unfinished(state: _State) -> Array:
        best_B = state.alive.scores.max(1)
        bound_B = jnp.maximum(score(best_B, state.step), score(best_B, limit))
        can_improve: Array = (bound_B > state.finished.scores.min(1)).any()
        return (state.step < limit) & can_improve

    def body(state: _State) -> _State:
        last_BK = jax.lax.dynamic_index_in_dim(state.alive.tokens, state.step - 1, 2, False)
        positions = (starts + state.step - 1)[:, None]
        logits, cache = model.decode(weights.blocks, last_BK.reshape(-1, 1), positions, state.cache)
        return extend(state._replace(cache=cache), logits.reshape(batch, beams, -1))

    def extend(state: _State, logits_BKV: Array) -> _State:
        step, alive = state.step, state.alive
        log_probs_BKV = alive.scores[:, :, None] + jax.nn.log_softmax(logits_BKV, -1)
        rest = jnp.arange(capacity).reshape(1, 1, 1, -1) >= step
        ending_BKET = jnp.where(
            rest, stop_E.reshape(1, 1, -1, 1), alive.tokens[:, :, None]
        ).reshape(batch, -1, capacity)
        ending_BKE = score(log_probs_BKV[:, :, stop_E], step + 1).reshape(batch, -1)
        finished = _best(beams, state.finished, _Sequences(ending_BKET, ending_BKE))
        log_probs_BKV = log_probs_BKV.at[:, :, stop_E].set(-jnp.inf)
        scores_BK, index_BK = jax.lax.top_k(log_probs_BKV.reshape(batch, -1), beams)
        parent_BK, token_BK = jnp.divmod(index_BK, logits_BKV.shape[2])
        tokens_BKT = jnp.take_along_axis(alive.tokens, parent_BK[:, :, None], 1)
        tokens_BKT = tokens_BKT.at[:, :, step].set(token_BK)
        rows_BK = parent_BK + beams * jnp.arange(batch)[:, None]
        cache = select_rows(state.cache, rows_BK.ravel())
        return _State(step + 1, _Sequences(tokens_BKT, scores_BK), finished, cache)

    empty = _Sequences(
        jnp.zeros((batch, beams, capacity), jnp.int32), jnp.full((batch, beams), -jnp.inf)
    )
    initial = empty._replace(scores=empty.scores.at[:, 0].set(0))
    state = extend(_State(jnp.int32(0), initial, empty, cache), logits_BKV)
    state = jax.lax.while_loop(is_unfinished, body, state)
    alive = state.alive._replace(scores=score(state.alive.scores, state.step))
    return _best(beams, state.finished, alive)


def _best(count: int, a: _Sequences, b: _Sequences) -> _Sequences:
    """Merge two sets of sequences and keep the best, in descending order; ties prefer `a`."""
    tokens, scores = (jnp.concatenate(each, 1) for each in zip(a, b, strict=True))
    scores, index_BK = jax.lax.top_k(scores, count)
    return _Sequences(jnp.take_along_axis(tokens, index_BK[:, :, None], 1), scores)
