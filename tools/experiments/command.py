"""The command line that all experiments share: measure, write the JSON, make the page from it."""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.page import Page, to_markdown
from experiments.runs import Json, say
from matplotlib.figure import Figure

OUTPUT = Path("docs/experiments")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says.

    Attributes
    ----------
    seeds : int
        Runs of each arm that is compared; seeds 0, 1, ...
    smoke : bool
        Whether sizes are so small that the command is tried and nothing is found out.
    """

    seeds: int
    smoke: bool


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: how it is measured, told and drawn.

    Attributes
    ----------
    name : str
        Of its program, page, picture and JSON.
    measure : callable
        From the options to the results; may take minutes.
    page, draw : callable
        From the results to the page, and to the picture.
    seeds : int
        Where the command line does not say.
    """

    name: str
    measure: Callable[[Options], Json]
    page: Callable[[Json], Page]
    draw: Callable[[Json], Figure]
    seeds: int = 3


def main(experiment: Experiment, doc: str) -> None:
    """Run an experiment's command line; `doc` is its program's docstring."""
    given = _parse(experiment, doc)
    file = given.output / f"{experiment.name}.json"
    if not given.redraw:
        started = time.perf_counter()
        results = experiment.measure(Options(seeds=given.seeds, smoke=given.smoke))
        seconds = round(time.perf_counter() - started)
        given.output.mkdir(parents=True, exist_ok=True)
        write_json(file, {"about": about(experiment, given.seeds, seconds), **results})
    # Read again, so that the page holds nothing that the file lacks.
    results = read_json(file)
    figure = experiment.draw(results)
    figure.savefig(file.with_suffix(".png"), dpi=150)
    page = to_markdown(experiment.page(results), experiment.name, results["about"])
    file.with_suffix(".md").write_text(page, encoding="utf-8")
    say(f"wrote {file.with_suffix('.md')}")


def _parse(experiment: Experiment, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=experiment.seeds, help="runs of each arm")
    parser.add_argument("--output", type=Path, help=f"folder of the page; none is {OUTPUT}")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; wants --output")
    parser.add_argument("--redraw", action="store_true", help="make page and picture of the JSON")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: give at least 1")
    if given.output is None:
        if given.smoke:
            parser.error("--smoke finds nothing out: give --output FOLDER beside it")
        if not OUTPUT.is_dir():
            parser.error(f"there is no {OUTPUT} here: start at the root, or give --output FOLDER")
        given.output = OUTPUT
    return given


def about(experiment: Experiment, seeds: int, seconds: float) -> Json:
    """Return what a result depends on beside the program."""
    packages = ("jax", "optax", *(f"tjx-{name}" for name in ("nn", "optim", "data")))
    command = f"./pants run tools/experiments/{experiment.name}.py"
    return {
        "command": command + (f" -- --seeds {seeds}" if seeds != experiment.seeds else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": seconds,
        "machine": f"{os.cpu_count()} cores of {_processor()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(_version(name) for name in packages)]
        ),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # run from the sources
        return f"{package} from this checkout"


def write_json(file: Path, results: Json) -> None:
    """Write results, an entry of a list of records on a line of its own.

    Numbers have six digits; what is not finite is a string, since JSON has no form for it.
    """
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(_jsonable(item)) for item in value)
            text = f"[\n{lines}\n ]"
        else:
            text = json.dumps(_jsonable(value))
        parts.append(f' "{name}": {text}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def read_json(file: Path) -> Json:
    """Read what `write_json` wrote."""
    if not file.is_file():
        sys.exit(f"{file} is not there: run without --redraw first")
    found: Json = _numbers(json.loads(file.read_text(encoding="utf-8")))
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return float(f"{value:.6g}")
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
