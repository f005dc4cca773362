"""Beam search: the likeliest continuations that a few at a time lead to.

Axes in names: B batch, K beams, V vocabulary, E tokens that end a row, T new tokens.
"""

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from tjx_nn.attention.kv_cache import select_rows
from tjx_nn.functional import Params
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
from tjx_nn.tokens import Ids


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
    """Continue each prompt with the likeliest sequences found, the best first; outside `jax.jit`.

    In each step the `beams` likeliest unfinished sequences of each row go on, by every token; those
    that a stop token ends stand aside. The search ends when no unfinished one can become better
    than the worst of those, or at the longest length.

    Parameters
    ----------
    config, params
        The model.
    prompt
        Token ids, a row each; an encoder-decoder's is the beginning of the target, at first its
        start token.
    prompt_lengths
        Tokens of each prompt, at least 1.
    beams
        Sequences of each row.
    max_new_tokens
        Length of the longest continuation in tokens.
    length_penalty
        A sequence of n new tokens, the stop token included, has the score log p / n^length_penalty:
        0 prefers short ones, and the larger, the longer.
    **task
        stop_token ends a sequence, or any of several; the rest of it is filled with the same.
        source and source_mask are what an encoder-decoder reads.

    Returns
    -------
    tokens : int32 [batch, beams, max_new_tokens]
        The continuations without their prompts.
    scores : float32 [batch, beams]
        Falling; -inf where there are fewer different sequences than beams.

    Raises
    ------
    ValueError
        Naming everything that is wrong with the arguments, one a line.

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
        problems.append(f"beams is {beams}: give at least 1")
    if not np.isfinite(length_penalty):
        problems.append(f"length_penalty is {length_penalty}: give a finite number")
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


class _Found(NamedTuple):
    """Sequences of new tokens, and how good they are."""

    tokens: Int[Array, "B K T"]
    scores: Float32[Array, "B K"]


class _State(NamedTuple):
    """The sequences of `step` tokens that go on, by log-probability, and those that have ended."""

    step: Int[Array, ""]
    alive: _Found
    ended: _Found
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
) -> _Found:
    model: Any = bind_decode_weights(config, weights)
    batch = len(prompt.lengths)
    slots = min(prompt.tokens.shape[1] + capacity, config.max_seq_len)
    logits_BV, cache = read_prompt(model, weights.blocks, prompt, slots)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), cache)
    logits_BKV = jnp.repeat(logits_BV[:, None], beams, 1)
    starts = jnp.repeat(prompt.lengths, beams)

    def score(log_probs: Array, length: Array) -> Array:
        return log_probs / length.astype(jnp.float32) ** length_penalty

    def more(state: _State) -> Array:
        best_B = state.alive.scores.max(1)
        reach_B = jnp.maximum(score(best_B, state.step), score(best_B, limit))
        hope: Array = (reach_B > state.ended.scores.min(1)).any()
        return (state.step < limit) & hope

    def body(state: _State) -> _State:
        last_BK = jax.lax.dynamic_index_in_dim(state.alive.tokens, state.step - 1, 2, False)
        positions = (starts + state.step - 1)[:, None]
        logits, cache = model.decode(weights.blocks, last_BK.reshape(-1, 1), positions, state.cache)
        return grow(state._replace(cache=cache), logits.reshape(batch, beams, -1))

    def grow(state: _State, logits_BKV: Array) -> _State:
        step, alive = state.step, state.alive
        log_probs_BKV = alive.scores[:, :, None] + jax.nn.log_softmax(logits_BKV, -1)
        rest = jnp.arange(capacity).reshape(1, 1, 1, -1) >= step
        ending_BKET = jnp.where(
            rest, stop_E.reshape(1, 1, -1, 1), alive.tokens[:, :, None]
        ).reshape(batch, -1, capacity)
        ending_BKE = score(log_probs_BKV[:, :, stop_E], step + 1).reshape(batch, -1)
        ended = _best(beams, state.ended, _Found(ending_BKET, ending_BKE))
        log_probs_BKV = log_probs_BKV.at[:, :, stop_E].set(-jnp.inf)
        scores_BK, index_BK = jax.lax.top_k(log_probs_BKV.reshape(batch, -1), beams)
        parent_BK, token_BK = jnp.divmod(index_BK, logits_BKV.shape[2])
        tokens_BKT = jnp.take_along_axis(alive.tokens, parent_BK[:, :, None], 1)
        tokens_BKT = tokens_BKT.at[:, :, step].set(token_BK)
        rows_BK = parent_BK + beams * jnp.arange(batch)[:, None]
        cache = select_rows(state.cache, rows_BK.ravel())
        return _State(step + 1, _Found(tokens_BKT, scores_BK), ended, cache)

    nothing = _Found(
        jnp.zeros((batch, beams, capacity), jnp.int32), jnp.full((batch, beams), -jnp.inf)
    )
    one = nothing._replace(scores=nothing.scores.at[:, 0].set(0))
    state = grow(_State(jnp.int32(0), one, nothing, cache), logits_BKV)
    state = jax.lax.while_loop(more, body, state)
    alive = state.alive._replace(scores=score(state.alive.scores, state.step))
    return _best(beams, state.ended, alive)


def _best(count: int, a: _Found, b: _Found) -> _Found:
    """Return the best of two sets of sequences, the best first; of equals those of `a`."""
    tokens, scores = (jnp.concatenate(each, 1) for each in zip(a, b, strict=True))
    scores, index_BK = jax.lax.top_k(scores, count)
    return _Found(jnp.take_along_axis(tokens, index_BK[:, :, None], 1), scores)
