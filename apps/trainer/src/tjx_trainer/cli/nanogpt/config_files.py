"""nanoGPT's config files: those it ships, and a user's own, parsed without running them."""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tjx_core import nearest_name

Value = bool | int | float | str

_GPT2_BASELINE = {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False}

# By file name; https://github.com/karpathy/nanoGPT, folder config.
BUNDLED_CONFIGS: Mapping[str, Mapping[str, Value]] = {
    "train_gpt2": {
        "wandb_log": True, "wandb_project": "owt", "wandb_run_name": "gpt2-124M",
        "batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40,
        "max_iters": 600000, "lr_decay_iters": 600000,
        "eval_interval": 1000, "eval_iters": 200, "log_interval": 10, "weight_decay": 0.1,
    },
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char", "eval_interval": 250, "eval_iters": 200,
        "log_interval": 10, "always_save_checkpoint": False,
        "wandb_log": False, "wandb_project": "shakespeare-char", "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char", "gradient_accumulation_steps": 1, "batch_size": 64,
        "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2,
        "learning_rate": 1e-3, "max_iters": 5000, "lr_decay_iters": 5000, "min_lr": 1e-4,
        "beta2": 0.99, "warmup_iters": 100,
    },
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare", "eval_interval": 5, "eval_iters": 40,
        "wandb_log": False, "wandb_project": "shakespeare", "wandb_run_name": "ft",
        "dataset": "shakespeare", "init_from": "gpt2-xl", "always_save_checkpoint": False,
        "batch_size": 1, "gradient_accumulation_steps": 32, "max_iters": 20,
        "learning_rate": 3e-5, "decay_lr": False,
    },
    "eval_gpt2": {**_GPT2_BASELINE, "init_from": "gpt2"},
    "eval_gpt2_medium": {**_GPT2_BASELINE, "init_from": "gpt2-medium"},
    "eval_gpt2_large": {**_GPT2_BASELINE, "init_from": "gpt2-large"},
    "eval_gpt2_xl": {**_GPT2_BASELINE, "init_from": "gpt2-xl"},
}  # fmt: skip


@dataclass
class Settings:
    """Settings of a config file.

    Attributes
    ----------
    values : dict of str to Value
        Values by nanoGPT's names.
    lines : dict of str to str
        Origin of each, such as ``mine.py:3``; empty for a file that nanoGPT ships.
    problems : list of str
        Mistakes, a line each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_config_file(word: str) -> Settings:
    """Read a config file, or return the values of the shipped file of this name."""
    path = Path(word)
    if path.suffix != ".py":
        return Settings(problems=[f"{word}: belongs to no flag; {_HOW}"])
    if path.is_file():
        try:
            return _read_source(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            return Settings(problems=[f"{word}: cannot be read ({error})"])
    if path.stem in BUNDLED_CONFIGS:
        return Settings(values=dict(BUNDLED_CONFIGS[path.stem]))
    near = nearest_name(path.stem, BUNDLED_CONFIGS)
    hint = (
        f"did you mean config/{near}.py?" if near else f"nanoGPT ships {', '.join(BUNDLED_CONFIGS)}"
    )
    return Settings(problems=[f"{word}: file not found; {hint}"])


_HOW = "give values as --name=value and config files as config/train_shakespeare_char.py"


def _read_source(source: str, label: str) -> Settings:
    """Parse the simple assignments of a Python file without running it."""
    found = Settings()
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        found.problems.append(f"{label}: not valid Python ({error})")
        return found
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom) or _is_docstring(statement):
            continue
        where = f"{label}:{statement.lineno}"
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(target, ast.Name) or not isinstance(statement, ast.Assign):
            found.problems.append(
                f"{where}: expected `name = value`, as config files are not executed; give the "
                "value itself"
            )
        elif (value := _evaluate(statement.value)) is not None:
            found.values[target.id] = value
            found.lines[target.id] = where
        elif target.id == "wandb_run_name":  # often contains a timestamp; without effect
            found.lines[target.id] = where
        else:
            found.problems.append(
                f"{where}: got a computed {target.id}; expected a literal, as config files are not "
                "executed; give the value itself"
            )
    return found


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate(node: ast.expr) -> Value | None:
    """Return the value of a literal, or of arithmetic on numbers such as 5 * 8."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            try:
                return _ARITHMETIC[type(node.op)](left, right)  # type: ignore[no-any-return]
            except (ArithmeticError, ValueError):
                return None
        return None
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, bool | int | float | str) else None


def unknown_names(settings: Settings, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return unknown names as problems if they look mistyped, else as notes.

    Returns
    -------
    tuple of two lists of str
        Problems, and notes.
    """
    problems, notes = [], []
    for name in settings.values.keys() - known:
        near = nearest_name(name, known, cutoff=0.75)
        where = f"{settings.lines.get(name, '')}: {name}"
        if near:
            problems.append(f"{where}: train.py has no such setting; did you mean {near}?")
        else:
            notes.append(f"{where}: train.py has no such setting; ignored")
    return problems, notes
