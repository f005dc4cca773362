"""Command line shared by all experiments: measure, write the JSON, generate the page."""

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.page import Page, to_markdown
from experiments.runs import Flags, Json, say, seconds_before
from matplotlib.figure import Figure

OUTPUT = Path("docs/experiments")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options of an experiment.

    Attributes
    ----------
    seeds : int
        Number of runs per arm; seeds 0, 1, ...
    smoke : bool
        Whether to use tiny sizes that only test the command.
    data : mapping from str to str
        Trainer flags of the text, for an experiment that needs one.
    journal : Path
        File of finished runs, from which an interrupted experiment continues.
    file : Path
        File of the results, which may exist.
    """

    seeds: int
    smoke: bool
    data: Flags
    journal: Path
    file: Path


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: functions that measure it, build its page and draw its figure.

    Attributes
    ----------
    name : str
        Stem of its program, page, figure and JSON.
    measure : callable
        Maps the options to the results; may take minutes.
    page, draw : callable
        Map the results to the page and to the figure.
    seeds : int
        Default of --seeds.
    text_flag : str or None
        Flag of the text that it trains on, passed to the trainer; none: it has a corpus.
    """

    name: str
    measure: Callable[[Options], Json]
    page: Callable[[Json], Page]
    draw: Callable[[Json], Figure]
    seeds: int = 3
    text_flag: str | None = None


def main(experiment: Experiment, doc: str) -> None:
    """Parse the command line and run an experiment; `doc` is the docstring of its program."""
    given = _parse(experiment, doc)
    file = given.output / f"{experiment.name}.json"
    if not given.redraw:
        data = {}
        if experiment.text_flag is not None:
            data[experiment.text_flag.removeprefix("--")] = given.text
        journal = file.with_suffix(".runs.jsonl")
        started = time.perf_counter() - seconds_before(journal)
        given.output.mkdir(parents=True, exist_ok=True)
        results = experiment.measure(
            Options(seeds=given.seeds, smoke=given.smoke, data=data, journal=journal, file=file)
        )
        seconds = round(time.perf_counter() - started)
        write_json(file, {"about": about(experiment, given, seconds), **results})
        journal.unlink(missing_ok=True)
    # Read the file back, so that the page depends on the JSON alone.
    results = read_json(file)
    figure = experiment.draw(results)
    figure.savefig(file.with_suffix(".png"), dpi=150)
    page = to_markdown(experiment.page(results), experiment.name, results["about"])
    file.with_suffix(".md").write_text(page, encoding="utf-8")
    say(f"wrote {file.with_suffix('.md')}")


def _parse(experiment: Experiment, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=experiment.seeds, help="number of runs per arm"
    )
    if experiment.text_flag is not None:
        parser.add_argument(experiment.text_flag, dest="text", help="as for the trainer")
    parser.add_argument("--output", type=Path, help=f"output folder (default: {OUTPUT})")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; requires --output")
    parser.add_argument("--redraw", action="store_true", help="regenerate from the JSON")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds: got {given.seeds}; expected at least 1")
    if experiment.text_flag is not None and not (given.text or given.redraw):
        parser.error(f"{experiment.text_flag}: got none; expected files, such as 'books/*.txt'")
    if given.output is None:
        if given.smoke:
            parser.error("--smoke: got no --output; expected a folder for the test results")
        if not OUTPUT.is_dir():
            parser.error(
                f"no {OUTPUT} in this folder; run from the repository root or give --output"
            )
        given.output = OUTPUT
    return given


def about(experiment: Experiment, given: argparse.Namespace, seconds: float) -> Json:
    """Return the metadata of a run: command, date, machine, versions and duration."""
    packages = ("jax", "optax", *(f"tjx-{name}" for name in ("nn", "optim", "data")))
    words = [f"./pants run tools/experiments/{experiment.name}.py"]
    flags = [] if given.seeds == experiment.seeds else [f"--seeds {given.seeds}"]
    if experiment.text_flag is not None:
        flags.append(f"{experiment.text_flag} {shlex.quote(given.text)}")
    return {
        "command": " ".join([*words, *(["--"] if flags else []), *flags]),
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
    """Write results as JSON, with one line per record of a list.

    Numbers have six significant digits; non-finite numbers are strings, as JSON has none.
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
    """Read a file written by `write_json`."""
    if not file.is_file():
        sys.exit(f"--redraw: {file} not found; run without --redraw first")
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
