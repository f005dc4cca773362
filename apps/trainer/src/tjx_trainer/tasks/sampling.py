"""Text from a model: a prompt encoded, continued and decoded."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

import tjx_data
import tjx_nn
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.tasks.text_stream import decode_text


class SamplingParams(TypedDict, total=False):
    """How tokens are chosen, and how many; numbers as `tjx_nn.generate` has them.

    Attributes
    ----------
    samples : int
        Number of continuations.
    max_new_tokens : int
        Length of each in tokens.
    temperature : float
        0 always takes the likeliest token.
    top_k : int or None
        Draw from this many likeliest tokens; more than there are is all of them.
    top_p, min_p, repetition_penalty : float or None
        None leaves the step out.
    seed : int
        Decides all samples.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int


def generate_text(
    model: GPTConfig,
    params: dict[str, Any],
    tokenizer: tjx_data.Tokenizer,
    prompt: str,
    **choice: Unpack[SamplingParams],
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
    **choice
        Number and length of the continuations, and how their tokens are chosen.

    Returns
    -------
    list of str
        The continuations without the prompt; a blank line stands where a document ended.

    Raises
    ------
    ValueError
        If prompt and continuation together are longer than the model's longest sequence.
    """
    inputs = generation_inputs(model, encode_prompt(tokenizer, prompt), **choice)
    new = tjx_nn.generate(model, params, **inputs)
    return [decode_text(tokenizer, row) for row in jax.device_get(new).tolist()]


def generation_inputs(
    model: GPTConfig, tokens: Sequence[int], **choice: Unpack[SamplingParams]
) -> dict[str, Any]:
    """Return what `tjx_nn.generate` and `tjx_nn.stream` want, beside model and parameters.

    Parameters
    ----------
    model : GPTConfig
        The model.
    tokens : sequence of int
        The prompt.
    **choice
        As for `continue_prompt`.

    Raises
    ------
    ValueError
        If prompt and continuation together are longer than the model's longest sequence.
    """
    numbers: dict[str, Any] = dict(choice)
    samples, new = numbers.pop("samples", 1), numbers["max_new_tokens"]
    if len(tokens) + new > model.max_seq_len:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and {new} new ones were asked for; "
            f"the model's longest sequence is {model.max_seq_len}: ask for "
            f"{max(model.max_seq_len - len(tokens), 0)} or fewer, or give a shorter prompt"
        )
    if numbers.get("top_k") is not None:
        numbers["top_k"] = min(numbers["top_k"], model.vocab_size)
    key = jax.jit(jax.random.key, static_argnums=0)(numbers.pop("seed"))
    prompts = np.tile(np.asarray(tokens, np.int32), (samples, 1))
    lengths = np.full(samples, len(tokens), np.int32)
    return {"prompt": prompts, "prompt_lengths": lengths, "key": key, **numbers}


def max_new_tokens_for(model: GPTConfig, tokenizer: tjx_data.Tokenizer, prompt: str) -> int:
    """Return how many tokens fit behind a prompt."""
    return max(model.max_seq_len - len(encode_prompt(tokenizer, prompt)), 0)


def encode_prompt(tokenizer: tjx_data.Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt as the beginning of a document."""
    return tokenizer.encode_prompt(prompt)
