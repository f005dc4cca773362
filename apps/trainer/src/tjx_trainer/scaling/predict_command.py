"""``trainer predict``: the loss of a larger run, predicted from small runs before it is made."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tjx_core import ConfigError, write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.arguments import parse_args, resolve
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.planning.plan_command import command_help, read_command_flags, split_command_flags
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.scaling.small_runs import MAX_RUNS, MIN_RUNS, read_small_runs, size_of
from tjx_trainer.sweep.grid import Grid, SweepRun
from tjx_trainer.sweep.launch import Launch, launch_run, run_all
from tjx_trainer.sweep.manifest import write_manifest

PREDICTION, PICTURE = "prediction.json", "prediction.png"
METRIC = "eval/loss"
_MOST_BYTES = 1 << 20
_PREFIX, _THEN = "predict.", "then"

_HELP = """\
usage: trainer predict --scale.depth N [--predict.dir DIR] [--then] [--config NAME_OR_PATH] ...

Trains small runs of the dial, fits a law to their losses, and predicts the loss of the run that the
command line describes, with an interval: prediction.json is written before that run is made. --then
makes it and adds its error. Repeat the same command to continue an interrupted prediction;
--dry_run prints the sizes of the runs.

"""


@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    """Flags of `trainer predict` besides those of the runs.

    Attributes
    ----------
    dir
        Folder of the prediction, with a folder per run; none: runs/predict-NAME, by the preset.
    runs
        Number of sizes of small runs, 5 to 8.
    seeds
        Runs of each size, with the run's seed and the following ones.
    law
        compute: a term of the training FLOPs; parametric: a term of parameters and one of tokens,
        which needs 7 sizes, half of them with a quarter of the tokens per parameter.
    confidence
        Probability of the interval.
    """

    dir: str | None = None
    runs: int = 6
    seeds: int = 1
    law: Literal["compute", "parametric"] = "compute"
    confidence: float = 0.95


def run(argv: Sequence[str], *, launch: Launch | None = None) -> int:
    """Train the small runs, predict, and make the large run with ``--then``.

    Parameters
    ----------
    argv : sequence of str
        The arguments after ``predict``.
    launch : callable, optional
        From the arguments of one run to its exit code; by default in a new process.

    Returns
    -------
    int
        0 if all runs finished; the exit code of the first that failed; 128 + the signal's number
        after a stop request.

    Raises
    ------
    SystemExit
        With code 2 after printing all mistakes.
    """
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(_HELP + command_help(PredictFlags, prefix=_PREFIX))
        sys.stdout.write("  --then                    Make the large run too. [false]\n")
        return ExitCode.FINISHED
    try:
        flags, rest, then = _read_flags(argv)
        parametric = flags.law == "parametric"
        grid, large = read_small_runs(rest, flags.runs, vary_tokens=parametric, seeds=flags.seeds)
        folder = Path(flags.dir or Path("runs") / f"predict-{grid.config.name}")
        sys.stderr.write(_plan(grid))
        if parse_args(rest).dry_run:
            return ExitCode.FINISHED
        write_manifest(folder, grid, rest, kind="predict")
    except ConfigError as error:
        exit_with_errors(error)
    launch = launch or launch_run
    code, _ = run_all(folder, grid.combinations, launch, command="predict", stop_at_failure=True)
    if code:
        return code
    try:
        entry = predict(folder, grid, flags)
        _report(folder, entry)
        if then:
            entry = _write(folder, {"started": _now(), **entry})
            code, _ = run_all(folder, [large], launch, command="predict")
            if not code:
                _report(folder, add_outcome(folder, large, entry))
    except ConfigError as error:
        exit_with_errors(error)
    return code


def _read_flags(argv: Sequence[str]) -> tuple[PredictFlags, list[str], bool]:
    """Split the arguments into the command's own flags, those of the runs, and ``--then``."""
    rest = [word for word in argv if word != f"--{_THEN}"]
    names = [_PREFIX + field.name for field in fields(PredictFlags)]
    own, others, problems = split_command_flags(rest, names)
    flags = PredictFlags(**read_command_flags(own, PredictFlags, problems, prefix=_PREFIX))
    fewest = MIN_RUNS if flags.law == "compute" else MIN_RUNS + 2
    if not fewest <= flags.runs <= MAX_RUNS:
        problems.append(
            f"--{_PREFIX}runs: got {flags.runs} with law {flags.law}; expected {fewest} to "
            f"{MAX_RUNS}; try 7"
        )
    if flags.seeds < 1:
        problems.append(f"--{_PREFIX}seeds: got {flags.seeds}; expected at least 1; try 3")
    if not 0 < flags.confidence < 1:
        problems.append(f"--{_PREFIX}confidence: got {flags.confidence}; expected (0, 1); try 0.95")
    if problems:
        raise ConfigError(problems)
    return flags, others, len(rest) < len(argv)


def _plan(grid: Grid) -> str:
    """Describe the small runs and their share of the large run."""
    small = [size_of(resolve(each.words)).flops for each in grid.combinations]
    large = size_of(grid.config).flops
    return (
        f"predict        {len(small)} runs of {min(small):.3g} to {max(small):.3g} FLOPs, together "
        f"{sum(small) / large:.1%} of the large run of {large:.3g}\n"
    )


def predict(folder: Path, grid: Grid, flags: PredictFlags) -> dict[str, Any]:
    """Predict the loss of the large run, and write prediction.json.

    A prediction stays as it is once the large run has been started.

    Parameters
    ----------
    folder : Path
        Folder of the prediction, whose small runs are finished.
    grid : Grid
        The small runs; its configuration is that of the large run.
    flags : PredictFlags
        Law and confidence.

    Returns
    -------
    dict
        Content of prediction.json: the time of writing, ``target`` and ``runs`` with parameters,
        tokens, FLOPs and losses, ``law`` with its parameters, ``loss``, ``low`` and ``high``.

    Raises
    ------
    ConfigError
        If there are too few runs, or the folder's large run has another prediction.
    """
    import numpy as np

    from tjx_trainer.scaling.laws import predict_loss
    from tjx_trainer.sweep.results import read_results

    listed = [{"name": e.name, "settings": dict(e.settings)} for e in grid.combinations]
    losses = {each.name: each.value for each in read_results(folder, listed, METRIC)}
    sizes = [size_of(resolve(each.words)) for each in grid.combinations]
    target = size_of(grid.config)
    runs = [
        {"name": each.name, **asdict(size), "flops": size.flops, "loss": losses[each.name]}
        for each, size in zip(grid.combinations, sizes, strict=True)
    ]
    names = ("flops",) if flags.law == "compute" else ("params", "tokens")
    entry: dict[str, Any] = {
        "written": _now(),
        "target": {**asdict(target), "flops": target.flops},
        "features": list(names),
        "confidence": flags.confidence,
        "runs": runs,
    }
    file = folder / PREDICTION
    if file.exists():
        before = read_json_object(file, _MOST_BYTES)
        if all(before[key] == entry[key] for key in entry if key != "written"):
            return before
        if "started" in before:
            raise ConfigError([
                f"--{_PREFIX}dir {folder}: its large run has been started with the prediction of "
                f"{before['written']}, for other runs or another law; give another --{_PREFIX}dir"
            ])  # fmt: skip
    found = predict_loss(
        np.array([[each[name] for name in names] for each in runs], float),
        np.array([each["loss"] for each in runs]),
        np.array([entry["target"][name] for name in names], float),
        confidence=flags.confidence,
    )
    return _write(folder, entry | asdict(found))


def add_outcome(folder: Path, large: SweepRun, entry: dict[str, Any]) -> dict[str, Any]:
    """Add the loss of the finished large run to prediction.json.

    Parameters
    ----------
    folder : Path
        Folder of the prediction.
    large : SweepRun
        The large run.
    entry : dict
        Content of prediction.json.

    Returns
    -------
    dict
        The content with ``measured``, ``error`` (relative to the measured loss) and ``inside``,
        whether the interval contains it.
    """
    from tjx_trainer.sweep.results import read_results

    (result,) = read_results(
        folder, [{"name": large.name, "settings": dict(large.settings)}], METRIC
    )
    outcome = {
        "measured": result.value,
        "error": entry["loss"] / result.value - 1,
        "inside": entry["low"] <= result.value <= entry["high"],
    }
    return _write(folder, {**entry, **outcome})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    write_atomically(folder / PREDICTION, json.dumps(entry, indent=2) + "\n")
    return entry


def _report(folder: Path, entry: dict[str, Any]) -> None:
    """Print the prediction and its outcome, and draw them."""
    from tjx_trainer.scaling.plots import draw_prediction

    law = entry["law"]
    lines = [
        f"{each['name']:<24}{each['flops']:>10.3g} FLOPs  loss {each['loss']:.4f}"
        for each in entry["runs"]
    ]
    exponents = ", ".join(
        f"{name}^-{exponent:.3f}"
        for name, exponent in zip(entry["features"], law["exponents"], strict=True)
    )
    lines += [
        f"law            {law['floor']:.4f} + terms of {exponents}; runs deviate by "
        f"{law['noise']:.2%}",
        f"prediction     {entry['loss']:.4f}, with {entry['confidence']:.0%} in "
        f"{entry['low']:.4f} to {entry['high']:.4f}, at {entry['target']['flops']:.3g} FLOPs",
        f"written        {entry['written']}, {folder / PREDICTION}",
    ]
    if "measured" in entry:
        where = "inside" if entry["inside"] else "outside"
        lines.append(
            f"measured       {entry['measured']:.4f}: the prediction is off by "
            f"{entry['error']:+.2%}, the loss {where} of the interval"
        )
    draw_prediction(folder / PICTURE, entry)
    sys.stdout.write("\n".join([*lines, f"{folder / PICTURE}"]) + "\n")
