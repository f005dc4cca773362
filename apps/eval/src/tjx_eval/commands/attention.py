"""`attention`: where each head of each layer looks, as pictures and data."""

import argparse
import sys
from pathlib import Path

from tjx_eval.commands.parser import Parser, add_model
from tjx_eval.errors import EvalError


def add_arguments(parser: Parser) -> None:
    """Add what `attention` can be told."""
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the text that is read")
    parser.add_argument("--file", metavar="FILE", help="a file with the text, in place of --prompt")
    parser.add_argument(
        "--out", default="attention", metavar="FOLDER", help="where to write (default: attention)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write attention_maps.png, attention_distances.png and attention.npz."""
    text = _text(arguments)
    import numpy as np

    import tjx_metrics
    from tjx_eval.load_model import load_model
    from tjx_eval.scoring.attention_maps import look

    model = load_model(arguments.model, step=arguments.step, tokenizer=arguments.tokenizer)
    seen = look(model, text)
    distances = tjx_metrics.attention_distances(seen.weights)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    maps, histograms, data = (
        out / name for name in ("attention_maps.png", "attention_distances.png", "attention.npz")
    )
    tjx_metrics.plot_attention_maps(
        seen.weights, seen.pieces, maps, title=f"Attention: {model.name}"
    )
    tjx_metrics.plot_attention_distances(
        distances, histograms, title=f"Distance of attention: {model.name}"
    )
    np.savez_compressed(
        data,
        weights=seen.weights,
        distances=distances,
        tokens=seen.tokens,
        pieces=np.array(seen.pieces),
    )
    layers, heads, count, _ = seen.weights.shape
    sys.stdout.write(
        f"{layers} layers of {heads} heads over {count} tokens\n"
        f"maps       {maps}\ndistances  {histograms}\ndata       {data}\n"
    )
    return 0


def _text(arguments: argparse.Namespace) -> str:
    if (arguments.prompt is None) == (arguments.file is None):
        raise EvalError("give either --prompt TEXT or --file FILE")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    try:
        return Path(arguments.file).read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--file {arguments.file}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise EvalError(f"--file {arguments.file}: no UTF-8 at byte {error.start}") from error
