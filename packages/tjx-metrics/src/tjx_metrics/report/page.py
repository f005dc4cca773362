"""Self-contained HTML report of a run: no network access, external fonts or scripts."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tjx_metrics.plotting.curves import PlotOptions
from tjx_metrics.plotting.run_data import NoDataError, RunData
from tjx_metrics.plotting.run_plots import run_plots
from tjx_metrics.report.assets import CSS, SCRIPT
from tjx_metrics.report.comparison import short_count
from tjx_metrics.report.inline_svg import inline_svg
from tjx_metrics.report.summary import (
    RunSummary,
    config_of,
    environment_of,
    flat,
    summarize,
    warnings_of,
)

# Section of the page -> names of its plots.
_OPTIONAL = ("Responses",)  # sections that are left out without a plot
_SECTIONS = {
    "Curves": ("loss", "learning_rate", "grad_norm"),
    "Responses": ("reward", "accuracy"),
    "Speed": ("throughput", "time_split"),
    "Layers": ("norms_gradient", "norms_parameter", "norms_update"),
    "Histograms": ("histograms",),
}


def report_page(run: RunData) -> str:
    """Return the HTML report of a run.

    All file contents are escaped. The page's content security policy allows only its own script
    and no external resources.

    Parameters
    ----------
    run : RunData
        The run.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    RunDataError
        If the hyperparameters or summary file is damaged.
    """
    return _page(run.name, _sections(run))


def pipeline_page(title: str, stages: Sequence[RunData]) -> str:
    """Return one HTML report of several runs that started from each other.

    Parameters
    ----------
    title : str
        Title of the page.
    stages : sequence of RunData
        The runs, in order.

    Returns
    -------
    str
        HTML, as of `report_page`; the element ids of run n start with stageN-.

    Raises
    ------
    RunDataError
        As `report_page`.
    """
    links = "".join(
        f"<li><a href='#stage{number}-summary'>{escape(stage.name)}</a></li>"
        for number, stage in enumerate(stages, 1)
    )
    head = f"<header><h1>{escape(title)}</h1><ol>{links}</ol></header>"
    sections = (
        section
        for number, stage in enumerate(stages, 1)
        for section in _sections(stage, f"stage{number}-")
    )
    return _page(title, [head, *sections])


def _sections(run: RunData, prefix: str = "") -> Iterator[str]:
    """Yield the sections of a run; all element ids start with `prefix`."""
    summary = summarize(run)
    yield _summary(run, summary, prefix)
    yield from _charts(run, prefix)
    yield _samples(run, prefix)
    yield _settings(run, prefix)
    yield _table("Environment", environment_of(run), "metrics.hyperparameters.json", prefix)
    yield _table("Results", flat(run.beside("summary")), "metrics.summary.json", prefix)
    yield _last_values(run, prefix)


def _page(title: str, sections: Iterable[str]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _summary(run: RunData, summary: RunSummary, prefix: str) -> str:
    warnings = warnings_of(run, summary)
    progress = [f"step {summary.steps:,}"]
    if summary.tokens is not None:
        progress.append(f"{short_count(summary.tokens)} tokens")
    if summary.hours is not None:
        progress.append(_duration(summary.hours))
    if summary.parameters is not None:
        progress.append(f"{short_count(summary.parameters)} parameters")
    tiles = [_health(summary, warnings), _speed(summary), _learning(summary)]
    return (
        f"<header><h1>{escape(run.name)}</h1>"
        f"<p class='soft'>{escape(', '.join(progress))}</p></header>"
        f"\n<section id='{prefix}summary'><h2>Summary</h2><div class='tiles'>{''.join(tiles)}</div>"
        "</section>"
    )


def _health(summary: RunSummary, warnings: list[str]) -> str:
    facts = {
        "Skipped steps": _count(summary.skipped),
        "Late compilations": _count(summary.recompiles),
    }
    note = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    verdict = (
        f"<p class='bad'>{len(warnings)} warnings:</p><ul>{note}</ul>"
        if warnings
        else "<p class='good'>No problems found in the records.</p>"
    )
    return _tile("Health", verdict, facts)


def _speed(summary: RunSummary) -> str:
    facts = {
        "Tokens per second": _count(summary.tokens_per_sec),
        "MFU": _share(summary.mfu),
        "Waiting for batches": _share(summary.waiting),
    }
    return _tile("Speed", "<p class='soft'>Medians of the second half.</p>", facts)


def _learning(summary: RunSummary) -> str:
    first, best = summary.first_eval, summary.best_eval
    verdict = "<p class='soft'>There is no evaluation.</p>"
    if first is not None and best is not None:
        how = "good" if best < first else "bad"
        verdict = (
            f"<p class='{how}'>Evaluation loss {first:.3f} at first, {best:.3f} at best "
            f"(step {summary.best_step:,}).</p>"
        )
    facts = {
        "Training loss at the end": _loss(summary.final_loss),
        "Last evaluation loss": _loss(summary.final_eval),
        "Perplexity": "-" if summary.perplexity is None else f"{summary.perplexity:,.2f}",
        "Bits per byte": _loss(summary.bits_per_byte),
    }
    return _tile("Learning", verdict, facts)


def _tile(title: str, verdict: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<div class='card'><h3>{title}</h3>{verdict}<dl>{rows}</dl></div>"


def _charts(run: RunData, prefix: str) -> Iterator[str]:
    """Yield the sections of plots, each with a list of the plots that have no records."""
    plots = {plot.name: plot for plot in run_plots([run], PlotOptions())}
    for title, names in _SECTIONS.items():
        drawn, missing = [], []
        for name in names:
            plot = plots[name]
            try:
                heading = f"{plot.heading} of {run.name}"
                svg = inline_svg(plot.draw(), heading, f"{prefix}chart-{name}")
            except NoDataError:
                missing.append(plot.heading)
                continue
            wide = " wide" if name == "histograms" else ""
            drawn.append(f"<div class='card{wide}'>{svg}</div>")
        if not drawn and title in _OPTIONAL:
            continue
        note = f"<p class='soft'>No records: {', '.join(missing)}.</p>" if missing else ""
        yield (
            f"<section id='{prefix}{title.lower()}'><h2>{title}</h2>{note}"
            f"<div class='charts'>{''.join(drawn)}</div></section>"
        )


def _samples(run: RunData, prefix: str) -> str:
    texts = [
        (step, name, str(content["text"]))
        for name, points in run.objects("").items()
        for step, content in points
        if "text" in content
    ]
    parts = []
    for index, (step, name, text) in enumerate(sorted(texts, reverse=True)):
        title = f"Step {step:,}" + ("" if name == "samples/text" else f", {name}")
        shown = " open" if index == 0 else ""
        parts.append(
            f"<details{shown}><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        )
    inside = "".join(parts) or "<p class='soft'>The run recorded no texts.</p>"
    return (
        f"<section id='{prefix}samples'><h2>Samples</h2><div class='card'>{inside}</div></section>"
    )


def _settings(run: RunData, prefix: str) -> str:
    settings = config_of(run)
    yaml = run.path.parent / "config.yaml"
    if settings or not yaml.is_file():
        return _table("Config", settings, "metrics.hyperparameters.json", prefix)
    text = escape(yaml.read_text(encoding="utf-8", errors="replace"))
    return (
        f"<section id='{prefix}config'><h2>Config</h2><div class='card'><details>"
        f"<summary>config.yaml</summary><pre>{text}</pre></details></div></section>"
    )


def _last_values(run: RunData, prefix: str) -> str:
    values = {
        name: f"{series[1][-1]:.6g} at step {series[0][-1]:,.0f}"
        for name in run.names
        if not name.startswith("norms/") and (series := run.series(name))[0].size
    }
    return _table("Last values", values, run.path.name, prefix)


def _table(title: str, rows: Mapping[str, Any], source: str, prefix: str) -> str:
    """Return a section with a collapsed, searchable table of names and values."""
    cells = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    inside = (
        f"<details><summary>{len(rows)} entries</summary>"
        f"<input type='search' placeholder='Search' aria-label='Search {title}'>"
        f"<table>{cells}</table></details>"
        if rows
        else f"<p class='soft'>Nothing is recorded in {escape(source)}.</p>"
    )
    anchor = prefix + title.lower().replace(" ", "-")
    return f"<section id='{anchor}'><h2>{title}</h2><div class='card'>{inside}</div></section>"


def _count(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _duration(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:.1f} hours"
