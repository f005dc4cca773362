"""`loss`: loss, perplexity, bits per byte and accuracy on validation data or any text."""

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tjx_core import CommandParser
from tjx_eval.commands.arguments import add_model, add_text, attention_options
from tjx_eval.errors import EvalError

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `loss`."""
    add_model(parser)
    add_text(parser)
    parser.add_argument(
        "--per_document", action="store_true", help="score each document separately; print a table"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all results to this file")
    parser.add_argument("--csv", metavar="FILE", help="write the table of documents to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics, and write them to the requested files."""
    if arguments.csv and not arguments.per_document:
        raise EvalError("--csv: got no table of documents to write; give --per_document too")
    import tjx_nn
    import tjx_parallel
    from tjx_eval.commands.tables import print_metrics, print_rows
    from tjx_eval.load_model import DECODERS, join_processes, load_model

    join_processes()
    windowed = arguments.window or arguments.stride or arguments.per_document
    of_text = bool(arguments.data or arguments.corpus or windowed)
    model = load_model(
        arguments.model,
        step=arguments.step,
        average=arguments.average,
        tokenizer=arguments.tokenizer,
        families=DECODERS if of_text else None,
        attention=attention_options(arguments),
        quantization=arguments.quantization,
    )
    results: dict[str, Any] = {"model": str(model.path)}
    if model.step is not None:
        results["step"] = model.step
    if model.averaged_steps:
        results["averaged_steps"] = ", ".join(map(str, model.averaged_steps))
    if arguments.use_mla is not None:
        results["kv_cache_bytes_per_token"] = tjx_nn.cache_bytes(model.gpt, 1)
    results |= _text_loss(model, arguments) if of_text else _validation_loss(model, arguments)
    if not tjx_parallel.is_main():
        return 0
    rows = results.get("table")
    print_metrics({name: value for name, value in results.items() if name != "table"})
    if rows is not None:
        print_rows(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    if arguments.csv:
        Path(arguments.csv).write_text(_as_csv(rows or []))
    return 0


def _validation_loss(model: "TrainedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    import tjx_parallel
    from tjx_eval.commands.progress import show_progress
    from tjx_eval.scoring.validation_loss import measure_validation_loss

    if model.config is None:
        raise EvalError(f"{model.path}: a Transformers model has no validation data; give --data")
    with show_progress("loss", enabled=tjx_parallel.is_main()) as on_progress:
        metrics = measure_validation_loss(
            model,
            batch_size=arguments.batch_size,
            max_tokens=arguments.max_tokens,
            on_progress=on_progress,
        )
    data = model.config.task or ", ".join(model.config.data.weights)
    return {"text": data, **metrics}


def _text_loss(model: "TrainedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    import tjx_parallel
    from tjx_eval.commands.progress import show_progress
    from tjx_eval.scoring.encoding import encode
    from tjx_eval.scoring.eval_data import load_texts
    from tjx_eval.scoring.text_loss import make_window_config, measure_text_loss

    windows = make_window_config(model, arguments.window, arguments.stride)
    texts = load_texts(
        model, data=arguments.data, text_field=arguments.text_field, corpus=arguments.corpus
    )
    documents = encode(texts.documents, model.tokenizer, arguments.max_tokens)
    with show_progress("loss", enabled=tjx_parallel.is_main()) as on_progress:
        measured = measure_text_loss(
            model,
            documents,
            windows,
            per_document=arguments.per_document,
            batch_size=arguments.batch_size,
            on_progress=on_progress,
        )
    table = {"table": measured.table()} if arguments.per_document else {}
    return {
        "text": texts.name,
        "window": windows.length,
        "stride": windows.stride,
        **measured.metrics(),
        **table,
    }


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
