"""Comparison of arms with a learning-rate sweep for each arm.

The sweep uses two seeds, since one seed may converge by chance at a rate that is too high. The
best rate of each arm is then evaluated with other seeds, to avoid selection bias.
"""

import math
from collections.abc import Mapping, Sequence

from experiments.arms import by_arm, curve, deviation, final_losses, mean_sd, read_outcomes
from experiments.page import Claim
from experiments.pictures import band, color, dress, legend_below, panels, zoom
from experiments.runs import Flags, Json, Outcome, Run, run_all, say
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

RATE = "optimizer.learning_rate"
SWEEP_SEEDS = (0, 1)
STABLE = 0.1  # nats

COLUMNS = ("arm", "learning rates", "sweep validation loss", "best rate", "validation loss")


def compare(arms: Mapping[str, Flags], rates: Mapping[str, Sequence[float]], seeds: int) -> Json:
    """Sweep the learning rate of each arm, and evaluate the best rate with other seeds.

    Parameters
    ----------
    arms : dict from str to flags
        Trainer flags of each arm.
    rates : dict from str to sequence of float
        Learning rates to sweep for each arm.
    seeds : int
        Number of runs per arm at the best rate.

    Returns
    -------
    dict
        "sweep" and "runs": outcomes; "best": the best learning rate of each arm.
    """
    sweep = run_all([
        Run(arm=arm, flags={**flags, RATE: rate}, seed=seed)
        for arm, flags in arms.items()
        for rate in rates[arm]
        for seed in SWEEP_SEEDS
    ])  # fmt: skip
    best = {arm: best_rate(outcomes) for arm, outcomes in by_arm(sweep).items()}
    say("best rates: " + ", ".join(f"{arm} {rate:g}" for arm, rate in best.items()))
    runs = run_all([
        Run(arm=arm, flags={**flags, RATE: best[arm]}, seed=seed)
        for seed in range(len(SWEEP_SEEDS), len(SWEEP_SEEDS) + seeds)
        for arm, flags in arms.items()
    ])  # fmt: skip
    return {
        "best": best,
        "sweep": [outcome.as_json() for outcome in sweep],
        "runs": [outcome.as_json() for outcome in runs],
    }


def loss_by_rate(outcomes: Sequence[Outcome]) -> dict[float, float]:
    """Return the mean validation loss of an arm at each rate; non-finite if a run diverged."""
    losses: dict[float, list[float]] = {}
    for outcome in outcomes:
        losses.setdefault(float(outcome.flags[RATE]), []).append(outcome.final_loss)
    return {rate: sum(each) / len(each) for rate, each in losses.items()}


def best_rate(outcomes: Sequence[Outcome]) -> float:
    """Return the rate with the lowest mean validation loss among those without divergence."""
    losses = loss_by_rate(outcomes)
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def rows(results: Json) -> list[list[str]]:
    """Return the table rows: arm, learning rates, sweep losses, best rate and its loss."""
    sweep, final = (by_arm(read_outcomes(results, name)) for name in ("sweep", "runs"))
    found = []
    for arm, outcomes in final.items():
        tried = loss_by_rate(sweep[arm])
        found.append([
            arm,
            ", ".join(f"{rate:g}" for rate in tried),
            ", ".join(f"{loss:.3f}" if math.isfinite(loss) else "diverged"
                      for loss in tried.values()),
            f"{results['best'][arm]:g}",
            mean_sd(final_losses(outcomes)),
        ])  # fmt: skip
    return found


def at_end(results: Json) -> list[str]:
    """Return the arms whose best rate is at an end of the sweep range."""
    sweep = by_arm(read_outcomes(results, "sweep"))
    rates = {arm: loss_by_rate(outcomes) for arm, outcomes in sweep.items()}
    return [arm for arm in sweep if results["best"][arm] in (min(rates[arm]), max(rates[arm]))]


def spreads(results: Json) -> dict[str, float]:
    """Return the standard deviation over seeds of the loss of each arm at its best rate."""
    arms = by_arm(read_outcomes(results))
    return {arm: deviation(final_losses(outcomes)) for arm, outcomes in arms.items()}


def tuned_inside(results: Json) -> Claim:
    """Claim that no best rate is at an end of the sweep range."""
    found = at_end(results)
    return Claim(
        text="The best rate of every arm lies inside the sweep range, not at its end.",
        holds=not found,
        figures=f"at the end: {', '.join(found)}" if found else "none is at an end",
    )


def stable(results: Json) -> Claim:
    """Claim that the loss at the best rate varies little over seeds, for every arm."""
    found = spreads(results)
    widest = max(found, key=lambda arm: found[arm])
    return Claim(
        text="At the best rate, the loss of every arm has a standard deviation over seeds of less "
        f"than {STABLE:g} nats.",
        holds=all(spread < STABLE for spread in found.values()),
        figures=f"largest: {widest}, {found[widest]:.3f}",
    )


def not_tuned(results: Json) -> str:
    """Return a sentence naming the arms whose best rate the sweep did not find."""
    wide = [arm for arm, spread in spreads(results).items() if not spread < STABLE]
    names = dict.fromkeys([*at_end(results), *wide])
    if not names:
        return "Every arm is tuned to the resolution of this grid."
    return (
        f"Not tuned by this sweep, and not to be ranked: {', '.join(names)}. The best rate is at "
        "an end of the grid, or the loss varies widely over seeds; a wider grid, more seeds in the "
        "sweep or a longer warm-up may resolve it."
    )


def ranking(results: Json) -> str:
    """Return the arms sorted by mean loss; arms that diverged are left out."""
    losses = {
        arm: sum(final_losses(outcomes)) / len(outcomes)
        for arm, outcomes in by_arm(read_outcomes(results)).items()
    }
    finite = sorted((loss, arm) for arm, loss in losses.items() if math.isfinite(loss))
    return ", ".join(f"{arm} ({loss:.3f})" for loss, arm in finite)


def draw(results: Json) -> Figure:
    """Draw the loss over the learning rate, and the curves at the best rates."""
    sweep, final = (by_arm(read_outcomes(results, name)) for name in ("sweep", "runs"))
    figure, (rates, curves) = panels(2, height=4.2)
    losses, ends = [], []
    for index, (arm, outcomes) in enumerate(sweep.items()):
        mean_losses = loss_by_rate(outcomes)
        tried, found = [*mean_losses], [*mean_losses.values()]
        losses.append(found)
        rates.plot(tried, found, color=color(index), marker="o", markersize=4, linewidth=1.2)
        best = tried.index(results["best"][arm])
        rates.plot(tried[best], found[best], color=color(index), marker="o", markersize=8)
    for index, (arm, outcomes) in enumerate(final.items()):
        steps, mean, spread = curve(outcomes, "eval/loss")
        ends.append(mean[1:])
        band(curves, steps, mean, spread, index=index, label=arm)
    rates.set_xscale("log")
    tried = [float(o.flags[RATE]) for outcomes in sweep.values() for o in outcomes]
    wide = max(tried) > 100 * min(tried)
    rates.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
    rates.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    rates.xaxis.set_minor_formatter(NullFormatter())
    zoom(rates, losses, share=0.9)
    zoom(curves, ends, share=0.95)
    loss = "validation loss in nats per token"
    dress(rates, x="learning rate", y=loss, title="Sweep, two seeds (large marker: best)")
    dress(curves, x="step", y=loss, title="At the best rate, other seeds")
    legend_below(figure, curves)
    return figure
