"""What a model looks at while it reads a text."""

from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import NDArray

import tjx_nn
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel


@dataclass(frozen=True)
class Seen:
    """Attention over a text.

    Attributes
    ----------
    weights : float32 [layers, heads, queries, keys]
        Of each head; those of a query sum to 1.
    tokens : int32 [tokens]
        What was read; first the end-of-text token, where the tokenizer has one.
    pieces : list of str
        The text of each token.
    """

    weights: NDArray[np.float32]
    tokens: NDArray[np.int32]
    pieces: list[str]


def look(model: TrainedModel, text: str) -> Seen:
    """Let a decoder read a text, as the beginning of a document.

    Raises
    ------
    RunError
        If the text is empty or longer than the model's longest sequence, or the model keeps no
        weights of all keys.
    """
    tokenizer, gpt = model.tokenizer, model.gpt
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise EvalError(f"the text cannot be encoded: {error}") from error
    eot = tokenizer.eot_id
    if not ids:
        raise EvalError("the text is empty: give some to read")
    tokens = np.array(ids if eot is None else [eot, *ids], np.int32)
    if len(tokens) > gpt.max_seq_len:
        raise EvalError(
            f"the text has {len(tokens)} tokens and the model's longest sequence is "
            f"{gpt.max_seq_len}: give less text"
        )
    device = model.mesh.local_devices[0]
    params = jax.device_put(jax.device_get(model.params), device)
    try:
        weights, _ = tjx_nn.attention_weights(gpt, params, jax.device_put(tokens[None], device))
    except ValueError as error:
        raise EvalError(str(error)) from error
    return Seen(
        np.asarray(jax.device_get(weights))[:, 0],
        tokens,
        [tokenizer.decode([token]) for token in tokens.tolist()],
    )
