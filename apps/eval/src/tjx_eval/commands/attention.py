"""`attention`: the attention weights of every head, as plots and data."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tjx_core import CommandParser
from tjx_eval.commands.arguments import add_model, load
from tjx_eval.errors import EvalError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tjx_eval.load_model import TrainedModel


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `attention`."""
    add_model(parser, quantization=False)
    parser.add_argument("--prompt", metavar="TEXT", help="the input text")
    parser.add_argument("--file", metavar="FILE", help="file with the input text")
    parser.add_argument(
        "--out", default="attention", metavar="DIR", help="output directory (default: attention)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write attention_maps.png, attention_distances.png and attention.npz."""
    text = _input_text(arguments)
    import numpy as np

    import tjx_metrics

    model = load(arguments)
    tokens, weights = attention_weights(model, text)
    pieces = [model.tokenizer.decode([token]) for token in tokens.tolist()]
    distances = tjx_metrics.attention_distances(weights)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    maps, histograms, data = (
        out / name for name in ("attention_maps.png", "attention_distances.png", "attention.npz")
    )
    tjx_metrics.plot_attention_maps(weights, pieces, maps, title=f"Attention: {model.name}")
    tjx_metrics.plot_attention_distances(
        distances, histograms, title=f"Attention distance: {model.name}"
    )
    np.savez_compressed(
        data, weights=weights, distances=distances, tokens=tokens, pieces=np.array(pieces)
    )
    layers, heads, count, _ = weights.shape
    sys.stdout.write(
        f"{layers} layers of {heads} heads over {count} tokens\n"
        f"maps       {maps}\ndistances  {histograms}\ndata       {data}\n"
    )
    return 0


def attention_weights(
    model: "TrainedModel", text: str
) -> "tuple[NDArray[np.int32], NDArray[np.float32]]":
    """Compute the attention weights of a decoder over a text that begins a document.

    Returns
    -------
    tokens : int32 [tokens]
        The tokens; the first is the end-of-text token, if the tokenizer has one.
    weights : float32 [layers, heads, queries, keys]
        Attention weights; they sum to 1 over the keys.

    Raises
    ------
    EvalError
        If the text is empty or too long, or the model does not compute dense attention weights.
    """
    import jax
    import numpy as np

    import tjx_nn

    tokenizer, gpt = model.tokenizer, model.gpt
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise EvalError(f"the text cannot be encoded: {error}") from error
    if not ids:
        raise EvalError("the text is empty; expected at least one token")
    eot = tokenizer.eot_id
    tokens = np.array(ids if eot is None else [eot, *ids], np.int32)
    if len(tokens) > gpt.max_seq_len:
        raise EvalError(
            f"the text has {len(tokens)} tokens; the model's max_seq_len is {gpt.max_seq_len}; "
            "give a shorter text"
        )
    device = model.mesh.local_devices[0]
    params = jax.device_put(jax.device_get(model.params), device)
    try:
        weights, _ = tjx_nn.attention_weights(gpt, params, jax.device_put(tokens[None], device))
    except ValueError as error:
        raise EvalError(str(error)) from error
    return tokens, np.asarray(jax.device_get(weights))[:, 0]


def _input_text(arguments: argparse.Namespace) -> str:
    if (arguments.prompt is None) == (arguments.file is None):
        raise EvalError("give either --prompt TEXT or --file FILE")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    try:
        return Path(arguments.file).read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--file {arguments.file}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise EvalError(f"--file {arguments.file}: invalid UTF-8 at byte {error.start}") from error
