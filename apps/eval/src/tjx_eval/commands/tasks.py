"""`tasks`: benchmarks of lm-evaluation-harness, from the hub or from local files."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tjx_core import CommandParser, ConfigError, Problem, did_you_mean, whole_number
from tjx_eval.commands.arguments import add_generator, load, positive
from tjx_eval.errors import EvalError

_TASK_NAME = re.compile(r"^(?:task|group|tag):\s*[\"']?([^\s\"'#]+)", re.MULTILINE)
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `tasks`."""
    add = parser.add_argument
    add_generator(parser)
    add("--tasks", required=True, metavar="NAME,...", help="tasks or groups of the harness")
    add("--include_path", metavar="DIR", help="your own YAML tasks; on their own, they run offline")
    add("--limit", type=positive, help="at most this many documents per task")
    add("--num_fewshot", type=whole_number(0), help="examples in each prompt")
    add("--batch_size", type=positive, default=8, help="rows per batch; default 8")
    add("--seed", type=whole_number(0), default=1234, help="seed of the examples; default 1234")
    add("--json", metavar="FILE", help="also write all results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print a table of results."""
    names = [name for name in arguments.tasks.split(",") if name]
    local = _local_names(arguments.include_path)
    if local and set(names) <= set(local):
        # Set before the imports, at which the libraries read it.
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise EvalError(
            f"tasks need lm-evaluation-harness ({error}): pip install 'tjx-eval[tasks]'"
        ) from error
    from tjx_eval.scoring.lm_harness import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(
        include_path=arguments.include_path, include_defaults=not set(names) <= set(local)
    )
    _check_names(names, manager.all_tasks)
    model = load(arguments)
    harness = HarnessModel(model, batch_size=arguments.batch_size)
    try:
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=names,
            task_manager=manager,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            fewshot_random_seed=arguments.seed,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise EvalError(
            f"--tasks {','.join(names)}: the data of a task cannot be downloaded "
            f"({' '.join(str(error).split())[:300]}); connect to the hub, or run it once on a "
            "machine with a connection and copy its cache (HF_HOME)"
        ) from error
    sys.stdout.write(make_table(results))
    if results.get("groups"):
        sys.stdout.write(make_table(results, "groups"))
    for note in sorted(harness.notes):
        sys.stdout.write(f"note: {note}\n")
    if arguments.json:
        _write_json(Path(arguments.json), model.name, results)
    return 0


def _local_names(folder: str | None) -> list[str]:
    if folder is None:
        return []
    files = sorted(Path(folder).rglob("*.yaml"))
    if not files:
        raise EvalError(f"--include_path: got {folder}, which has no .yaml file")
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return [name for text in texts for name in _TASK_NAME.findall(text)]


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    problems = [
        Problem("--tasks", f"unknown task {name!r}{did_you_mean(name, known)}")
        for name in names
        if name not in known
    ]
    if not names:
        problems = [Problem("--tasks", "got no name; expected at least one task")]
    if problems:
        raise ConfigError(problems)


def _write_json(path: Path, model: str, results: dict[str, Any]) -> None:
    keys = ("results", "groups", "n-shot", "n-samples", "versions", "configs", "higher_is_better")
    record = {"model": model, **{name: results[name] for name in keys if name in results}}
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")
