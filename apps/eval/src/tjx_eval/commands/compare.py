"""`compare`: two models on the same text, with a confidence interval of their difference."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tjx_core import CommandParser, whole_number
from tjx_eval.commands.arguments import add_text, model_directory, plot_file, positive

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel
    from tjx_eval.scoring.comparison import Comparison

_CONTEXT_SHOWN = 30  # characters


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `compare`."""
    add = parser.add_argument
    for name in ("a", "b"):
        add(name, type=model_directory, help="a run or Transformers model directory")
        add(f"--step_{name}", type=positive, help=f"checkpoint step of run {name.upper()}")
        add(
            f"--average_{name}", type=whole_number(2), metavar="N",
            help=f"mean of the last N checkpoints of run {name.upper()}, up to its step",
        )  # fmt: skip
    add_text(parser)
    add("--json", metavar="FILE", help="also write all results to this file")
    add("--plot", type=plot_file, metavar="FILE", help="plot the documents: .png, .pdf or .svg")


def run(arguments: argparse.Namespace) -> int:
    """Score both models, and print their differences."""
    import tjx_parallel
    from tjx_eval.commands.progress import show_progress
    from tjx_eval.load_model import join_processes, load_model
    from tjx_eval.scoring.comparison import compare
    from tjx_eval.scoring.encoding import encode
    from tjx_eval.scoring.eval_data import load_texts
    from tjx_eval.scoring.text_loss import make_window_config, measure_text_loss

    join_processes()
    models = (
        load_model(arguments.a, step=arguments.step_a, average=arguments.average_a),
        load_model(arguments.b, step=arguments.step_b, average=arguments.average_b),
    )
    windows = make_window_config(models[0], arguments.window, arguments.stride)
    make_window_config(models[1], windows.length, windows.stride)  # raises if it does not fit
    texts = load_texts(
        models[0] if models[0].config is not None else models[1],
        data=arguments.data, text_field=arguments.text_field, corpus=arguments.corpus,
    )  # fmt: skip
    documents = list(texts.documents)
    losses = []
    for model in models:
        encoded = encode(iter(documents), model.tokenizer, arguments.max_tokens)
        # If --max_tokens truncates the text for the first model, the second scores the same text.
        documents = [each.document for each in encoded]
        with show_progress(model.name, enabled=tjx_parallel.is_main()) as on_progress:
            measured = measure_text_loss(
                model,
                encoded,
                windows,
                per_document=True,
                batch_size=arguments.batch_size,
                on_progress=on_progress,
            )
        losses.append(measured)
    if tjx_parallel.is_main():
        same_tokenizer = models[0].tokenizer.fingerprint == models[1].tokenizer.fingerprint
        comparison = compare(*losses, same_tokenizer=same_tokenizer)
        _report(models, comparison, texts.name, arguments)
    return 0


def _report(
    models: tuple["TrainedModel", "TrainedModel"],
    comparison: "Comparison",
    text: str,
    arguments: argparse.Namespace,
) -> None:
    """Print a comparison, and write it to the requested files."""
    from tjx_eval.commands.tables import print_metrics, print_rows
    from tjx_eval.scoring.comparison import mean_losses

    names = (models[0].name, models[1].name)
    summary: dict[str, Any] = {"a": names[0], "b": names[1], "text": text, "unit": comparison.unit}
    for name, losses in (("a", comparison.a), ("b", comparison.b)):
        summary |= {f"{metric}_{name}": value for metric, value in mean_losses(losses).items()}
    summary["documents"] = len(comparison.a.documents)
    if (difference := comparison.difference) is not None:
        summary |= {
            "difference": difference.mean,
            "standard_error": difference.standard_error,
            "low_95": difference.low,
            "high_95": difference.high,
            "error_over": comparison.over,
        }
    documents = comparison.documents()
    print_metrics(summary)
    print_rows(documents, title="Documents with the largest differences (B - A)")
    results = {**summary, "table": documents}
    if comparison.same_tokens:
        tokens = comparison.tokens(models[0].tokenizer)
        single_lines = [
            {
                **row,
                "context": ascii(row["context"])[1:-1][-_CONTEXT_SHOWN:],
                "token": ascii(row["token"])[1:-1],
            }
            for row in tokens
        ]
        print_rows(single_lines, title="Tokens with the largest differences [nats]")
        results["tokens"] = tokens
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        from tjx_eval.scoring.comparison_plot import plot_comparison

        plot_comparison(comparison, names, Path(arguments.plot))
        sys.stdout.write(f"\nplot  {arguments.plot}\n")
