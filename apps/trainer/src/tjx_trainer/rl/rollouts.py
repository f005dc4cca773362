"""Rollouts: several sampled responses to each prompt, as a function of (seed, step, parameters)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import tjx_nn
import tjx_parallel
from tjx_nn.generation.prompt import row_shards
from tjx_nn.generation.slots import slot_steps
from tjx_nn.models.gpt_config import GPTConfig

# Branch of the seed, so that sampling and initialization are independent.
_PURPOSE = 0x726C
# Rows of the program that samples and scores exactly.
_TILE = 32


class Rollouts(NamedTuple):
    """Sampled responses, on the host.

    Attributes
    ----------
    tokens : list of list of int
        Tokens of each response, with the end-of-text token if it was sampled.
    log_probs : list of float32 arrays
        Log-probability of each token under the sampler [nats].
    """

    tokens: list[list[int]]
    log_probs: list[np.ndarray]


def sample_responses(
    model: GPTConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token: int | None,
    seed: int,
    step: int,
    turn: int = 0,
    greedy: bool = False,
    samples: int = 1,
    slots: int | None = None,
    columns: int | None = None,
    exact_columns: int | None = None,
) -> Rollouts:
    """Sample responses to each prompt at temperature 1, in all processes.

    The parameters are those of the trainer on its mesh, which samples with them as they are
    sharded; rows are divided over data, fsdp and expert. Each process gets all responses.

    Parameters
    ----------
    model : GPTConfig
        The model.
    params : nested dict of arrays
        Its parameters.
    prompts : sequence of token sequences
        The prompts; each row has random numbers of its own.
    max_new_tokens : int
        Largest length of a response [tokens].
    stop_token : int or None
        Token that ends a response.
    seed, step, turn : int
        The responses are a function of these and of the parameters.
    greedy : bool
        Whether to choose the most probable tokens instead.
    samples : int, optional
        Equal rows next to each other in `prompts`, which share one reading of their prompt; by
        default 1.
    slots : int, optional
        Largest number of rows that are sampled at once; by default all.
    columns : int, optional
        Length that prompts are padded to; by default that of the longest.
    exact_columns : int, optional
        Columns of prompts for `score_responses`, which then repeats the bits of the
        log-probabilities; by default it may not.
    """
    sharding, parts = _row_sharding(params)
    count = len(prompts)
    # Groups of samples stay whole.
    prompts = [*prompts, *[prompts[0]] * (-count % math.lcm(samples, parts))]
    padded, lengths = _pad(prompts, exact_columns or columns)
    key = _key(*jax.device_put((np.uint32(seed), np.uint32(step))))
    if turn:
        key = jax.jit(jax.random.fold_in)(key, jax.device_put(np.uint32(turn)))
    chosen: dict[str, Any] = {} if greedy else {"temperature": 1.0, "key": key}
    chosen |= {"stop_token": stop_token, "sharding": sharding}
    if exact_columns is not None:
        tokens, log_probs = tjx_nn.generate_exact(
            model, params, padded, lengths, max_new_tokens=max_new_tokens,
            tile=math.lcm(_TILE, parts), **chosen,
        )  # fmt: skip
    else:
        tokens, log_probs = jax.device_get(
            tjx_nn.generate(
                model, params, padded[::samples], lengths[::samples], samples=samples,
                max_new_tokens=max_new_tokens, return_log_probs=True, slots=slots, **chosen,
            )
        )  # fmt: skip
    tokens, log_probs = tokens[:count], log_probs[:count]
    is_end = tokens == (-1 if stop_token is None else stop_token)
    counts = np.where(is_end.any(1), is_end.argmax(1) + 1, max_new_tokens)
    return Rollouts(
        [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)],
        [row[:count] for row, count in zip(log_probs, counts, strict=True)],
    )


def saved_by_slots(params: Any, lengths: np.ndarray, slots: int) -> float:
    """Return the share of the decoded rows of all steps that refilled slots save.

    Parameters
    ----------
    params : nested dict of arrays
        The parameters on their mesh.
    lengths : int [rows]
        Tokens of each response.
    slots : int
        Number of slots.
    """
    _, parts = _row_sharding(params)
    at_once = len(lengths) * (lengths.max() - 1)
    if slots >= len(lengths) or not at_once:
        return 0.0
    return float(1 - slots * slot_steps(lengths.tolist(), slots, parts) / at_once)


def score_responses(
    model: GPTConfig,
    params: Any,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    max_new_tokens: int,
    stop_token: int | None,
) -> np.ndarray:
    """Compute the log-probabilities of responses by the program that samples with `exact_columns`.

    Parameters
    ----------
    model : GPTConfig
        The model.
    params : nested dict of arrays
        Its parameters.
    tokens, labels : int32 [rows, T]
        Rows of `examples.make_row`; the prompts were sampled with T as `exact_columns`.
    max_new_tokens, stop_token
        As for `sample_responses`.

    Returns
    -------
    float32 [rows, T]
        Log-probabilities of the labels [nats]; 0 for ignored labels.
    """
    mask = labels >= 0
    starts, counts = mask.argmax(1), mask.sum(1)
    prompts = [row[: start + 1].tolist() for row, start in zip(tokens, starts, strict=True)]
    padded, lengths = _pad(prompts, tokens.shape[1])
    responses = np.zeros((len(tokens), max_new_tokens), np.int32)
    is_token = np.arange(max_new_tokens)[None] < counts[:, None]
    responses[is_token] = labels[mask]
    key = _key(*jax.device_put((np.uint32(0), np.uint32(0))))  # the program of sampling has one
    sharding, parts = _row_sharding(params)
    _, log_probs = tjx_nn.generate_exact(
        model, params, padded, lengths, max_new_tokens=max_new_tokens, responses=responses,
        stop_token=stop_token, tile=math.lcm(_TILE, parts), temperature=1.0, key=key,
        sharding=sharding,
    )  # fmt: skip
    found = np.zeros(labels.shape, np.float32)
    found[mask] = log_probs[is_token]
    return found


def _row_sharding(params: Any) -> tuple[jax.sharding.NamedSharding | None, int]:
    """Return the sharding of rows on the mesh of the parameters, and the number of its parts."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    if mesh.size == 1:
        return None, 1
    sharding = tjx_parallel.batch_sharding(mesh)
    return sharding, row_shards(sharding)


def _pad(prompts: Sequence[Sequence[int]], columns: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts as rows of `columns` tokens, by default as long as the longest."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), columns or int(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


@jax.jit
def _key(seed: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PURPOSE), step)
