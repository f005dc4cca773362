"""Commands and measured figures in the guides, and their checks without running anything.

A fenced block without a language holds commands. In a block with prompts, only lines after `$ ` are
commands, the others their output. Output alone is a block of the language `text`.

Figures that come from a file of results are listed after them, in a comment of the form

    <!-- measured: FILE
    FIGURE = path.to.value / divisor
    -->

`*` in a path is each element of a list, whose median counts; the divisor is optional.
"""

import importlib.util
import itertools
import json
import re
import shlex
import statistics
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tjx_ckpt.cli.command_line
import tjx_data.main
import tjx_eval.commands.nanogpt
import tjx_eval.main
import tjx_metrics.main
import tjx_optim.main
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.command_line import parse
from tjx_trainer.cli.help_page import HELP_FLAGS
from tjx_trainer.cli.nanogpt import translate
from tjx_trainer.pipeline import pipeline_command
from tjx_trainer.planning.plan_command import (
    ParameterFlags,
    PlanFlags,
    read_flags,
    split_command_flags,
)
from tjx_trainer.scaling import predict_command
from tjx_trainer.sweep.grid import read_grid
from tjx_trainer.sweep.sweep_command import SweepFlags

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "docs/experiments/*.md",
        "*/tjx-*/README.md",
        "apps/*/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\./pants (?:run|test)|tjx-[a-z]+) [^`]+)`")
# Values of names in sentences, such as `plan --chip NAME`.
PLACEHOLDERS = {
    "--chip NAME": "--chip h100", "--step N": "--step 1", "STEP STEP": "1 2",
    "experiments/NAME": "experiments/precision", "--base REVISION": "--base main",
    "export --format orbax": "export RUN --format orbax --out FOLDER",
}  # fmt: skip
ASSIGNMENT = re.compile(r"[A-Z_]+=")
PANTS_GOALS = {"test", "lint", "fmt", "fix", "check", "package"}
# Programs that are not part of tjx; their arguments are not checked.
OTHER_PROGRAMS = (
    "bash", "cd", "curl", "export", "llama-completion", "llama-server", "ollama", "pre-commit",
    "pytest",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: Path
    text: str

    @property
    def words(self) -> list[str]:
        """The words without comments, and without variables before the program."""
        text = re.sub(r"\[(--[^]]+)\]", r"\1", self.text)
        for name, value in PLACEHOLDERS.items():
            text = text.replace(name, value)
        words = shlex.split(text, comments=True)
        while words and ASSIGNMENT.match(words[0]):
            words.pop(0)
        # A sentence may name a command without its arguments, such as `tjx-data inspect`.
        return [*words, "--help"] if len(words) == 2 and words[0] in CHECKS else words

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page: those of its blocks, then those in its sentences."""
    text = page.read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        if language:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        has_prompts = any(line.startswith("$ ") for line in lines)
        for line in lines:
            if line.startswith("$ ") or (line.strip() and not has_prompts):
                yield Command(page, " ".join(line.removeprefix("$ ").split("\n")))
    rest = BLOCK.sub("", text)
    for found in [*INLINE.findall(rest), *re.findall(r"^    (\./pants .*)$", rest, re.MULTILINE)]:
        yield Command(page, " ".join(found.split()))


def check(words: Sequence[str]) -> None:
    """Parse a command as its program does; raise an error if the program would."""
    program, *rest = words
    if program in ("./pants", "pants"):
        _check_pants(rest)
    elif program == "mpirun":
        check(rest[rest.index("tjx-train") :])
    elif program == "python" and rest[0] == "-m":
        found = importlib.util.find_spec(f"{rest[1]}.__main__")
        assert found is not None, rest[1]
        assert found.origin is not None, rest[1]
        _check_script(Path(found.origin), rest[2:])
    elif program == "python":
        _check_script(ROOT / rest[0], rest[1:])
    elif program == "pip":
        _check_pip(rest)
    elif program not in OTHER_PROGRAMS:
        CHECKS[program](rest)


def _check_pants(words: Sequence[str]) -> None:
    while words[0].startswith("--"):
        name, _, value = words[0].partition("=")
        assert name == "--pants-config-files", name
        assert (ROOT / value).is_file(), value
        words = words[1:]
    goals = [word for word in words[: len(words) - 1] if word in PANTS_GOALS]
    if words[0] != "run":
        assert goals, words
        assert goals == list(words[: len(goals)]), words
        targets = [word for word in words[len(goals) :] if word.endswith("::")]
        assert targets
        assert all((ROOT / target.removesuffix("::")).is_dir() for target in targets), targets
        return
    target, *rest = words[1:]
    assert not rest or rest.pop(0) == "--", words
    apps = {"apps/trainer": "tjx-train", "apps/eval": "tjx-eval", METRICS: "tjx-metrics"}
    if target in apps:
        CHECKS[apps[target]](rest)
    else:
        _check_script(ROOT / target, rest)


def _check_script(script: Path, words: Sequence[str]) -> None:
    """Check that a script exists and names the flags."""
    source = script.read_text(encoding="utf-8")
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    missing = [flag for flag in flags if f'"{flag}"' not in source]
    assert not missing or "sys.argv[1:]" in source, f"{script.name}: no flags {missing}"


def _check_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        name, _, extras = word.removesuffix("]").removeprefix("./").partition("[")
        if not re.search(r"(^|/)(tjx-|trainer$|eval$)", name):
            continue
        folder = name if "/" in name else _folder(name)
        for project in _braces(folder):
            table = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]
            known = set(table.get("optional-dependencies", {}))
            assert set(filter(None, extras.split(","))) <= known, f"{project}: {extras}"


def _folder(name: str) -> str:
    short = name.removeprefix("tjx-")
    return f"apps/{short}" if short in ("trainer", "eval") else f"packages/{name}"


def _braces(path: str) -> list[str]:
    """Expand `a{b,c}` as a shell does."""
    head, brace, tail = path.partition("{")
    return [head + choice for choice in tail.rstrip("}").split(",")] if brace else [path]


def _check_train(words: Sequence[str]) -> None:
    first, rest = (words[0], words[1:]) if words else ("", ())
    if first == "plan":
        read_flags(rest, PlanFlags)
    elif first == "parameters":
        read_flags(rest, ParameterFlags)
    elif first == "sweep":
        own = [f"sweep.{field.name}" for field in fields(SweepFlags)]
        _, of_runs, problems = split_command_flags(rest, [*own, "summary"])
        assert not problems, problems
        read_grid(of_runs)
    elif first == "predict":
        dry = [word for word in rest if word != "--dry_run"]
        assert predict_command.run([*dry, "--dry_run"]) == 0
    elif first == "pipeline":
        assert pipeline_command.run(rest, launch=lambda _: 1) == 1, "the first stage was to start"
    elif translate.MODE in words:
        resolve(translate.translate(words).words)
    elif HELP_FLAGS & set(words) or "--version" in words:
        parse(words)
    else:
        resolve(words)


def _check_eval(words: Sequence[str]) -> None:
    given = list(words)
    if tjx_eval.commands.nanogpt.FLAG in given:
        given = tjx_eval.commands.nanogpt.translate(given)
    for word in itertools.takewhile(lambda word: not word.startswith("--"), given[1:]):
        if word != "quikstart":
            Path(word).mkdir(parents=True, exist_ok=True)
            (Path(word) / "config.json").touch()  # of a model that is there
    tjx_eval.main.parse(given)


CHECKS: dict[str, Callable[[Sequence[str]], Any]] = {
    "tjx-train": _check_train,
    "tjx-eval": _check_eval,
    "tjx-ckpt": lambda words: tjx_ckpt.cli.command_line.make_parser().parse_args(words),
    "tjx-data": lambda words: tjx_data.main.make_parser().parse_args(words),
    "tjx-metrics": lambda words: tjx_metrics.main.parser().read(words),
    "tjx-optim": tjx_optim.main.main,
}
METRICS = "packages/tjx-metrics/src/tjx_metrics/main.py"


@dataclass(frozen=True)
class Figure:
    """A figure of a page, and the value of a file of results that it rounds."""

    page: Path
    text: str
    value: float

    @property
    def is_right(self) -> bool:
        """Whether the figure is the value, rounded to the digits shown."""
        number = re.findall(r"\d[\d,]*\.?\d*", self.text)[-1].replace(",", "")
        digits = len(number.partition(".")[2])
        return abs(self.value - float(number)) <= 0.5001 * 10.0**-digits

    @property
    def is_shown(self) -> bool:
        """Whether the page has the figure outside of comments."""
        text = re.sub(r"<!--.*?-->", "", self.page.read_text(encoding="utf-8"), flags=re.DOTALL)
        return self.text in text


def figures(page: Path) -> Iterator[Figure]:
    """Yield the figures that the comments of a page list."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for file, lines in re.findall(r"<!-- measured: (\S+)\n(.*?)\n-->", text, re.DOTALL):
        results = json.loads((ROOT / file).read_text(encoding="utf-8"))
        for line in lines.splitlines():
            shown, _, source = line.partition(" = ")
            path, _, divisor = source.partition(" / ")
            values = [float(value) for value in _values(results, path.split("."))]
            yield Figure(page, shown, statistics.median(values) / float(divisor or 1))


def _values(node: Any, path: Sequence[str]) -> list[Any]:
    if not path:
        return [node]
    name, *rest = path
    if name == "*":
        return [value for each in node for value in _values(each, rest)]
    return _values(node[int(name) if isinstance(node, list) else name], rest)
