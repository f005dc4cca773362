"""Plot of a prediction: losses of the small runs over FLOPs, the law, and the large run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tjx_metrics.plotting.style import COLORS, format_axes, legend, new_figure, scale
from tjx_trainer.scaling.laws import Law


def draw_prediction(file: Path, entry: Mapping[str, Any]) -> None:
    """Plot the content of prediction.json.

    Parameters
    ----------
    file : Path
        Output file.
    entry : mapping
        Content of prediction.json; the law is drawn from the largest small run to the target.
    """
    figure = new_figure()
    plot = figure.add_subplot()
    runs, target = entry["runs"], entry["target"]
    law = Law.from_json(entry["law"])
    ordered = sorted([*runs, target], key=lambda each: each["flops"])
    points = np.array([[each[name] for name in entry["features"]] for each in ordered], float)
    # Between runs the features are interpolated geometrically, as they grow along the dial.
    places = np.arange(len(ordered))
    fine = np.linspace(0, len(ordered) - 1, 200)
    path = np.exp([np.interp(fine, places, column) for column in np.log(points).T]).T
    flops = np.exp(np.interp(fine, places, np.log([each["flops"] for each in ordered])))
    plot.plot(flops, law.loss(path), "-", color=COLORS[0], label="law")
    plot.plot(
        [each["flops"] for each in runs], [each["loss"] for each in runs], "o", color=COLORS[0],
        label="small runs",
    )  # fmt: skip
    loss = entry["loss"]
    plot.errorbar(
        [target["flops"]], [loss], [[loss - entry["low"]], [entry["high"] - loss]], fmt="s",
        color=COLORS[1], capsize=4, label=f"prediction, {entry['confidence']:.0%}",
    )  # fmt: skip
    if "measured" in entry:
        plot.plot(target["flops"], entry["measured"], "D", color=COLORS[2], label="measured")
    format_axes(plot, title="Loss over training FLOPs", x="training FLOPs", y="validation loss")
    scale(plot, "x", log=True)
    legend(plot)
    figure.savefig(file, dpi=200)
