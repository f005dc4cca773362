"""Measure each part of the recipe: added alone to the tuned AdamW, and left out of the recipe."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from experiments import recipe, tuning
from experiments.arms import (
    bootstrap_interval,
    by_arm,
    final_losses,
    holm,
    mean_sd,
    read_outcomes,
    two_sided_p_value,
)
from experiments.command import OUTPUT, Experiment, Options, main, read_json
from experiments.page import Claim, Page
from experiments.pictures import color, dress, panels
from experiments.runs import Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

BASELINE, RECIPE, MUON = recipe.BASELINE, recipe.RECIPE, "+muon"
SMOKE: Flags = {**recipe.SMOKE, "model.d_model": 32}
# The parts of the recipe, and their flags in `recipe.CHANGES`.
PARTS: Mapping[str, tuple[str, ...]] = {
    "muon": ("optimizer.name", tuning.RATE, "optimizer.weight_decay"),
    "Polar Express": ("optimizer.polar_express",),
    "NorMuon": ("optimizer.neuron_b2",),
    "linear decay to 0": ("schedule.name", "schedule.final_fraction"),
    "short warm-up": ("schedule.warmup_steps",),
    "RoPE": ("model.positions",),
    "RMSNorm": ("model.norm",),
    "no biases": ("model.bias",),
    "QK norm": ("model.qk_norm",),
    "squared ReLU": ("model.activation",),
    "zero initialization": ("model.zero_init_residual",),
    "untied head": ("model.tied_head",),
}
# Parts that are options of muon: added to AdamW with muon, and left out with it.
OF_MUON = ("Polar Express", "NorMuon")
# Horizons of both ends, as shares of their steps: what a difference of losses is in steps.
HORIZONS = (0.7, 1.4)
HORIZON_SEEDS = 3  # a slope needs fewer seeds than a difference
SIGNIFICANT = 0.05


class Effect(NamedTuple):
    """Effect of a part at one end of the ablation.

    Attributes
    ----------
    loss
        Mean difference of the validation losses with and without the part, in nats; negative if
        the part lowers the loss.
    interval
        95 % bootstrap interval of `loss`.
    p_value
        Two-sided, by the sign-flip test, with Holm's correction for all tests of the page.
    steps
        Steps without the part for the loss with it, per step with it.
    """

    loss: float
    interval: tuple[float, float]
    p_value: float
    steps: float


def make_arms(baseline: Flags, full: Flags) -> dict[str, Flags]:
    """Return the flags of all arms.

    Parameters
    ----------
    baseline, full : flags
        The tuned AdamW, and the recipe.

    Returns
    -------
    dict from str to flags
        "adamw" and "recipe", both with two other horizons, and for each part ``+PART``, added to
        AdamW, and ``-PART``, left out of the recipe.
    """
    arms: dict[str, Flags] = {BASELINE: baseline, RECIPE: full}
    for part, names in PARTS.items():
        start = arms[MUON] if part in OF_MUON else baseline
        arms["+" + part] = _with(start, full, names)
        of_muon = [name for other in OF_MUON for name in PARTS[other]] if part == "muon" else []
        arms["-" + part] = _with(full, baseline, (*names, *of_muon))
    for end in (BASELINE, RECIPE):
        for share in HORIZONS:
            steps = round(share * int(arms[end]["train.max_steps"]))
            arms[f"{end} x {share:g}"] = {**arms[end], "train.max_steps": steps}
    # Only the last loss counts, and evaluation takes a fifth of a run.
    return {
        arm: {**flags, "train.eval_every": flags["train.max_steps"]} for arm, flags in arms.items()
    }


def _with(flags: Flags, other: Flags, names: Sequence[str]) -> dict[str, str | int | float]:
    """Return flags with the named ones as in others, also where those have none."""
    changed = {name: value for name, value in flags.items() if name not in names}
    return changed | {name: other[name] for name in names if name in other}


def measure(options: Options) -> Json:
    """Run every arm with the same seeds."""
    tuned = read_json(OUTPUT / "recipe.json")["arms"]
    own = {**options.data, **(SMOKE if options.smoke else {})}
    arms = make_arms({**tuned[BASELINE], **own}, {**tuned[RECIPE], **own})
    if options.smoke:
        parts = ("muon", "NorMuon")
        ends = [sign + part for part in parts for sign in "+-"]
        arms = {name: arms[name] for name in (BASELINE, RECIPE, *ends)}
    first = len(tuning.SWEEP_SEEDS)
    runs = run_all(
        [
            Run(arm=arm, flags=flags, seed=seed)
            for seed in range(first, first + options.seeds)
            for arm, flags in arms.items()
            if " x " not in arm or seed < first + HORIZON_SEEDS
        ],
        journal=options.journal,
    )
    return {"arms": arms, "runs": [_loss_only(outcome) for outcome in runs]}


def _loss_only(outcome: Outcome) -> Json:
    """Return the record of an outcome without its flags, which are those of its arm."""
    losses = outcome.curves.get("eval/loss", [])
    return {**outcome.as_json(), "flags": {}, "curves": {"eval/loss": losses}}


def effects(results: Json) -> dict[str, Effect]:
    """Return the effect of each part, by arm."""
    losses = {arm: final_losses(each) for arm, each in by_arm(read_outcomes(results)).items()}
    differences = {}
    for arm in losses:
        if arm[0] not in "+-":
            continue
        part = arm[1:]
        if arm[0] == "-":
            less, more = losses[RECIPE], losses[arm]
        else:
            less, more = losses[arm], losses[MUON if part in OF_MUON else BASELINE]
        differences[arm] = [a - b for a, b in zip(less, more, strict=True)]
    adjusted = holm([two_sided_p_value(each) for each in differences.values()])
    slopes = {end: _slope(results, losses, end) for end in (BASELINE, RECIPE)}
    return {
        arm: Effect(
            loss=statistics.fmean(each),
            interval=bootstrap_interval(each),
            p_value=p_value,
            steps=math.exp(statistics.fmean(each) / slopes[RECIPE if arm[0] == "-" else BASELINE]),
        )
        for (arm, each), p_value in zip(differences.items(), adjusted, strict=True)
    }


def _slope(results: Json, losses: Mapping[str, Sequence[float]], end: str) -> float:
    """Return the change of the loss per unit of ln(steps) of the horizon; NaN with one horizon."""
    points = [
        (
            math.log(int(results["arms"][arm]["train.max_steps"])),
            statistics.fmean(each[:HORIZON_SEEDS]),
        )
        for arm, each in losses.items()
        if arm.split(" x ")[0] == end
    ]
    if len(points) < 2:
        return math.nan
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def page(results: Json) -> Page:
    """Build the page from the results."""
    found, arms = effects(results), results["arms"]
    outcomes = by_arm(read_outcomes(results))
    losses = {arm: mean_sd(final_losses(outcomes[arm])) for arm in (BASELINE, RECIPE)}
    parts = [part for part in PARTS if "+" + part in found]
    helps = {
        sign: [
            part
            for part in parts
            if found[sign + part].loss < 0 and found[sign + part].p_value < SIGNIFICANT
        ]
        for sign in "+-"
    }
    hurts = [
        f"{part} ({'alone' if sign == '+' else 'in the recipe'})"
        for sign in "+-"
        for part in parts
        if found[sign + part].loss > 0 and found[sign + part].p_value < SIGNIFICANT
    ]
    return Page(
        title="What each part of the recipe adds",
        question=(
            "Which parts of the [recipe](recipe.md) lower the loss, added alone to a tuned AdamW "
            "and left out of the recipe?"
        ),
        setup=(
            "Model, text and batches of the [recipe](recipe.md), whose tuned flags are used: "
            f"*{BASELINE}* for {arms[BASELINE]['train.max_steps']} steps, *{RECIPE}* for "
            f"{arms[RECIPE]['train.max_steps']}. Alone: AdamW with one part. Left out: the recipe "
            f"without one part. {' and '.join(OF_MUON)} are options of muon: alone they are "
            "compared with AdamW and muon, and muon is left out with them. All arms run with the "
            f"same {len(outcomes[BASELINE])} seeds, and no setting is tuned again; with muon goes "
            "the learning rate of the recipe."
        ),
        columns=(
            "part",
            "alone: difference",
            "p",
            "steps",
            "left out: difference",
            "p",
            "steps",
        ),
        rows=[[part, *_cells(found["+" + part]), *_cells(found["-" + part])] for part in parts],
        table_note=(
            "Difference of the validation losses after the last step with and without the part, in "
            "nats per token (negative: the part lowers the loss), mean over the seeds and 95 % "
            "bootstrap interval. p: two-sided sign-flip test of the paired differences, with "
            f"Holm's correction for the {len(found)} tests. Steps: how many times the steps one "
            "would need without the part for the same loss, by the slope of the loss over the "
            "logarithm of the horizon, measured at "
            f"{', '.join(f'{share:g}' for share in (*HORIZONS[:1], 1.0, *HORIZONS[1:]))} times the "
            f"steps with {HORIZON_SEEDS} seeds. "
            f"Losses: *{BASELINE}* {losses[BASELINE]}, *{RECIPE}* {losses[RECIPE]}."
        ),
        picture=(
            "Difference of the losses with and without each part, and its 95 % bootstrap interval: "
            "alone (circles) and left out of the recipe (squares). Left of 0 the part helps."
        ),
        claims=[
            Claim(
                text=f"Every part lowers the loss alone at p < {SIGNIFICANT:g}.",
                holds=helps["+"] == parts,
                figures=f"{len(helps['+'])} of {len(parts)} do: {', '.join(helps['+']) or 'none'}",
            ),
            Claim(
                text=f"Every part lowers the loss of the recipe at p < {SIGNIFICANT:g}.",
                holds=helps["-"] == parts,
                figures=f"{len(helps['-'])} of {len(parts)} do: {', '.join(helps['-']) or 'none'}",
            ),
        ],
        conclusions=[
            f"Parts that raise the loss at p < {SIGNIFICANT:g}: {', '.join(hurts) or 'none'}.",
            "A part that does not lower the loss here may do so at another scale, or make training "
            "more stable, which this page does not measure.",
        ],
        limits=[
            "The model is small and the runs are short; at other scales the effects differ.",
            "No arm is tuned again: a part that wants another learning rate looks worse than it "
            "is.",
            "Steps are extrapolated beyond 0.7 and 1.4, and seconds of a step are not compared.",
            *results.get("notes", ()),
        ],
    )


def _cells(effect: Effect) -> tuple[str, str, str]:
    low, high = effect.interval
    steps = "" if math.isnan(effect.steps) else f"{effect.steps:.2f}"
    return f"{effect.loss:+.3f} [{low:+.3f}, {high:+.3f}]", f"{effect.p_value:.2g}", steps


def draw(results: Json) -> Figure:
    """Draw the effects and their intervals."""
    found = effects(results)
    parts = [part for part in PARTS if "+" + part in found]
    figure, (axes,) = panels(1, height=1.2 + 0.35 * len(parts))
    for offset, (sign, marker, label) in enumerate(
        (("+", "o", "alone"), ("-", "s", "left out of the recipe"))
    ):
        each = [found[sign + part] for part in parts]
        middle = np.array([effect.loss for effect in each])
        ends = np.array([effect.interval for effect in each]).T
        axes.errorbar(
            middle,
            np.arange(len(parts)) + 0.3 * offset - 0.15,
            xerr=np.abs(ends - middle),
            fmt=marker,
            markersize=4,
            color=color(offset),
            label=label,
        )
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(parts)), parts)
    axes.invert_yaxis()
    dress(axes, x="difference of the validation losses in nats per token", y="", title="")
    axes.legend(fontsize=9, edgecolor="none")
    return figure


EXPERIMENT = Experiment(
    name="ablation", measure=measure, page=page, draw=draw, seeds=10, text_flag="--data.path"
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
