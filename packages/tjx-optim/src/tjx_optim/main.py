"""The command ``tjx-optim``: print and plot learning-rate schedules."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tjx_core import CommandParser
from tjx_optim.schedule_config import (
    SCHEDULES_BY_FIELD,
    ScheduleConfig,
    ScheduleName,
    schedule_names,
    uses_field,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments, by default those of the process; return 0.

    Raises
    ------
    SystemExit
        With code 2 after an error in the command line, and 0 after ``--help``.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        text = _schedule(parsed)
    except (ValueError, OSError) as error:
        parser.fail(error)
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="tjx-optim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="schedule")
    schedule = commands.add_parser(
        "schedule",
        help="learning rates of schedules, as a table and a plot",
        description="Print the learning rates of schedules. With several --name, each schedule "
        "uses those of the other flags that apply to it.",
    )
    descriptions = _field_descriptions(ScheduleConfig)
    for field in fields(ScheduleConfig):
        hint = get_type_hints(ScheduleConfig)[field.name]
        choices = schedule_names() if field.name == "name" else _literal_choices(hint)
        text = descriptions.get(field.name, "") + (f" ({', '.join(choices)})" if choices else "")
        options: dict[str, Any] = {"choices": choices} if choices else {"type": _converter(hint)}
        schedule.add_argument(
            f"--{field.name}",
            action="append" if field.name == "name" else "store",
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            help=f"{text} [{_text_of(field.default)}]".replace("%", "%%"),
            **options,
        )
    schedule.add_argument(
        "--max_steps", type=_number(int), required=True, metavar="STEPS", help="Steps of the run."
    )
    schedule.add_argument(
        "--learning_rate",
        type=_number(float),
        default=1.0,
        metavar="PEAK",
        help="Peak learning rate; 1 shows fractions of the peak. [1.0]",
    )
    schedule.add_argument("--picture", type=Path, metavar="FILE", help="Plot: .png, .pdf or .svg.")
    return parser


def _schedule(parsed: argparse.Namespace) -> str:
    """Return the table of the selected schedules, and write the plot if requested."""
    given = {f.name: getattr(parsed, f.name) for f in fields(ScheduleConfig) if f.name in parsed}
    configs = _configs(given)
    for config in configs.values():
        config.in_steps(parsed.max_steps)
    # The command needs no accelerator, which a training run may be using.
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tjx_optim.schedule_plot import plot_schedules

    run = {"learning_rate": parsed.learning_rate, "max_steps": parsed.max_steps}
    lines = _table(configs, **run)
    if parsed.picture is not None:
        plot_schedules(configs, parsed.picture, **run)
        lines.append(f"wrote {parsed.picture}")
    return "\n".join(lines)


def _configs(given: Mapping[str, Any]) -> dict[str, ScheduleConfig]:
    """Return a configuration per name, with the flags that apply to it.

    Flags that apply to none of the schedules are passed on, so that `ScheduleConfig` rejects them.
    """
    names: list[ScheduleName] = list(dict.fromkeys(given.get("name", [ScheduleConfig.name])))
    configs: dict[str, ScheduleConfig] = {}
    for name in names:
        used = {
            field: value
            for field, value in given.items()
            if uses_field(name, field) or not {*names} & {*SCHEDULES_BY_FIELD[field]}
        }
        configs[name] = ScheduleConfig(**{**used, "name": name})
    return configs


def _table(
    configs: Mapping[str, ScheduleConfig], *, learning_rate: float, max_steps: int
) -> list[str]:
    import numpy as np

    from tjx_optim.schedule_plot import learning_rates

    width = max(map(len, (*configs, "schedule")))
    lines = [f"{'schedule':<{width}}  {'at':<14}  {'step':>10}  learning rate"]
    for name, config in configs.items():
        warmup = config.in_steps(max_steps).warmup
        rows = {"start": 0, "end of warm-up": warmup, "middle": max_steps // 2}
        if not 0 < warmup < max_steps:
            del rows["end of warm-up"]
        rows["end"] = max_steps - 1
        rates = learning_rates(
            config,
            learning_rate=learning_rate,
            max_steps=max_steps,
            steps=np.array([*rows.values()]),
        )
        lines += [
            f"{name:<{width}}  {at:<14}  {step:>10}  {rate:.6g}"
            for (at, step), rate in zip(rows.items(), rates.tolist(), strict=True)
        ]
    return lines


def _literal_choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _converter(hint: Any) -> Callable[[str], Any]:
    """Return the conversion of a flag's text to the type of its field."""
    kinds = {hint, *get_args(hint)}
    if get_origin(hint) is tuple:
        kinds |= {*get_args(get_args(hint)[0])}
        return _numbers(_step_or_fraction if int in kinds else _number(float))
    return _number(int if int in kinds else float)


def _number(kind: type[int | float]) -> Callable[[str], int | float]:
    expected = "a whole number, such as 100" if kind is int else "a number, such as 0.1"

    def convert(word: str) -> int | float:
        try:
            return kind(word)
        except ValueError:
            raise ValueError(f"got {word!r}; expected {expected}") from None

    return convert


def _step_or_fraction(word: str) -> int | float:
    return int(word) if re.fullmatch(r"\s*[+-]?\d+\s*", word) else _number(float)(word)


def _numbers(convert: Callable[[str], int | float]) -> Callable[[str], tuple[int | float, ...]]:
    return lambda words: tuple(convert(word) for word in words.split(","))


def _field_descriptions(owner: type) -> dict[str, str]:
    """Return the one-line description of every field from the class's docstring."""
    return dict(re.findall(r"^(\w+)\n    (\S.*)$", inspect.getdoc(owner) or "", re.MULTILINE))


def _text_of(default: Any) -> str:
    return "none" if default is None or default == () else str(default)


if __name__ == "__main__":
    sys.exit(main())
