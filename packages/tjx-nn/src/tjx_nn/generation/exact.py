"""Generation whose log-probabilities can be computed again with the same bits.

A row of `generate` depends in its last bits on the number of rows and on the padding of the
prompts: other shapes are other compiled programs with another order of summation. Here one program
of fixed shapes computes all rows, in tiles, and takes given tokens as well as sampled ones.
"""

from typing import Any, Unpack

import jax
import numpy as np
from jaxtyping import Int

from tjx_nn.binding import Params
from tjx_nn.generation.autoregressive import run_request
from tjx_nn.generation.decode_weights import make_decode_weights
from tjx_nn.generation.decoding_loop import GenerationOptions, make_request, new_capacity
from tjx_nn.generation.prompt import GenerativeConfig, Lengths
from tjx_nn.inputs import Ids

_NONE_GIVEN = -1
# Options with an entry for each row.
_ROW_OPTIONS = ("seeds", "source", "source_mask")


def generate_exact(
    config: GenerativeConfig,
    params: Params,
    prompt: Ids,
    prompt_lengths: Lengths,
    *,
    max_new_tokens: int,
    responses: Int[np.ndarray, "B new"] | None = None,
    tile: int = 8,
    **arguments: Unpack[GenerationOptions],
) -> tuple[np.ndarray, np.ndarray]:
    """Sample responses, or compute the log-probabilities of given ones with the same bits.

    Two calls give a row the same bits if parameters, `tile`, the columns of `prompt`,
    `max_new_tokens` and the names of the options are the same; the number of rows, their order and
    the other rows do not matter. This holds where the compiled program treats all rows of a tile
    alike, as on CPUs; tests compare it for the attention variants of this package.

    Parameters
    ----------
    config, params, prompt, prompt_lengths, max_new_tokens
        As for `generate`. All columns of `prompt` are computed.
    responses
        Tokens to score, int32 [batch, max_new_tokens]: the response of a row up to a stop token, or
        of `max_new_tokens` tokens; entries after a stop token are ignored. None samples.
    tile
        Rows of the compiled program. The last tile is filled with copies of its first row.
    **arguments
        As for `generate`. Scoring needs the options of the sampling call, so that the program is
        the same; their values do not matter.

    Returns
    -------
    tokens : int32 [batch, max_new_tokens]
        Generated or given tokens; after a stop token a row repeats it. On the host.
    log_probs : float32 [batch, max_new_tokens]
        Log-probability of each token under the model in nats; 0 after a stop token. On the host.

    Raises
    ------
    ValueError
        If arguments are invalid, with a line for each error.

    Examples
    --------
    >>> import jax, numpy as np
    >>> from tjx_nn import GPTConfig, generate_exact, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=64, n_layer=1, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> prompt, lengths = np.array([[1, 2, 3], [4, 0, 0]], np.int32), np.array([3, 1])
    >>> options = {"max_new_tokens": 5, "temperature": 1.0, "seeds": np.array([7, 8])}
    >>> tokens, log_probs = generate_exact(config, params, prompt, lengths, **options)
    >>> options["seeds"] = np.array([0])
    >>> _, again = generate_exact(
    ...     config, params, prompt[1:], lengths[1:], responses=tokens[1:], **options
    ... )
    >>> bool((again == log_probs[1:]).all())
    True
    """
    problems = [f"tile: got {tile}; expected at least 1"] if tile < 1 else []
    prompts, lengths, given = jax.device_get((prompt, prompt_lengths, responses))
    rows, shape, vocab = len(prompts), (len(prompts), max_new_tokens), config.vocab_size
    if given is None:
        given = np.full(shape, _NONE_GIVEN, np.int32)
    elif given.shape != shape or ((given < 0) | (given >= vocab)).any():
        problems.append(
            f"responses: got shape {list(given.shape)} with ids from {given.min(initial=0)} to "
            f"{given.max(initial=0)}; expected shape {list(shape)} with ids from 0 to {vocab - 1}, "
            f"as vocab_size is {vocab}"
        )
    if problems or 0 in shape:
        make_request(config, params, prompts, lengths, max_new_tokens, arguments, problems)
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    capacity, weights = new_capacity(config, max_new_tokens), make_decode_weights(config, params)
    padding = ((0, 0), (0, capacity - max_new_tokens))
    given = np.pad(given.astype(np.int32), padding, constant_values=_NONE_GIVEN)
    given_options = {name: arguments.get(name) for name in _ROW_OPTIONS}
    of_rows = jax.device_get({
        "seeds": np.arange(rows),
        **{name: value for name, value in given_options.items() if value is not None},
    })  # fmt: skip
    found = []
    for first in range(0, rows, tile):
        chosen = np.arange(first, first + tile)
        chosen[chosen >= rows] = first
        options: Any = {**arguments, **{name: each[chosen] for name, each in of_rows.items()}}
        request = make_request(
            config, params, prompts[chosen], lengths[chosen], max_new_tokens, options,
            columns=prompts.shape[1], given=given[chosen],
        )  # fmt: skip
        found.append(run_request(config, weights, request, capacity=capacity, with_log_probs=True))
    parts = zip(*jax.device_get(found), strict=True)
    tokens, log_probs = (np.concatenate(part) for part in parts)
    return tokens[:rows, :max_new_tokens], log_probs[:rows, :max_new_tokens]
