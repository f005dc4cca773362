"""Text from a model: a prompt encoded, continued and decoded."""

import itertools
from typing import Any

import jax
import numpy as np

import tjx_data
import tjx_nn
from tjx_nn.gpt_config import GPTConfig


def continue_prompt(
    model: GPTConfig,
    params: dict[str, Any],
    tokenizer: tjx_data.Tokenizer,
    prompt: str,
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> list[str]:
    """Let the model write on after a prompt.

    Parameters
    ----------
    model : GPTConfig
        The model.
    params : nested dict of arrays
        Its parameters.
    tokenizer : tjx_data.Tokenizer
        The tokenizer that it was trained with.
    prompt : str
        Text to go on from; empty for the start of a document.
    samples : int
        Number of continuations.
    max_new_tokens : int
        Length of each in tokens.
    temperature : float
        0 always takes the likeliest token.
    top_k : int or None
        Draw from this many likeliest tokens; more than there are is all of them.
    seed : int
        Decides all samples.

    Returns
    -------
    list of str
        The continuations without the prompt; a blank line stands where a document ended.

    Raises
    ------
    ValueError
        If prompt and continuation together are longer than the model's longest sequence.
    """
    tokens = _start_of_document(tokenizer, prompt)
    if len(tokens) + max_new_tokens > model.max_seq_len:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and {max_new_tokens} new ones were asked for; "
            f"the model's longest sequence is {model.max_seq_len}: ask for "
            f"{max(model.max_seq_len - len(tokens), 0)} or fewer, or give a shorter prompt"
        )
    new = tjx_nn.generate(
        model,
        params,
        np.tile(np.asarray(tokens, np.int32), (samples, 1)),
        np.full(samples, len(tokens), np.int32),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=None if top_k is None else min(top_k, model.vocab_size),
        key=jax.jit(jax.random.key, static_argnums=0)(seed),
    )
    return [_decode(tokenizer, row) for row in jax.device_get(new)]


def longest_continuation(model: GPTConfig, tokenizer: tjx_data.Tokenizer, prompt: str) -> int:
    """Return how many tokens fit behind a prompt."""
    return max(model.max_seq_len - len(_start_of_document(tokenizer, prompt)), 0)


def _start_of_document(tokenizer: tjx_data.Tokenizer, prompt: str) -> list[int]:
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id, *tokenizer.encode(prompt)]
    return tokenizer.encode(prompt or "\n")


def _decode(tokenizer: tjx_data.Tokenizer, row: np.ndarray) -> str:
    def kind(token: int) -> str:
        if token == tokenizer.eot_id:
            return "end of text"
        return "text" if token < tokenizer.vocab_size else "unknown"

    texts = []
    for found, tokens in itertools.groupby(row.tolist(), kind):
        ids = list(tokens)
        if found == "text":
            texts.append(tokenizer.decode(ids))
        else:  # a model may have more tokens than its tokenizer
            texts.append(
                len(ids) * ("\n\n" if found == "end of text" else "\N{REPLACEMENT CHARACTER}")
            )
    return "".join(texts)
