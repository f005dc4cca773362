"""Figure of the attention benchmark: speed of each pass and memory over the sequence length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_cases import PASSES, Case, Pass
from attention_report import entries, is_ours, seconds
from attention_worker import Json

TITLES: dict[Pass, str] = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
}
# Matplotlib arguments of each entry.
type Styles = dict[str, dict[str, Any]]

OURS = ("#d62728", "#ff7f0e", "#8c1c5a", "#e377c2", "#b5651d", "#f0b400")
PEERS = ("#1f77b4", "#2ca02c", "#17becf", "#7f7f7f", "#9467bd", "#555555")


def draw(result: Json, path: Path) -> bool:
    """Write the figure; return False if matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[Json]] = {}
    for record in result["cases"]:
        groups.setdefault(record["case"]["group"], []).append(record)
    styles = _styles(result["cases"])
    figure, axes = plt.subplots(
        4, len(groups), figsize=(5.2 * len(groups) + 1, 13), squeeze=False, layout="constrained"
    )
    for column, (group, records) in enumerate(groups.items()):
        for row, which in enumerate(PASSES):
            _speed(axes[row][column], records, which, styles, on_cpu=result["suite"] == "cpu")
        _memory(axes[3][column], records, styles)
        axes[0][column].set_title(f"{group}\n\n{TITLES['forward']}", fontsize=11)
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    environment = result["environment"]
    figure.suptitle(
        f"Attention on {environment['device']}, {result['date'][:10]}: medians", fontsize=14
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _styles(records: Sequence[Json]) -> Styles:
    """Return the color of each entry: warm for tjx, cool for peers."""
    names = list(dict.fromkeys(name for record in records for name in entries(record)))
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if not is_ours(name)]
    return {
        name: {"color": colours[i % len(colours)], "label": name}
        for colours, some in ((OURS, ours), (PEERS, peers))
        for i, name in enumerate(some)
    }


def _series(
    ax: Any,
    records: Sequence[Json],
    values: list[dict[str, Any]],
    styles: Styles,
) -> None:
    """Draw lines over three or more lengths, bars over fewer; `values` by record and entry."""
    lengths = [record["case"]["length"] for record in records]
    shown = [name for name in styles if any(value.get(name) is not None for value in values)]
    if len(lengths) >= 3:
        for name in shown:
            points = [
                (n, v[name])
                for n, v in zip(lengths, values, strict=True)
                if v.get(name) is not None
            ]
            ours = is_ours(name)
            ax.plot(
                *zip(*points, strict=True),
                marker="o" if ours else "s",
                linestyle="-" if ours else "--",
                linewidth=2.4 if ours else 1.4,
                **styles[name],
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    else:
        width = 0.8 / max(1, len(shown))
        for i, name in enumerate(shown):
            places = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(lengths))]
            heights = [value.get(name) or 0 for value in values]
            bars = ax.bar(places, heights, width * 0.92, **styles[name])
            text = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x else "" for x in heights]
            ax.bar_label(bars, text, fontsize=7, rotation=90, padding=2)
        ax.set_xticks(range(len(lengths)), [f"T = {n}" for n in lengths])
        ax.margins(y=0.18)
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _speed(ax: Any, records: Sequence[Json], which: Pass, styles: Styles, *, on_cpu: bool) -> None:
    unit, size = ("GFLOP/s", 1e9) if on_cpu else ("TFLOP/s", 1e12)
    values = [
        {
            name: Case(**record["case"]).flops(which) / seconds(entry, which).median / size
            for name, entry in entries(record).items()
        }
        for record in records
    ]
    _series(ax, records, values, styles)
    ax.set_ylim(bottom=0)
    ax.set_title(TITLES[which], fontsize=11)
    ax.set_ylabel(f"{unit} (more is better)")


def _memory(ax: Any, records: Sequence[Json], styles: Styles) -> None:
    values = [
        {
            name: entry["temp_bytes"]["both"] and entry["temp_bytes"]["both"] / 2**20
            for name, entry in entries(record).items()
        }
        for record in records
    ]
    _series(ax, records, values, styles)
    ax.set_yscale("log")
    ax.set_ylim(bottom=1, top=10 * ax.get_ylim()[1])  # room for the figures above the bars
    ax.set_title("temporary memory, forward + backward", fontsize=11)
    ax.set_ylabel("MiB (less is better)")
    ax.set_xlabel("sequence length T")


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
