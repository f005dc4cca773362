"""A comparison of arms, each at its own best learning rate.

Rates are compared with one seed; the best of each arm then runs with seeds that did not choose it.
"""

import math
from collections.abc import Mapping, Sequence

from experiments.arms import by_arm, curve, final_losses, mean_sd, read_outcomes
from experiments.page import Claim
from experiments.pictures import band, color, dress, legend_below, panels, zoom
from experiments.runs import Flags, Json, Outcome, Run, run_all, say
from matplotlib.figure import Figure

RATE = "optimizer.learning_rate"
SWEEP_SEED = 0

COLUMNS = ("arm", "rates tried", "best rate", "validation loss", "validation loss in the sweep")


def compare(arms: Mapping[str, Flags], rates: Mapping[str, Sequence[float]], seeds: int) -> Json:
    """Sweep the rates of each arm, and run the best of each with seeds of its own.

    Parameters
    ----------
    arms : dict from str to flags
        What is compared.
    rates : dict from str to sequence of float
        Learning rates of each arm.
    seeds : int
        Runs of each arm at its best rate.

    Returns
    -------
    dict
        "sweep" and "runs", of outcomes, and "best", the rate of each arm.
    """
    sweep = run_all([
        Run(arm=arm, flags={**flags, RATE: rate}, seed=SWEEP_SEED)
        for arm, flags in arms.items()
        for rate in rates[arm]
    ])  # fmt: skip
    best = {arm: best_rate(outcomes) for arm, outcomes in by_arm(sweep).items()}
    say("best rates: " + ", ".join(f"{arm} {rate:g}" for arm, rate in best.items()))
    runs = run_all([
        Run(arm=arm, flags={**flags, RATE: best[arm]}, seed=SWEEP_SEED + 1 + number)
        for number in range(seeds)
        for arm, flags in arms.items()
    ])  # fmt: skip
    return {
        "best": best,
        "sweep": [outcome.as_json() for outcome in sweep],
        "runs": [outcome.as_json() for outcome in runs],
    }


def best_rate(outcomes: Sequence[Outcome]) -> float:
    """Return the rate with the lowest validation loss; runs that did not finish have none."""

    def loss(outcome: Outcome) -> float:
        return outcome.final_loss if math.isfinite(outcome.final_loss) else math.inf

    return float(min(outcomes, key=loss).flags[RATE])


def rows(results: Json) -> list[list[str]]:
    """Return the table: each arm, its rates, and its loss at the best of them."""
    sweep, final = (by_arm(read_outcomes(results, name)) for name in ("sweep", "runs"))
    found = []
    for arm, outcomes in final.items():
        tried = {float(o.flags[RATE]): o.final_loss for o in sweep[arm]}
        found.append([
            arm,
            ", ".join(f"{rate:g}" for rate in tried),
            f"{results['best'][arm]:g}",
            mean_sd(final_losses(outcomes)),
            ", ".join(f"{loss:.3f}" if math.isfinite(loss) else "diverged"
                      for loss in tried.values()),
        ])  # fmt: skip
    return found


def tuned_inside(results: Json) -> Claim:
    """Claim that no arm's best rate stands at the end of those that were tried."""
    sweep = by_arm(read_outcomes(results, "sweep"))
    at_end = [
        arm
        for arm, outcomes in sweep.items()
        if results["best"][arm] in (outcomes[0].flags[RATE], outcomes[-1].flags[RATE])
    ]
    return Claim(
        text="Every arm's best rate lies inside the range that was tried, not at its end.",
        holds=not at_end,
        figures=f"at the end: {', '.join(at_end)}" if at_end else "none is at an end",
    )


def ranking(results: Json) -> str:
    """Name the arms from the lowest mean loss to the highest; those that diverged are left out."""
    losses = {
        arm: sum(final_losses(outcomes)) / len(outcomes)
        for arm, outcomes in by_arm(read_outcomes(results)).items()
    }
    finite = sorted((loss, arm) for arm, loss in losses.items() if math.isfinite(loss))
    return ", ".join(f"{arm} ({loss:.3f})" for loss, arm in finite)


def draw(results: Json) -> Figure:
    """Draw the loss against the rate, and the curves at the best rates."""
    sweep, final = (by_arm(read_outcomes(results, name)) for name in ("sweep", "runs"))
    figure, (rates, curves) = panels(2, height=4.2)
    losses, ends = [], []
    for index, (arm, outcomes) in enumerate(sweep.items()):
        tried = [float(o.flags[RATE]) for o in outcomes]
        found = [o.final_loss for o in outcomes]
        losses.append(found)
        rates.plot(tried, found, color=color(index), marker="o", markersize=4, linewidth=1.2)
        best = tried.index(results["best"][arm])
        rates.plot(tried[best], found[best], color=color(index), marker="o", markersize=8)
    for index, (arm, outcomes) in enumerate(final.items()):
        steps, mean, spread = curve(outcomes, "eval/loss")
        ends.append(mean[1:])
        band(curves, steps, mean, spread, index=index, label=arm)
    rates.set_xscale("log")
    zoom(rates, losses, share=0.9)
    zoom(curves, ends, share=0.95)
    loss = "validation loss in nats a token"
    dress(rates, x="learning rate", y=loss, title="Sweep, one seed (large: the best)")
    dress(curves, x="step", y=loss, title="At the best rate, other seeds")
    legend_below(figure, curves)
    return figure
