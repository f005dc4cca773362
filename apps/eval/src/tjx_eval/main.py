"""The command line of the evaluation app."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tjx_ckpt.errors import CheckpointError
from tjx_data.corpora.hub import HubError
from tjx_trainer.config import ConfigError

if TYPE_CHECKING:
    from tjx_eval.trained import TrainedModel

EXIT_USER_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="eval", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    loss = commands.add_parser("loss", help="loss, perplexity, bits per byte, accuracy")
    loss.add_argument("run_dir", help="a run directory of the trainer")
    loss.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    loss.add_argument("--batch_size", type=_positive, help="sequences at once")
    loss.add_argument("--max_tokens", type=_positive, help="stop after so many tokens")

    generate = commands.add_parser("generate", help="text after a prompt")
    generate.add_argument("run_dir", help="a run directory of the trainer")
    generate.add_argument("--prompt", default="", help="text to go on from (default: none)")
    generate.add_argument("--samples", type=_positive, default=1, help="default 1")
    generate.add_argument("--max_new_tokens", type=_positive, default=50, help="default 50")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
    generate.add_argument("--top_k", type=_positive, default=50, help="default 50")
    generate.add_argument("--seed", type=int, default=0, help="default 0")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 where the user can mend what is wrong."""
    arguments = parser().parse_args(argv)
    # They bring JAX, which takes seconds to import: a wrong command line is answered before.
    from tjx_eval.trained import RunError, open_trained

    try:
        model = open_trained(arguments.run_dir)
        if arguments.command == "loss":
            show_loss(model, arguments)
        else:
            show_texts(model, arguments)
    except (RunError, ConfigError, CheckpointError, HubError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    return 0


def show_loss(model: "TrainedModel", arguments: argparse.Namespace) -> None:
    """Run `loss`."""
    from tjx_eval.loss import measure_loss

    figures = measure_loss(model, batch_size=arguments.batch_size, max_tokens=arguments.max_tokens)
    print_table(figures)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


def show_texts(model: "TrainedModel", arguments: argparse.Namespace) -> None:
    """Run `generate`."""
    from tjx_eval.trained import RunError
    from tjx_trainer.sampling import continue_prompt

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


def print_table(figures: dict[str, float | int | str]) -> None:
    """Print one figure a line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _shown(name, value))
    Console().print(table)


def _shown(name: str, value: float | int | str) -> str:
    if isinstance(value, float):
        if name.endswith("accuracy"):
            return f"{value:.2%}"
        return f"{value:,.0f}" if name == "tokens_per_sec" else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
