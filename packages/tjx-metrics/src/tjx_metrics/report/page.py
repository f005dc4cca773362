"""A run on one page of HTML that needs nothing else: no network, no font, no script of others."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from tjx_metrics.plotting.curves import PlotOptions
from tjx_metrics.plotting.run_data import NoDataError, RunData
from tjx_metrics.plotting.run_plots import run_plots
from tjx_metrics.report.assets import CSS, SCRIPT
from tjx_metrics.report.comparison import short_count
from tjx_metrics.report.inline_svg import inline_svg
from tjx_metrics.report.summary import (
    Figures,
    config_of,
    environment_of,
    flat,
    summarize,
    warnings_of,
)

# Where on the page a picture stands.
_SECTIONS = {
    "Curves": ("loss", "learning_rate", "grad_norm"),
    "Speed": ("throughput", "time_split"),
    "Layers": ("norms_gradient", "norms_parameter", "norms_update"),
    "Histograms": ("histograms",),
}


def report_page(run: RunData) -> str:
    """Write the page of a run.

    All that comes from files is escaped. A browser that keeps to the page's own policy runs no
    script but the page's, and loads nothing.

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
    RunError
        When a file beside the metrics is damaged.
    """
    figures = summarize(run)
    sections = [
        _summary(run, figures),
        *_charts(run),
        _samples(run),
        _settings(run),
        _table("Environment", environment_of(run), "metrics.hyperparameters.json"),
        _table("Results", flat(run.beside("summary")), "metrics.summary.json"),
        _last_values(run),
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)}</title>\n<style>{CSS}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _summary(run: RunData, figures: Figures) -> str:
    warnings = warnings_of(run, figures)
    came = [f"step {figures.steps:,}"]
    if figures.tokens is not None:
        came.append(f"{short_count(figures.tokens)} tokens")
    if figures.hours is not None:
        came.append(_duration(figures.hours))
    if figures.parameters is not None:
        came.append(f"{short_count(figures.parameters)} parameters")
    tiles = [_health(figures, warnings), _speed(figures), _learning(figures)]
    return (
        f"<header><h1>{escape(run.name)}</h1><p class='soft'>{escape(', '.join(came))}</p></header>"
        f"\n<section id='summary'><h2>Summary</h2><div class='tiles'>{''.join(tiles)}</div>"
        "</section>"
    )


def _health(figures: Figures, warnings: list[str]) -> str:
    facts = {
        "Skipped steps": _count(figures.skipped),
        "Late compilations": _count(figures.recompiles),
    }
    said = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    verdict = (
        f"<p class='bad'>{len(warnings)} to look into:</p><ul>{said}</ul>"
        if warnings
        else "<p class='good'>Nothing stands out in the records.</p>"
    )
    return _tile("Healthy?", verdict, facts)


def _speed(figures: Figures) -> str:
    facts = {
        "Tokens per second": _count(figures.tokens_per_sec),
        "MFU": _share(figures.mfu),
        "Waiting for batches": _share(figures.waiting),
    }
    return _tile("Fast?", "<p class='soft'>Medians of the second half.</p>", facts)


def _learning(figures: Figures) -> str:
    first, best = figures.first_eval, figures.best_eval
    verdict = "<p class='soft'>There is no evaluation.</p>"
    if first is not None and best is not None:
        how = "good" if best < first else "bad"
        verdict = (
            f"<p class='{how}'>Evaluation loss {first:.3f} at first, {best:.3f} at best "
            f"(step {figures.best_step:,}).</p>"
        )
    facts = {
        "Training loss at the end": _loss(figures.final_loss),
        "Last evaluation loss": _loss(figures.final_eval),
        "Perplexity": "-" if figures.perplexity is None else f"{figures.perplexity:,.2f}",
        "Bits per byte": _loss(figures.bits_per_byte),
    }
    return _tile("Learning?", verdict, facts)


def _tile(title: str, verdict: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<div class='card'><h3>{title}</h3>{verdict}<dl>{rows}</dl></div>"


def _charts(run: RunData) -> Iterator[str]:
    """Yield the sections of pictures; what has no records says so."""
    pictures = {picture.name: picture for picture in run_plots([run], PlotOptions())}
    for title, names in _SECTIONS.items():
        drawn, missing = [], []
        for name in names:
            picture = pictures[name]
            try:
                svg = inline_svg(picture.draw(), f"{picture.heading} of {run.name}")
            except NoDataError:
                missing.append(picture.heading)
                continue
            wide = " wide" if name == "histograms" else ""
            drawn.append(f"<div class='card{wide}'>{svg}</div>")
        said = f"<p class='soft'>No records: {', '.join(missing)}.</p>" if missing else ""
        yield (
            f"<section id='{title.lower()}'><h2>{title}</h2>{said}"
            f"<div class='charts'>{''.join(drawn)}</div></section>"
        )


def _samples(run: RunData) -> str:
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
    return f"<section id='samples'><h2>Samples</h2><div class='card'>{inside}</div></section>"


def _settings(run: RunData) -> str:
    settings = config_of(run)
    yaml = run.path.parent / "config.yaml"
    if settings or not yaml.is_file():
        return _table("Config", settings, "metrics.hyperparameters.json")
    text = escape(yaml.read_text(encoding="utf-8", errors="replace"))
    return (
        "<section id='config'><h2>Config</h2><div class='card'><details>"
        f"<summary>config.yaml</summary><pre>{text}</pre></details></div></section>"
    )


def _last_values(run: RunData) -> str:
    values = {
        name: f"{series[1][-1]:.6g} at step {series[0][-1]:,.0f}"
        for name in run.names
        if not name.startswith("norms/") and (series := run.series(name))[0].size
    }
    return _table("Last values", values, run.path.name)


def _table(title: str, rows: Mapping[str, Any], source: str) -> str:
    """Write names and values, folded up, with a field that searches them."""
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
    anchor = title.lower().replace(" ", "-")
    return f"<section id='{anchor}'><h2>{title}</h2><div class='card'>{inside}</div></section>"


def _count(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _duration(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:.1f} hours"
