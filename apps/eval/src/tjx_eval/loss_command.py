"""`loss`: perplexity, bits per byte and accuracy on held-out text."""

import argparse
import json
from pathlib import Path

from tjx_eval.command_parser import Parser, positive


def add_arguments(parser: Parser) -> None:
    """Add what `loss` can be told."""
    parser.add_argument("model", help="a run directory of the trainer")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--batch_size", type=positive, help="sequences at once")
    parser.add_argument("--max_tokens", type=positive, help="stop after so many tokens")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures."""
    from tjx_eval.loss import measure_loss
    from tjx_eval.opening import open_model
    from tjx_eval.tables import print_figures

    model = open_model(arguments.model)
    figures = measure_loss(model, batch_size=arguments.batch_size, max_tokens=arguments.max_tokens)
    print_figures(figures)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0
