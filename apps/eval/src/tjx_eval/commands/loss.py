"""`loss`: loss, perplexity, bits per byte and accuracy, on held-out or any text."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tjx_eval.commands.parser import Parser, add_model, positive
from tjx_eval.errors import EvalError

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel


def add_arguments(parser: Parser) -> None:
    """Add what `loss` can be told."""
    add_model(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--per_document", action="store_true", help="score each document by itself; a table of them"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--csv", metavar="FILE", help="write the table of documents to this file")


def add_text_arguments(parser: Parser) -> None:
    """Add which text is scored, and how it is cut."""
    parser.add_argument(
        "--data", nargs="+", metavar="FILE",
        help="files and patterns: text, .jsonl, .parquet (default: what the run held out)",
    )  # fmt: skip
    parser.add_argument("--text_field", default="text", help="of records (default: text)")
    parser.add_argument(
        "--corpus", metavar="NAME", help="a corpus that tjx_data knows, or NAME:SPLIT"
    )
    parser.add_argument("--window", type=positive, help="tokens in a row (default: as in training)")
    parser.add_argument(
        "--stride", type=positive,
        help="tokens between windows' begins (default: the window); fewer give more context",
    )  # fmt: skip
    parser.add_argument("--max_tokens", type=positive, help="stop after so many tokens")
    parser.add_argument("--batch_size", type=positive, help="rows at once; changes no result")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures, and write them where that is asked for."""
    if arguments.csv and not arguments.per_document:
        raise EvalError("--csv holds a table of documents: give --per_document too")
    from tjx_eval.processes import join_processes

    join_processes()
    import tjx_parallel
    from tjx_eval.commands.tables import print_documents, print_figures
    from tjx_eval.load_model import DECODERS, load_model

    cuts = arguments.window or arguments.stride or arguments.per_document
    of_text = bool(arguments.data or arguments.corpus or cuts)
    families = DECODERS if of_text else (*DECODERS, "bert", "vit", "encoder_decoder")
    model = load_model(
        arguments.model, step=arguments.step, tokenizer=arguments.tokenizer, families=families
    )
    found = _of_text(model, arguments) if of_text else _held_out(model, arguments)
    if not tjx_parallel.is_main():
        return 0
    documents = found.pop("table", None)
    print_figures(found)
    if documents is not None:
        print_documents(documents)
    if arguments.json:
        everything = found if documents is None else {**found, "table": documents}
        Path(arguments.json).write_text(json.dumps(everything, indent=2) + "\n")
    if arguments.csv:
        from tjx_eval.scoring.text_loss import as_csv

        Path(arguments.csv).write_text(as_csv(documents or []))
    return 0


def _head(model: "TrainedModel") -> dict[str, Any]:
    head: dict[str, Any] = {"model": str(model.path)}
    return head if model.step is None else {**head, "step": model.step}


def _held_out(model: "TrainedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    import tjx_parallel
    from tjx_eval.commands.progress import progress
    from tjx_eval.scoring.validation_loss import measure_validation_loss

    if model.config is None:
        raise EvalError(f"{model.path}: a folder of transformers has no text; give --data FILE")
    with progress("loss", shown=tjx_parallel.is_main()) as told:
        figures = measure_validation_loss(
            model, batch_size=arguments.batch_size, max_tokens=arguments.max_tokens, told=told
        )
    return {**_head(model), "text": ", ".join(model.config.data.weights), **figures}


def _of_text(model: "TrainedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    import tjx_parallel
    from tjx_eval.commands.progress import progress
    from tjx_eval.scoring.eval_data import open_texts
    from tjx_eval.scoring.text_loss import choose_windows, encode_texts, measure_text

    windows = choose_windows(model, arguments.window, arguments.stride)
    texts = open_texts(
        model, data=arguments.data, text_field=arguments.text_field, corpus=arguments.corpus
    )
    documents = encode_texts(texts, model.tokenizer, arguments.max_tokens)
    with progress("loss", shown=tjx_parallel.is_main()) as told:
        measured = measure_text(
            model,
            documents,
            windows,
            per_document=arguments.per_document,
            batch_size=arguments.batch_size,
            told=told,
        )
    found = {
        **_head(model),
        "text": texts.name,
        "window": windows.window,
        "stride": windows.stride,
        **measured.figures(),
    }
    return {**found, "table": measured.table()} if arguments.per_document else found
