"""The command ``tjx-optim``: look at a learning-rate schedule before training with it."""

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from tjx_optim.schedule_config import SCHEDULES_BY_FIELD, ScheduleConfig, ScheduleName


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status (0, or 2 for a mistake of the user's)."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    try:
        if unknown:
            raise ValueError("\n".join(_unknown(unknown)))
        if parsed.max_steps is None:
            raise ValueError("--max_steps is missing: give the steps of the run, such as 1000")
        text = _schedule(parsed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(text + "\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in its lines alone, as the trainer does, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        lines = [f"tjx-optim: {line}" for line in message.splitlines()]
        self.exit(2, "\n".join([*lines, "`tjx-optim schedule --help` lists every flag."]) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tjx-optim", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="schedule")
    schedule = commands.add_parser(
        "schedule",
        help="the learning rates of a schedule, as a table and a picture",
        description="Show the learning rates of schedules. Several --name are shown together, "
        "each with those of the other flags that it heeds.",
        allow_abbrev=False,
    )
    about = _lines_of(ScheduleConfig)
    for field in fields(ScheduleConfig):
        hint = get_type_hints(ScheduleConfig)[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        text = about.get(field.name, "") + (f" ({', '.join(choices)})" if choices else "")
        schedule.add_argument(
            f"--{field.name}",
            action="append" if field.name == "name" else "store",
            type=_reader(hint),
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            help=f"{text} [{_text_of(field.default)}]".replace("%", "%%"),
        )
    schedule.add_argument(
        "--max_steps", type=_number(int), metavar="STEPS", help="Steps of the run; needed."
    )
    schedule.add_argument(
        "--learning_rate",
        type=_number(float),
        default=1.0,
        metavar="PEAK",
        help="Peak learning rate; 1 shows fractions of the peak. [1.0]",
    )
    schedule.add_argument(
        "--picture", type=Path, metavar="FILE", help="Draw them: .png, .pdf or .svg."
    )
    return parser


def _schedule(parsed: argparse.Namespace) -> str:
    """Return the table of the schedules asked for, and draw them where a picture is."""
    given = {f.name: getattr(parsed, f.name) for f in fields(ScheduleConfig) if f.name in parsed}
    configs = _configs(given)
    for config in configs.values():
        config.in_steps(parsed.max_steps)
    # A command that draws a line leaves accelerators, and those who train on them, alone.
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tjx_optim.schedule_plot import plot_schedules

    run = {"learning_rate": parsed.learning_rate, "max_steps": parsed.max_steps}
    lines = _table(configs, **run)
    if parsed.picture is not None:
        plot_schedules(configs, parsed.picture, **run)
        lines.append(f"drawn: {parsed.picture}")
    return "\n".join(lines)


def _configs(given: Mapping[str, Any]) -> dict[str, ScheduleConfig]:
    """Make the configuration of each name, of what it heeds; nothing given is lost on all."""
    names: list[ScheduleName] = list(dict.fromkeys(given.get("name", [ScheduleConfig.name])))
    configs: dict[str, ScheduleConfig] = {}
    for name in names:
        heeded = {
            field: value
            for field, value in given.items()
            # What nobody heeds is left to the configuration to refuse.
            if name in SCHEDULES_BY_FIELD.get(field, (name,))
            or not {*names} & {*SCHEDULES_BY_FIELD[field]}
        }
        configs[name] = ScheduleConfig(**{**heeded, "name": name})
    return configs


def _table(
    configs: Mapping[str, ScheduleConfig], *, learning_rate: float, max_steps: int
) -> list[str]:
    import numpy as np

    from tjx_optim.schedules import learning_rates

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


def _reader(hint: Any) -> Callable[[str], Any]:
    """Return what reads a flag's word as a value of the field's type."""
    if get_origin(hint) is Literal:
        return _choice(get_args(hint))
    kinds = {hint, *get_args(hint)}
    if get_origin(hint) is tuple:
        kinds |= {*get_args(get_args(hint)[0])}
        return _numbers(_step_or_fraction if int in kinds else _number(float))
    return _number(int if int in kinds else float)


def _choice(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word not in allowed:
            near = _nearest(word, allowed)
            raise argparse.ArgumentTypeError(
                f"{word!r} must be one of {', '.join(allowed)}"
                + (near and f"; did you mean {near}?")
            )
        return word

    return read


def _number(kind: type[int | float]) -> Callable[[str], int | float]:
    expected = "a whole number, such as 100" if kind is int else "a number, such as 0.1"

    def read(word: str) -> int | float:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} was given, expected {expected}") from None

    return read


def _step_or_fraction(word: str) -> int | float:
    return int(word) if re.fullmatch(r"\s*[+-]?\d+\s*", word) else _number(float)(word)


def _numbers(
    read_one: Callable[[str], int | float],
) -> Callable[[str], tuple[int | float, ...]]:
    return lambda words: tuple(read_one(word) for word in words.split(","))


def _nearest(word: str, allowed: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.replace("-", "_"), list(allowed), n=1, cutoff=0.4)
    return found[0] if found else ""


def _unknown(words: Sequence[str]) -> list[str]:
    """Say of each word that no flag takes what was probably meant."""
    flags = [*(field.name for field in fields(ScheduleConfig)), "max_steps", "learning_rate"]
    problems = []
    follows_unknown_flag = False
    for word in words:
        if word.startswith("--"):
            flag, has_equals, _ = word.partition("=")
            near = _nearest(flag.lstrip("-"), [*flags, "picture"])
            problems.append(
                f"{flag}: there is no such flag" + (near and f"; did you mean --{near}?")
            )
            follows_unknown_flag = not has_equals
        elif not follows_unknown_flag:
            problems.append(f"{word}: this belongs to no flag; every value follows its flag")
        else:
            follows_unknown_flag = False
    return problems


def _lines_of(owner: type) -> dict[str, str]:
    """Return the one line of every field from the class's docstring."""
    return dict(re.findall(r"^(\w+)\n    (\S.*)$", inspect.getdoc(owner) or "", re.MULTILINE))


def _text_of(default: Any) -> str:
    return "none" if default is None or default == () else str(default)


if __name__ == "__main__":
    sys.exit(main())
