"""Text generation from a prompt."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import numpy as np

import tjx_data
import tjx_nn
from tjx_nn.generation.sampling import FilterOptions
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.tasks.text_stream import decode_text


class SamplingParams(FilterOptions, total=False):
    """Number, length and sampling parameters of generated texts, as in `tjx_nn.generate`.

    Attributes
    ----------
    samples : int
        Number of continuations.
    max_new_tokens : int
        Length of each [tokens].
    seed : int
        Seed of all samples.
    """

    samples: int
    max_new_tokens: int
    seed: int


def generate_text(
    model: GPTConfig,
    params: dict[str, Any],
    tokenizer: tjx_data.Tokenizer,
    prompt: str,
    **choice: Unpack[SamplingParams],
) -> list[str]:
    """Generate continuations of a prompt.

    Parameters
    ----------
    model : GPTConfig
        The model's configuration.
    params : nested dict of arrays
        Its parameters.
    tokenizer : tjx_data.Tokenizer
        The tokenizer that it was trained with.
    prompt : str
        The prompt; empty for the start of a document.
    **choice
        Sampling parameters.

    Returns
    -------
    list of str
        The continuations without the prompt; the end of a document is a blank line.

    Raises
    ------
    ValueError
        If prompt and continuation exceed ``max_seq_len``.
    """
    inputs = generation_inputs(model, encode_prompt(tokenizer, prompt), **choice)
    new = tjx_nn.generate(model, params, **inputs)
    return [decode_text(tokenizer, row) for row in jax.device_get(new).tolist()]


def generation_inputs(
    model: GPTConfig, tokens: Sequence[int], **choice: Unpack[SamplingParams]
) -> dict[str, Any]:
    """Return the arguments of `tjx_nn.generate` and `tjx_nn.stream` for a tokenized prompt.

    Parameters
    ----------
    model : GPTConfig
        The model's configuration.
    tokens : sequence of int
        The prompt.
    **choice
        Sampling parameters.

    Raises
    ------
    ValueError
        If prompt and continuation exceed ``max_seq_len``.
    """
    numbers: dict[str, Any] = dict(choice)
    samples, new = numbers.pop("samples", 1), numbers["max_new_tokens"]
    if len(tokens) + new > model.max_seq_len:
        raise ValueError(
            f"max_new_tokens: got {new} after a prompt of {len(tokens)} tokens; expected at most "
            f"{model.max_seq_len} tokens in all, the model's max_seq_len; give "
            f"{max(model.max_seq_len - len(tokens), 0)} or fewer, or a shorter prompt"
        )
    if numbers.get("top_k") is not None:
        numbers["top_k"] = min(numbers["top_k"], model.vocab_size)
    key = jax.jit(jax.random.key, static_argnums=0)(numbers.pop("seed"))
    prompts = np.tile(np.asarray(tokens, np.int32), (samples, 1))
    lengths = np.full(samples, len(tokens), np.int32)
    return {"prompt": prompts, "prompt_lengths": lengths, "key": key, **numbers}


def max_new_tokens_for(model: GPTConfig, tokenizer: tjx_data.Tokenizer, prompt: str) -> int:
    """Return the number of tokens that fit after a prompt."""
    return max(model.max_seq_len - len(encode_prompt(tokenizer, prompt)), 0)


def encode_prompt(tokenizer: tjx_data.Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt at the start of a document."""
    return tokenizer.encode_prompt(prompt)
