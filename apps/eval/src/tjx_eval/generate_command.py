"""`generate`: text after a prompt."""

import argparse
import sys

from tjx_eval.command_parser import Parser, positive
from tjx_eval.errors import RunError


def add_arguments(parser: Parser) -> None:
    """Add what `generate` can be told."""
    parser.add_argument("model", help="a run directory of the trainer, or a transformers folder")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--samples", type=positive, default=1, help="default 1")
    parser.add_argument("--max_new_tokens", type=positive, default=50, help="default 50")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
    parser.add_argument("--top_k", type=positive, default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0, help="default 0")


def run(arguments: argparse.Namespace) -> int:
    """Write texts to standard output."""
    from tjx_eval.opening import open_model
    from tjx_trainer.sampling import continue_prompt

    model = open_model(arguments.model)
    try:
        texts = continue_prompt(
            model.gpt,
            model.params,
            model.tokenizer,
            arguments.prompt,
            samples=arguments.samples,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    sys.stdout.write("\n----\n".join(arguments.prompt + text for text in texts) + "\n")
    return 0
