"""Extensions: modules of other packages that register models, optimizers, tasks and the rest.

The command line and the environment variable TJX_EXTENSIONS name the modules that are imported.
A preset or a run directory causes no import, since its author may be another person. Nothing here
imports JAX.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tjx_core import Problem

VARIABLE = "TJX_EXTENSIONS"

# Values that registered names extend. A name with a dot is the module that registers it.
FIELDS = (
    "task",
    "model.family",
    "model.attention_implementation",
    "optimizer.name",
    "schedule.name",
    "log.trackers",
    "log.metrics",
    "data.corpus",
    "rl.environment",
)

registered_tasks: dict[str, Callable[..., Any]] = {}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def register_task(name: str, open_task: Callable[..., Any]) -> None:
    """Add a task that ``--task`` selects by name.

    Parameters
    ----------
    name : str
        The name. Registering a name again replaces the entry, unless it is built in.
    open_task : callable
        From (config, progress) to (config, make_task), where ``make_task`` is called with a
        `tjx_trainer.tasks.task.DataShard` and returns a `tjx_trainer.tasks.task.Task`. The
        returned configuration may have values that depend on the data, such as
        ``model.vocab_size``. ``progress`` is a callable that receives the progress of data
        preparation, or None.

    Raises
    ------
    ValueError
        If the name is empty, or that of a built-in task.

    Examples
    --------
    >>> register_task("copying", lambda config, progress: (config, None))
    >>> registered_tasks.pop("copying") is not None
    True
    """
    from tjx_trainer.config.task_checks import NAMED_TASKS

    if name in ("", "none", *NAMED_TASKS):
        raise ValueError(
            f"name: got {name!r}; expected a name that is not built in (none, "
            f"{', '.join(NAMED_TASKS)}); choose that of the module"
        )
    registered_tasks[name] = open_task


def import_extensions(values: Mapping[str, str]) -> list[Problem]:
    """Import the modules that TJX_EXTENSIONS and values from the command line name.

    Parameters
    ----------
    values : mapping of str to str
        Values from the command line by dotted name; only `FIELDS` are read.

    Returns
    -------
    list of Problem
        The modules that do not exist. Other errors of an import propagate.
    """
    given = [(VARIABLE, module.strip()) for module in os.environ.get(VARIABLE, "").split(",")]
    given += [(f"--{name}", each) for name in FIELDS for each in _modules([values.get(name)])]
    problems = []
    for source, module in given:
        try:
            if module:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # missing in the module itself
                raise
            message = (
                f"got {module}; expected a module that can be imported ({error}); install its "
                "package, or add its folder to PYTHONPATH"
            )
            problems.append(Problem(source, message))
    return problems


def not_imported(raw: Any) -> list[str]:
    """Return the modules that a value of `FIELDS`, of any type, names and that are not imported."""
    return [module for module in _modules(raw if isinstance(raw, list) else [raw])
            if module not in sys.modules]  # fmt: skip


def _modules(values: Iterable[Any]) -> list[str]:
    """Return the names with a dot in values, which may be comma-separated lists."""
    texts = (value for value in values if isinstance(value, str))
    names = [name.strip() for text in texts for name in re.split("[,;]", text)]
    return [name for name in names if _DOTTED.fullmatch(name)]
