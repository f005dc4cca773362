"""Reading of CORE's evaluation bundle: core.yaml, eval_meta_data.csv and eval_data/.

The layout is that of nanochat's eval_bundle, whose tasks are those of DCLM (Li et al. 2024,
"DataComp-LM", appendix G).
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tjx_core import ConfigError, Problem

TaskType = Literal["multiple_choice", "schema", "language_modeling"]

CONFIG_FILE, BASELINE_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
_MAX_PROBLEMS = 10  # of a data file that are reported
_NAME_COLUMN, _BASELINE_COLUMN = "Eval Task", "Random baseline"
# Fields of a record of each type: the text of all options, and the list of options.
_TEXTS: dict[TaskType, tuple[str, str | None]] = {
    "multiple_choice": ("query", "choices"),
    "schema": ("continuation", "context_options"),
    "language_modeling": ("context", None),
}


@dataclass(frozen=True)
class Example:
    """An example of a task: all options of a prompt, of which one is right.

    Attributes
    ----------
    contexts, continuations : tuple of str
        Context and continuation of each option. A language modeling task has one option.
    gold : int
        Index of the right option.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle.

    Attributes
    ----------
    label : str
        Name of the task.
    kind : TaskType
        Whether options are continuations, contexts, or one text that greedy decoding must produce.
    num_fewshot : int
        Examples with their answers before each prompt.
    delimiter : str
        Text between a context and a continuation.
    baseline : float
        Accuracy of random guesses in percent.
    examples : tuple of Example
        The examples, in the order of the file.
    """

    label: str
    kind: TaskType
    num_fewshot: int
    delimiter: str
    baseline: float
    examples: tuple[Example, ...]


def read_bundle(folder: Path) -> list[CoreTask]:
    """Read all tasks of a bundle.

    Raises
    ------
    ConfigError
        With every problem of the files, by file and line.
    """
    problems: list[Problem] = []
    baselines = _read_baselines(folder / BASELINE_FILE, problems)
    tasks: list[CoreTask] = []
    for line, entry in _read_entries(folder / CONFIG_FILE, problems):
        where = f"{folder / CONFIG_FILE}:{line}"
        names = ("label", "icl_task_type", "dataset_uri", "num_fewshot")
        given: Any = [entry.get(name) for name in names]
        label, kind, data, shots = given
        delimiter = entry.get("continuation_delimiter", " ")
        shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
        named = isinstance(label, str) and (label in baselines or not baselines)
        new = named and all(task.label != label for task in tasks)
        rules = {
            "label": (label, new, f"a name of its own, with a row in {BASELINE_FILE}"),
            "dataset_uri": (data, isinstance(data, str), f"a file in {DATA_FOLDER}/"),
            "icl_task_type": (kind, kind in [*_TEXTS], f"one of {', '.join(_TEXTS)}"),
            "num_fewshot": (shots, _is_count(shots), "a number, at least 0"),
            "continuation_delimiter": (delimiter, isinstance(delimiter, str), "a text"),
        }
        wrong = [
            Problem(where, f"{name}: got {value!r}; expected {rule}")
            for name, (value, right, rule) in rules.items()
            if not right
        ]
        problems += wrong
        if wrong:
            continue
        file, before = folder / DATA_FOLDER / data, len(problems)
        examples = tuple(_read_examples(file, kind, problems))
        if len(examples) <= shots and len(problems) == before:
            rule = f"expected more than num_fewshot, {shots}"
            problems.append(Problem(str(file), f"got {len(examples)} examples; {rule}"))
        tasks.append(CoreTask(label, kind, shots, delimiter, baselines.get(label, 0.0), examples))
    if problems:
        raise ConfigError(problems)
    return tasks


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_text(file: Path, problems: list[Problem]) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(str(file), f"cannot be read ({error}); expected a UTF-8 text file"))
        return ""


def _read_entries(file: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the tasks of core.yaml with their line numbers."""
    text = _read_text(file, problems)
    if problems and not text:
        return
    try:
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(file) if mark is None else f"{file}:{mark.line + 1}"
        problems.append(Problem(where, f"invalid YAML: {getattr(error, 'problem', error)}"))
        return
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        problems.append(Problem(f"{file}:1", "icl_tasks: got no list; expected the tasks"))
        return
    assert root is not None
    nodes = next(node for key, node in root.value if key.value == "icl_tasks").value
    for node, entry in zip(nodes, entries, strict=True):
        line = node.start_mark.line + 1
        if isinstance(entry, dict):
            yield line, entry
        else:
            problems.append(Problem(f"{file}:{line}", f"got {entry!r}; expected a task"))


def _read_baselines(file: Path, problems: list[Problem]) -> dict[str, float]:
    """Read the accuracy of random guesses of each task in percent."""
    reader = csv.DictReader(_read_text(file, problems).splitlines())
    columns = reader.fieldnames or []
    if problems:
        return {}
    for name in (_NAME_COLUMN, _BASELINE_COLUMN):
        if name not in columns:
            problems.append(Problem(f"{file}:1", f"got columns {columns}; expected {name!r}"))
    if problems:
        return {}
    baselines: dict[str, float] = {}
    for row in reader:
        given = row[_BASELINE_COLUMN]
        try:
            baseline = float(given or "nan")
        except ValueError:
            baseline = math.nan
        if not 0 <= baseline < 100:
            problems.append(
                Problem(
                    f"{file}:{reader.line_num}",
                    f"{_BASELINE_COLUMN}: got {given!r}; expected percent in [0, 100)",
                )
            )
        baselines[row[_NAME_COLUMN]] = baseline
    return baselines


def _read_examples(file: Path, kind: TaskType, problems: list[Problem]) -> Iterator[Example]:
    before = len(problems)
    # Not `splitlines`, which also splits at separators within texts.
    for number, line in enumerate(_read_text(file, problems).split("\n"), 1):
        if not line.strip():
            continue
        if len(problems) - before >= _MAX_PROBLEMS:
            return
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(f"{file}:{number}", f"invalid JSON: {error.msg}"))
            continue
        wrong = _check_record(record, kind)
        if wrong is not None:
            problems.append(Problem(f"{file}:{number}", wrong))
            continue
        if kind == "multiple_choice":
            options = tuple(record["choices"])
            yield Example((record["query"],) * len(options), options, record["gold"])
        elif kind == "schema":
            options = tuple(record["context_options"])
            yield Example(options, (record["continuation"],) * len(options), record["gold"])
        else:
            yield Example((record["context"].strip(),), (record["continuation"],), 0)


def _check_record(record: Any, kind: TaskType) -> str | None:
    """Return the error in a record of a data file, or None."""
    if not isinstance(record, Mapping):
        return f"got {type(record).__name__}; expected an object"
    text, options = _TEXTS[kind]
    texts = (text,) if options is not None else (text, "continuation")
    for name in texts:
        if not isinstance(record.get(name), str):
            return f"{name}: got {record.get(name)!r}; expected a text"
    if options is None:
        return None if record["continuation"].strip() else "continuation: got an empty text"
    given: Any = record.get(options)
    gold: Any = record.get("gold")
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(t, str) for t in given):
        return f"{options}: got {given!r}; expected at least two texts"
    if not _is_count(gold) or gold >= len(given):
        return f"gold: got {gold!r}; expected 0 to {len(given) - 1}"
    return None
