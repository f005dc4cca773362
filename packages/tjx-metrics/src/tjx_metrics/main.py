"""The command `tjx-metrics`: pictures, a comparison and a page of recorded runs."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tjx_metrics.plotting.run_data import RunData

EXIT_USER_ERROR = 2
_WIDE = 160  # columns of a table that goes to a file


class _Parser(argparse.ArgumentParser):
    """Argparse, whose mistakes are one sentence with the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave."""
        known = {*_COMMANDS, *_flags(parser())}
        wrong = [word.strip("',:") for word in message.split()]
        near = [
            right
            for word in wrong
            if word not in known
            for right in difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
        ]
        hint = f"; did you mean {near[0]}?" if near else f"; `{self.prog} --help` lists all"
        sys.stderr.write(f"error: {message.removeprefix('argument COMMAND: ')}{hint}\n")
        raise SystemExit(EXIT_USER_ERROR)


_COMMANDS = ("plot", "compare", "report")


def _flags(top: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in top._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for command in action.choices.values() for flag in _flags(command)}
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = _Parser(prog="tjx-metrics", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plot = commands.add_parser("plot", help="all pictures that runs have records for")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="run folders or metrics files")
    plot.add_argument("--out", metavar="FOLDER", help="default: plots/ in the run's folder")
    plot.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="default png")
    plot.add_argument("--metric", nargs="+", metavar="NAME", help="only curves of these metrics")
    _add_view(plot)

    compare = commands.add_parser("compare", help="a table of runs, and their losses in a picture")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders or metrics files")
    compare.add_argument("--out", metavar="FILE", help="the picture; default compare_loss.png")
    _add_view(compare)

    report = commands.add_parser("report", help="a page of HTML that needs nothing else")
    report.add_argument("run", metavar="RUN", help="a run folder or metrics file")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run's folder")
    return top


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--x", choices=("steps", "tokens", "hours"), default="steps", help="x axis; default steps"
    )
    command.add_argument(
        "--smooth", type=_positive, metavar="N",
        help="records that are averaged; default 1/25 of the run for losses, 1 is no smoothing",
    )  # fmt: skip
    command.add_argument("--log_x", action="store_true", help="logarithmic x axis")
    command.add_argument("--log_y", action="store_true", help="logarithmic y axis of curves")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 where the user can mend what is wrong."""
    arguments = parser().parse_args(argv)
    # NumPy and matplotlib take their time: a wrong command line is answered before, and a wrong
    # folder before matplotlib is there.
    from tjx_metrics.plotting.run_data import RunDataError, open_runs

    try:
        if arguments.command == "report":
            return write_report(open_runs(arguments.run)[0], arguments)
        command = write_pictures if arguments.command == "plot" else compare_runs
        return command(open_runs(arguments.runs), arguments)
    except (RunDataError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR


def write_pictures(runs: "list[RunData]", arguments: argparse.Namespace) -> int:
    """Run `plot`: write each picture, print its path, and say what cannot be drawn."""
    from tjx_metrics.plotting.curves import PlotOptions, check_metric, metric_figure
    from tjx_metrics.plotting.run_data import NoDataError
    from tjx_metrics.plotting.run_plots import Plot, run_plots
    from tjx_metrics.plotting.style import save

    view = PlotOptions(arguments.x, arguments.smooth, arguments.log_x, arguments.log_y)
    for metric in arguments.metric or ():
        check_metric(runs, metric)
    if arguments.metric:
        pictures = [
            Plot(name.replace("/", "_"), name, partial(metric_figure, runs, name, view))
            for name in arguments.metric
        ]
    else:
        for run in runs:  # what the axis needs is missed once, not by each picture
            run.along(run.series("train/loss")[0], view.x)
        pictures = list(run_plots(runs, view))
    folder = Path(arguments.out) if arguments.out else _folder_of(runs) / "plots"
    written = 0
    for picture in pictures:
        try:
            figure = picture.draw()
        except NoDataError as error:
            sys.stderr.write(f"no picture {picture.name}: {error}\n")
            continue
        path = folder / f"{picture.name}.{arguments.format}"
        save(figure, path)
        sys.stdout.write(f"{path}\n")
        written += 1
    return 0 if written else EXIT_USER_ERROR


def compare_runs(runs: "list[RunData]", arguments: argparse.Namespace) -> int:
    """Run `compare`: print the tables, and write the losses as one picture."""
    from rich.console import Console
    from rich.text import Text

    from tjx_metrics.plotting.curves import PlotOptions, loss_figure
    from tjx_metrics.plotting.run_data import RunDataError
    from tjx_metrics.plotting.style import check_output_path, save
    from tjx_metrics.report.comparison import comparison_table, difference_table
    from tjx_metrics.report.summary import config_of

    try:
        path = check_output_path(arguments.out or "compare_loss.png")
    except ValueError as error:
        raise RunDataError(str(error).replace("out_path=", "--out ")) from error
    view = PlotOptions(arguments.x, arguments.smooth, arguments.log_x, arguments.log_y)
    figure = loss_figure(runs, view)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE, file=sys.stdout)
    console.print(comparison_table(runs))
    settings = difference_table(runs)
    if settings.row_count:
        console.print("\nWhat differs in the settings:")
        console.print(settings)
    else:
        console.print("\nNo recorded setting differs.")
    for run in runs:
        if not config_of(run):
            console.print(Text(f"{run.name}: its settings were not recorded."))
    save(figure, path)
    sys.stdout.write(f"\n{path}\n")
    return 0


def write_report(run: "RunData", arguments: argparse.Namespace) -> int:
    """Run `report`: write the page, and print its path."""
    from tjx_metrics.atomic import write_atomically
    from tjx_metrics.plotting.run_data import RunDataError
    from tjx_metrics.report.page import report_page

    path = Path(arguments.out) if arguments.out else _folder_of([run]) / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise RunDataError(f"--out {path}: must end in .html")
    write_atomically(path, report_page(run).encode())
    sys.stdout.write(f"{path}\n")
    return 0


def _folder_of(runs: "list[RunData]") -> Path:
    """Return the folder of a single run, and where one is for several."""
    return runs[0].path.parent if len(runs) == 1 else Path()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
