"""Speculative decoding: a draft model proposes tokens that the target model verifies in one pass.

A proposal x from the draft distribution q is accepted with probability min(1, p(x) / q(x)), where p
is the target distribution; the first rejected one is resampled from max(p - q, 0), normalized. The
output has exactly the target distribution. Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding", algorithm 1; Chen et al. 2023, "Accelerating Large Language
Model Decoding with Speculative Sampling".

Axes in names: B batch, G proposals, V vocabulary, T new tokens.
"""

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key

from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import DecodeWeights, bind_decode_weights, make_decode_weights
from tjx_nn.generation.decoding_loop import GenerationOptions, GenerationRequest, make_request
from tjx_nn.generation.prompt import GenerativeConfig, Lengths, bucket, read_prompt
from tjx_nn.generation.sampling import (
    SamplingParams,
    matches_any,
    probabilities,
    row_keys,
    sample_tokens,
)
from tjx_nn.inputs import Ids
from tjx_nn.layers.scan_layers import clone_key


def speculative_generate(
    config: GenerativeConfig,
    params: Params,
    draft_config: GenerativeConfig,
    draft_params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    **arguments: Unpack[GenerationOptions],
) -> tuple[Int[Array, "B new"], Float32[Array, ""]]:
    """Generate as `generate`, faster by verifying the proposals of a draft model.

    Greedy decoding returns the tokens of `generate`. Sampling returns other tokens of the same
    distribution, filters included.

    Parameters
    ----------
    config, params
        Target model.
    draft_config, draft_params
        Draft model: smaller, with the same vocabulary.
    prompt, prompt_lengths, max_new_tokens, **arguments
        As for `generate`, without repetition_penalty.
    draft_tokens
        Number of proposals for each pass of the target model.

    Returns
    -------
    tokens : int32 [batch, max_new_tokens]
        Generated tokens, as from `generate`.
    acceptance : float32 scalar
        Fraction of accepted proposals; 0 without proposals.

    Raises
    ------
    ValueError
        If arguments are invalid, with a line for each error.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, init, speculative_generate
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> prompt, lengths = jnp.array([[1, 2, 3]]), jnp.array([3])
    >>> tokens, acceptance = speculative_generate(
    ...     config, params, config, params, prompt, lengths, max_new_tokens=9
    ... )
    >>> tokens.shape, float(acceptance)
    ((1, 9), 1.0)
    """
    problems = []
    if draft_tokens < 1:
        problems.append(f"draft_tokens: got {draft_tokens}; expected at least 1")
    if draft_config.vocab_size != config.vocab_size:
        problems.append(
            f"draft_config.vocab_size: got {draft_config.vocab_size}; expected "
            f"{config.vocab_size}, that of the target; use a draft model with the same vocabulary"
        )
    if draft_config.max_seq_len < config.max_seq_len:
        problems.append(
            f"draft_config.max_seq_len: got {draft_config.max_seq_len}; expected at least "
            f"{config.max_seq_len}, that of the target; use a draft model for longer sequences"
        )
    if arguments.get("repetition_penalty") is not None:
        problems.append(
            "repetition_penalty: got a number; expected None, as proposals have no penalty; omit it"
        )
    request = make_request(
        config, params, prompt, prompt_lengths, max_new_tokens, arguments, problems
    )
    shape = (len(prompt), max_new_tokens)
    if 0 in shape:
        tokens, acceptance = jax.device_put((np.zeros(shape, np.int32), np.float32(0)))
        return tokens, acceptance
    tokens, acceptance = _speculate(
        (make_decode_weights(config, params), make_decode_weights(draft_config, draft_params)),
        request,
        configs=(config, draft_config),
        capacity=min(bucket(max_new_tokens), config.max_seq_len),
        proposals=draft_tokens,
    )
    return jax.lax.slice_in_dim(tokens, 0, max_new_tokens, axis=1), acceptance


class _State(NamedTuple):
    """State of the decoding loop.

    Attributes
    ----------
    generated
        Number of generated tokens of each row.
    last
        Last token of each row; it is in neither KV cache yet.
    done
        Whether a row is finished.
    tokens
        Generated tokens.
    caches
        KV caches of target and draft.
    accepted, proposed
        Numbers of accepted and of all proposals.
    """

    generated: Int[Array, " B"]
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    caches: list[Any]
    accepted: Int[Array, ""]
    proposed: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("configs", "capacity", "proposals"))
def _speculate(
    weights: tuple[DecodeWeights, DecodeWeights],
    request: GenerationRequest,
    *,
    configs: tuple[GenerativeConfig, GenerativeConfig],
    capacity: int,
    proposals: int,
) -> tuple[Int[Array, "B T"], Float32[Array, ""]]:
    models: list[Any] = [
        bind_decode_weights(config, each) for config, each in zip(configs, weights, strict=True)
    ]
    target, draft = (each.blocks for each in weights)
    prompt, sampling = request.prompt, request.sampling
    lengths_B, batch = prompt.lengths, len(prompt.lengths)
    # Proposals can exceed the end of a row; the entries that they write there are never read.
    slots = prompt.tokens.shape[1] + capacity + proposals
    (logits_BV, cache), (_, draft_cache) = (
        read_prompt(model, each.blocks, prompt, slots, new=proposals + 1)
        for model, each in zip(models, weights, strict=True)
    )
    step_G = jnp.arange(proposals + 1)

    def propose(state: _State, keys_BG: Key[Array, "B G"] | None) -> tuple[Any, Array, Array]:
        """Return the draft cache, proposals [B, G] and their distributions [B, G, V]."""

        def step(carry: tuple[Array, Any], of_step: tuple[Array, Array | None]) -> Any:
            token_B, cache = carry
            index, keys_B = of_step
            positions_B1 = (lengths_B + state.generated - 1 + index)[:, None]
            logits_B1V, cache = models[1].decode(draft, token_B[:, None], positions_B1, cache)
            q_BV = probabilities(logits_B1V[:, 0], sampling)
            token_B = _draw(q_BV, keys_B)
            return (token_B, cache), (token_B, q_BV)

        # The extra step writes the last proposal to the cache, in case all are accepted.
        keys_GB = None if keys_BG is None else clone_key(keys_BG.swapaxes(0, 1))
        (_, cache), (x_GB, q_GBV) = jax.lax.scan(
            step, (state.last, state.caches[1]), (step_G, keys_GB)
        )
        return cache, x_GB.swapaxes(0, 1)[:, :-1], q_GBV.swapaxes(0, 1)[:, :-1]

    def iterate(state: _State) -> _State:
        keys = None if sampling.greedy else _keys(sampling, state.generated, proposals)
        draft_cache, x_BG, q_BGV = propose(state, None if keys is None else keys[0])
        read = jnp.concatenate([state.last[:, None], x_BG], 1)
        positions = (lengths_B + state.generated - 1)[:, None] + step_G[None]
        logits, cache = models[0].decode(target, read, positions, state.caches[0])
        p = probabilities(logits.reshape(-1, logits.shape[-1]), sampling).reshape(logits.shape)
        new_BT, accepted_B = _verify(x_BG, q_BGV, p, None if keys is None else keys[1:])
        return _advance(state, request, new_BT, accepted_B, [cache, draft_cache])

    def is_unfinished(state: _State) -> Array:
        unfinished: Array = ~state.done.all()
        return unfinished

    first_B = sample_tokens(logits_BV, sampling, jnp.int32(0))
    tokens_BT = jnp.zeros((batch, capacity + proposals + 1), jnp.int32).at[:, 0].set(first_B)
    count_B, zero = jnp.ones(batch, jnp.int32), jnp.int32(0)
    done_B = matches_any(first_B, request.stop) | (count_B >= request.limit)
    state = _State(count_B, first_B, done_B, tokens_BT, [cache, draft_cache], zero, zero)
    state = jax.lax.while_loop(is_unfinished, iterate, state)
    chosen_BT = jnp.arange(tokens_BT.shape[1])[None] < state.generated[:, None]
    tokens_BT = jnp.where(chosen_BT, state.tokens, state.last[:, None])
    return tokens_BT[:, :capacity], state.accepted / jnp.maximum(state.proposed, 1)


def _advance(
    state: _State, request: GenerationRequest, new_BT: Array, accepted_B: Array, caches: list[Any]
) -> _State:
    """Append the accepted proposals and the token after them, up to the end of each row."""
    index_1T = jnp.arange(new_BT.shape[1])[None]
    stop_BT = (new_BT[:, :, None] == request.stop[None, None]).any(-1)
    stop_BT &= index_1T <= accepted_B[:, None]
    until_stop_B = jnp.where(stop_BT.any(1), stop_BT.argmax(1), accepted_B) + 1
    appended_B = jnp.minimum(until_stop_B, request.limit - state.generated)
    appended_B = jnp.where(state.done, 0, appended_B)
    # Columns after the appended tokens are overwritten later, or are beyond the end of the row.
    rows_B1 = jnp.arange(len(accepted_B))[:, None]
    tokens_BT = state.tokens.at[rows_B1, state.generated[:, None] + index_1T].set(new_BT)
    count_B = state.generated + appended_B
    last_B = jnp.take_along_axis(tokens_BT, count_B[:, None] - 1, 1)[:, 0]
    active_B = ~state.done
    return _State(
        count_B,
        last_B,
        state.done | matches_any(last_B, request.stop) | (count_B >= request.limit),
        tokens_BT,
        caches,
        state.accepted + jnp.sum(accepted_B * active_B),
        state.proposed + (new_BT.shape[1] - 1) * jnp.sum(active_B),
    )


def _verify(
    x_BG: Int[Array, "B G"],
    q_BGV: Float32[Array, "B G V"],
    p_BTV: Float32[Array, "B T V"],
    keys: tuple[Array, Array] | None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Return the proposals with a resampled token after the accepted ones, and their number.

    `p_BTV` has one more distribution than there are proposals: that of the token after them.
    """
    batch, proposals = x_BG.shape
    p_BG, q_BG = (
        jnp.take_along_axis(d, x_BG[:, :, None], 2)[:, :, 0] for d in (p_BTV[:, :-1], q_BGV)
    )
    u_BG = jnp.zeros(x_BG.shape)  # greedy: p and q are 0 or 1
    if keys is not None:
        u_BG = jax.vmap(lambda key: jax.random.uniform(key, (proposals,)))(keys[0])
    accepted_B = jnp.cumprod(u_BG * q_BG < p_BG, axis=1, dtype=jnp.int32).sum(1)
    # The token after all proposals has q = 0.
    q_BTV = jnp.pad(q_BGV, ((0, 0), (0, 1), (0, 0)))
    p_BV, q_BV = (
        jnp.take_along_axis(d, accepted_B[:, None, None], 1)[:, 0] for d in (p_BTV, q_BTV)
    )
    residual_BV = jnp.maximum(p_BV - q_BV, 0)
    # The residual is 0 everywhere only if p equals q up to rounding.
    residual_BV = jnp.where(residual_BV.sum(1, keepdims=True) > 0, residual_BV, p_BV)
    token_B = _draw(residual_BV, None if keys is None else keys[1])
    new_BT = jnp.pad(x_BG, ((0, 0), (0, 1)))
    return new_BT.at[jnp.arange(batch), accepted_B].set(token_B), accepted_B


def _draw(p_BV: Float32[Array, "B V"], keys_B: Key[Array, " B"] | None) -> Int[Array, " B"]:
    """Sample from unnormalized distributions; without keys take the most probable token."""
    if keys_B is None:
        return p_BV.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BV)).astype(jnp.int32)


def _keys(
    sampling: SamplingParams, count_B: Int[Array, " B"], proposals: int
) -> tuple[Key[Array, "B G"], Key[Array, " B"], Key[Array, " B"]]:
    """Derive the PRNG keys of proposals, of their acceptance and of the token after them."""
    keys_BK = jax.vmap(lambda key: jax.random.split(key, proposals + 3))(
        row_keys(sampling, count_B)
    )
    return keys_BK[:, 2:], keys_BK[:, 0], keys_BK[:, 1]
