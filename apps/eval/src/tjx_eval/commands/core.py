"""`core`: the CORE metric, the mean centered accuracy of the tasks of a local bundle."""

import argparse
import json
from pathlib import Path
from typing import Any

from tjx_core import CommandParser
from tjx_eval.commands.arguments import add_model, load, positive
from tjx_eval.errors import EvalError


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `core`."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--bundle", required=True, metavar="DIR",
        help="nanochat's eval_bundle: core.yaml, eval_meta_data.csv and eval_data/",
    )  # fmt: skip
    add("--limit", type=positive, help="at most this many examples per task; a part is not CORE")
    add("--batch_size", type=positive, default=8, help="rows per batch; default 8")
    add("--json", metavar="FILE", help="also write all results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Score all tasks, and print their accuracies and CORE."""
    from tjx_eval.scoring.core_bundle import CONFIG_FILE, read_bundle

    folder = Path(arguments.bundle)
    if not folder.is_dir():
        raise EvalError(f"--bundle: got {folder}; expected a folder with {CONFIG_FILE}")
    tasks = read_bundle(folder)
    from tjx_eval.commands.progress import show_progress
    from tjx_eval.commands.tables import print_metrics, print_rows
    from tjx_eval.scoring.continuations import ContinuationScorer
    from tjx_eval.scoring.core import core_metric, score_task

    model = load(arguments)
    scorer = ContinuationScorer(model, batch_size=arguments.batch_size)
    results = []
    for task in tasks:
        with show_progress(task.label, enabled=True) as on_progress:
            results.append(
                score_task(model, scorer, task, limit=arguments.limit, on_progress=on_progress)
            )
    rows: list[dict[str, Any]] = [
        {
            "task": task.label, "type": task.kind, "shots": task.num_fewshot,
            "examples": result.examples, "accuracy": result.accuracy,
            "random_accuracy": 0.01 * task.baseline, "centered": result.centered,
        }
        for task, result in zip(tasks, results, strict=True)
    ]  # fmt: skip
    summary: dict[str, Any] = {"model": model.name, "tasks": len(tasks)}
    if arguments.limit is not None:
        summary["limit"] = arguments.limit
    summary |= {"truncated_contexts": scorer.truncated, "core": core_metric(results)}
    shown = [{name: value for name, value in row.items() if name != "type"} for row in rows]
    print_rows(shown, max_rows=len(rows))
    print_metrics(summary)
    if arguments.json:
        record = {**summary, "table": rows}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0
