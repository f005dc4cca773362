"""The command `tjx-metrics`: plots, comparisons and HTML reports of recorded runs."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tjx_core import CommandParser, ConfigError, printable, whole_number, write_atomically

if TYPE_CHECKING:
    from tjx_metrics.plotting.run_data import RunData

EXIT_USER_ERROR = 2
_WIDE = 160  # columns of a table written to a file or pipe


def parser() -> CommandParser:
    """Return the command-line parser."""
    top = CommandParser(prog="tjx-metrics", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plot = commands.add_parser("plot", help="all plots that runs have records for")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="run directories or metrics files")
    plot.add_argument("--out", metavar="DIR", help="default: plots/ in the run directory")
    plot.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="default png")
    plot.add_argument("--metric", nargs="+", metavar="NAME", help="only curves of these metrics")
    _add_plot_options(plot)

    compare = commands.add_parser("compare", help="a table of runs, and a plot of their losses")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run directories or metrics files")
    compare.add_argument("--out", metavar="FILE", help="the plot; default compare_loss.png")
    _add_plot_options(compare)

    report = commands.add_parser("report", help="a self-contained HTML page")
    report.add_argument("run", metavar="RUN", help="a run directory or metrics file")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run directory")
    return top


def _add_plot_options(command: CommandParser) -> None:
    command.add_argument(
        "--x", choices=("steps", "tokens", "hours"), default="steps", help="x axis; default steps"
    )
    command.add_argument(
        "--smooth", type=whole_number(1), metavar="N",
        help="records per moving average; default 1/25 of the run for losses, 1: no smoothing",
    )  # fmt: skip
    command.add_argument("--log_x", action="store_true", help="logarithmic x axis")
    command.add_argument("--log_y", action="store_true", help="logarithmic y axis of curves")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after a user error."""
    try:
        arguments = parser().read(argv)
    except ConfigError as error:
        sys.stderr.write(printable("".join(f"error: {problem}\n" for problem in error.problems)))
        return EXIT_USER_ERROR
    # Imported late, so that command-line errors are reported before NumPy is imported, and wrong
    # paths before matplotlib is imported.
    from tjx_metrics.plotting.run_data import RunDataError, open_runs

    try:
        if arguments.command == "report":
            return write_report(open_runs(arguments.run)[0], arguments)
        command = write_plots if arguments.command == "plot" else compare_runs
        return command(open_runs(arguments.runs), arguments)
    except (RunDataError, OSError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return EXIT_USER_ERROR


def write_plots(runs: "list[RunData]", arguments: argparse.Namespace) -> int:
    """Run `plot`: write each plot, print its path, and report plots without records."""
    from tjx_metrics.plotting.curves import PlotOptions, check_metric, metric_figure
    from tjx_metrics.plotting.run_data import NoDataError
    from tjx_metrics.plotting.run_plots import Plot, run_plots
    from tjx_metrics.plotting.style import save

    options = PlotOptions(arguments.x, arguments.smooth, arguments.log_x, arguments.log_y)
    for metric in arguments.metric or ():
        check_metric(runs, metric)
    if arguments.metric:
        plots = [
            Plot(name.replace("/", "_"), name, partial(metric_figure, runs, name, options))
            for name in arguments.metric
        ]
    else:
        for run in runs:  # report missing x values once instead of per plot
            run.along(run.series("train/loss")[0], options.x)
        plots = list(run_plots(runs, options))
    folder = Path(arguments.out) if arguments.out else _folder_of(runs) / "plots"
    written = 0
    for plot in plots:
        try:
            figure = plot.draw()
        except NoDataError as error:
            sys.stderr.write(f"no plot {plot.name}: {error}\n")
            continue
        path = folder / f"{plot.name}.{arguments.format}"
        save(figure, path)
        sys.stdout.write(f"{path}\n")
        written += 1
    return 0 if written else EXIT_USER_ERROR


def compare_runs(runs: "list[RunData]", arguments: argparse.Namespace) -> int:
    """Run `compare`: print the tables, and plot the losses of all runs."""
    from rich.console import Console
    from rich.text import Text

    from tjx_metrics.plotting.curves import PlotOptions, loss_figure
    from tjx_metrics.plotting.run_data import RunDataError
    from tjx_metrics.plotting.style import check_output_path, save
    from tjx_metrics.report.comparison import comparison_table, difference_table
    from tjx_metrics.report.summary import config_of

    try:
        path = check_output_path(arguments.out or "compare_loss.png", "--out")
    except ValueError as error:
        raise RunDataError(str(error)) from error
    options = PlotOptions(arguments.x, arguments.smooth, arguments.log_x, arguments.log_y)
    figure = loss_figure(runs, options)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE, file=sys.stdout)
    console.print(comparison_table(runs))
    differing = difference_table(runs)
    if differing.row_count:
        console.print("\nDifferences in the config:")
        console.print(differing)
    else:
        console.print("\nNo recorded config value differs.")
    for run in runs:
        if not config_of(run):
            console.print(Text(f"{run.name}: its config was not recorded."))
    save(figure, path)
    sys.stdout.write(f"\n{path}\n")
    return 0


def write_report(run: "RunData", arguments: argparse.Namespace) -> int:
    """Run `report`: write the HTML page, and print its path."""
    from tjx_metrics.plotting.run_data import RunDataError
    from tjx_metrics.report.page import report_page

    path = Path(arguments.out) if arguments.out else _folder_of([run]) / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise RunDataError(f"--out: got {path}; expected an ending of .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, report_page(run))
    sys.stdout.write(f"{path}\n")
    return 0


def _folder_of(runs: "list[RunData]") -> Path:
    """Return the directory of a single run, or the current directory for several runs."""
    return runs[0].path.parent if len(runs) == 1 else Path()


if __name__ == "__main__":
    sys.exit(main())
