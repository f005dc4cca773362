"""`compare`: two models on the same text: where they differ, and how surely."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tjx_eval.commands.loss import add_text_arguments
from tjx_eval.commands.parser import Parser, model_folder, picture_file, positive

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel
    from tjx_eval.scoring.comparison import Comparison

_CONTEXT_SHOWN = 30  # characters


def add_arguments(parser: Parser) -> None:
    """Add what `compare` can be told."""
    for name in ("a", "b"):
        parser.add_argument(
            name, type=model_folder, help="a run directory, or a transformers folder"
        )
        parser.add_argument(
            f"--step_{name}", type=positive, help=f"checkpoint of run {name.upper()}"
        )
    add_text_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE", help="draw the documents: .png, .pdf or .svg"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score both, and print what differs."""
    from tjx_eval.processes import join_processes

    join_processes()
    import tjx_parallel
    from tjx_eval.commands.progress import progress
    from tjx_eval.load_model import load_model
    from tjx_eval.scoring.comparison import compare
    from tjx_eval.scoring.eval_data import Texts, open_texts
    from tjx_eval.scoring.text_loss import choose_windows, encode_texts, measure_text

    models = (
        load_model(arguments.a, step=arguments.step_a),
        load_model(arguments.b, step=arguments.step_b),
    )
    windows = choose_windows(models[0], arguments.window, arguments.stride)
    choose_windows(models[1], windows.window, windows.stride)
    texts = open_texts(
        models[0] if models[0].config is not None else models[1],
        data=arguments.data, text_field=arguments.text_field, corpus=arguments.corpus,
    )  # fmt: skip
    same = models[0].tokenizer.fingerprint == models[1].tokenizer.fingerprint
    documents = list(texts.documents)
    found = []
    for model in models:
        own = Texts(texts.name, iter(documents))
        encoded = encode_texts(own, model.tokenizer, arguments.max_tokens)
        # What one reads of a text that is cut short, the other reads too.
        documents = [each.document for each in encoded]
        with progress(model.name, shown=tjx_parallel.is_main()) as told:
            measured = measure_text(
                model,
                encoded,
                windows,
                per_document=True,
                batch_size=arguments.batch_size,
                told=told,
            )
        found.append(measured)
    if tjx_parallel.is_main():
        tell(models, compare(*found, same_tokenizer=same), texts.name, arguments)
    return 0


def tell(
    models: tuple["TrainedModel", "TrainedModel"],
    found: "Comparison",
    text: str,
    arguments: argparse.Namespace,
) -> None:
    """Print a comparison, and write it where that is asked for."""
    from tjx_eval.commands.tables import print_documents, print_figures
    from tjx_eval.scoring.comparison import totals
    from tjx_eval.scoring.comparison_plot import draw_comparison

    names = (models[0].name, models[1].name)
    summary: dict[str, Any] = {"a": names[0], "b": names[1], "text": text, "unit": found.unit}
    for name, of_model in (("a", found.a), ("b", found.b)):
        summary |= {f"{figure}_{name}": value for figure, value in totals(of_model).items()}
    summary["documents"] = len(found.a.documents)
    if (difference := found.difference) is not None:
        summary |= {
            "difference": difference.mean,
            "standard_error": difference.standard_error,
            "low_95": difference.low,
            "high_95": difference.high,
            "error_over": found.over,
        }
    documents = found.documents()
    print_figures(summary)
    print_documents(documents, title="Documents, where they differ most first (B - A)")
    everything = {**summary, "table": documents}
    if found.same_tokens:
        tokens = found.tokens(models[0].tokenizer)
        one_line = [
            {**row, "context": _end_of(row["context"]), "token": ascii(row["token"])[1:-1]}
            for row in tokens
        ]
        print_documents(one_line, title="Tokens, where they differ most first [nats]")
        everything["tokens"] = tokens
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(everything, indent=2) + "\n")
    if arguments.plot:
        draw_comparison(found, names, Path(arguments.plot))
        sys.stdout.write(f"\npicture  {arguments.plot}\n")


def _end_of(context: str) -> str:
    """Return what stands straight before a token, in a line."""
    return ascii(context)[1:-1][-_CONTEXT_SHOWN:]
