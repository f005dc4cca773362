"""Measure gradient explosion in a deep model, with and without clipping and layer scale."""

import math
from collections.abc import Mapping, Sequence

from experiments.arms import by_arm, curve, deviation, final_losses, lower, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, color, dress, legend_below, panels
from experiments.runs import Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

from tjx_metrics.plotting.smoothing import moving_average

CLIP_NORM = 0.1
LAYER_SCALE = 0.1
SMOOTHED = 20  # averaging windows of the loss curves in the figure
FLAGS: Flags = {
    "data.corpus": "python-docs",
    "data.tokenizer": "char",
    "data.seq_len": 32,
    "model.max_seq_len": 32,
    "model.n_layer": 48,
    "model.n_head": 2,
    "model.d_model": 32,
    "model.norm_position": "post",
    "train.max_steps": 800,
    "train.batch_size": 8,
    "train.eval_every": 1_000_000,
    "train.eval_tokens": 20_000,
    "train.sample_tokens": 0,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.learning_rate": 0.5,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": "none",
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "checkpoint.every": 1_000_000,
    "log.every": 1,
}
SHALLOW = "neither, 4 layers"
ARMS: Mapping[str, Flags] = {
    "neither": {},
    "clipping": {"optimizer.clip_norm": CLIP_NORM},
    "layer scale": {"model.layer_scale": LAYER_SCALE},
    "both": {"optimizer.clip_norm": CLIP_NORM, "model.layer_scale": LAYER_SCALE},
    SHALLOW: {"model.n_layer": 4},
}
SMOKE: Flags = {"train.max_steps": 3, "train.eval_tokens": 200, "model.n_layer": 2}


def measure(options: Options) -> Json:
    """Run the four arms of the deep model, and the shallow model with neither."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(arm=arm, flags={**flags, **change}, seed=seed)
        for seed in range(options.seeds)
        for arm, change in ARMS.items()
    ]
    return {"flags": flags, "runs": [outcome.as_json() for outcome in run_all(runs)]}


def skipped(outcome: Outcome) -> int:
    """Return the number of non-finite steps, which the guard skipped."""
    return round(outcome.curves["train/skipped"][-1][1])


def first_skipped(outcome: Outcome) -> int | None:
    """Return the first non-finite step."""
    return next((step for step, count in outcome.curves["train/skipped"] if count), None)


def largest(outcome: Outcome, metric: str) -> float:
    """Return the largest finite value of a metric."""
    return max(value for _, value in outcome.curves[metric] if math.isfinite(value))


def page(results: Json) -> Page:
    """Build the page from the results."""
    arms = by_arm(read_outcomes(results))
    flags = results["flags"]
    return Page(
        title="Gradient explosion: clipping and layer scale",
        question=(
            "Do gradient clipping and layer scale stabilize a deep model that diverges to NaN or "
            "Inf, at the same learning rate? Which of the two is sufficient?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, with the "
            "norm after each sublayer (`--model.norm_position post`, as in the original "
            f"Transformer), on characters of `python-docs`: {flags['train.max_steps']} steps of "
            f"{flags['train.batch_size']} sequences of {flags['data.seq_len']}, SGD with momentum "
            f"{flags['optimizer.momentum']} at a constant rate of "
            f"{flags['optimizer.learning_rate']}, no warm-up. The arms turn on "
            f"`--optimizer.clip_norm {CLIP_NORM}` and `--model.layer_scale {LAYER_SCALE}`. A fifth "
            "arm has 4 layers and neither. The trainer skips and counts non-finite steps; after 10 "
            "consecutive ones it ends with exit code 3."
        ),
        columns=["arm", "non-finite steps", "first at step", "exit codes", "largest loss",
                 "largest gradient norm", "validation loss"],
        rows=[_row(arm, outcomes) for arm, outcomes in arms.items()],
        table_note=(
            "One value per seed, separated by commas. Validation loss in nats per character: mean "
            "± standard deviation over seeds, if all runs completed. Largest values are the "
            "largest finite ones."
        ),
        picture=(
            "Left and middle: training loss and gradient norm at each step, one line per "
            "seed; a cross is the last finite value of a run that the trainer ended. Right: "
            "training loss of the arms whose runs all completed, averaged over "
            f"{flags['train.max_steps'] // SMOOTHED} steps; bands are one standard deviation over "
            "seeds."
        ),
        claims=_claims(arms),
        conclusions=[
            "The arms of the deep model differ only in the two flags: depth, learning rate, seeds "
            "and data are equal.",
            "The trainer detects divergence: it skips non-finite steps, counts them in "
            "`train/skipped`, and ends the run after `--guard.max_skipped` consecutive ones.",
            "Clipping only bounds the norm of an update; the validation loss shows whether the "
            "deep model also learns with clipping alone.",
        ],
        limits=[
            "The learning rate was chosen so that the deep model diverges and the model of 4 "
            "layers does not; at half the rate neither may diverge, and at twice the rate both "
            "may.",
            "The model is narrow and the run is short. The presets use Adam, warm-up and pre-norm, "
            "each of which makes gradient explosion less likely; none is used here.",
            "The context is 32 characters: the losses are far from the best possible ones.",
        ],
    )  # fmt: skip


def _row(arm: str, outcomes: Sequence[Outcome]) -> list[str]:
    def listed(values: Sequence[object]) -> str:
        return ", ".join("-" if value is None else str(value) for value in values)

    return [
        arm,
        listed([skipped(o) for o in outcomes]),
        listed([first_skipped(o) for o in outcomes]),
        listed([o.exit_code for o in outcomes]),
        f"{max(largest(o, 'train/loss') for o in outcomes):.3g}",
        f"{max(largest(o, 'train/grad_norm') for o in outcomes):.3g}",
        mean_sd(final_losses(outcomes)),
    ]


def _claims(arms: Mapping[str, Sequence[Outcome]]) -> list[Claim]:
    counts = {arm: [skipped(o) for o in outcomes] for arm, outcomes in arms.items()}
    codes = [o.exit_code for o in arms["neither"]]
    spreads = {arm: deviation(final_losses(outcomes)) for arm, outcomes in arms.items()}

    def stays_finite(text: str, arm: str) -> Claim:
        figures = f"non-finite steps, by seed: {', '.join(map(str, counts[arm]))}"
        return Claim(text=text, holds=not any(counts[arm]), figures=figures)

    return [
        Claim(
            text="Without clipping and layer scale, the deep model diverges to non-finite values "
            "in every seed, and the trainer ends the run with exit code 3.",
            holds=all(counts["neither"]) and set(codes) == {3},
            figures=f"non-finite steps, by seed: {', '.join(map(str, counts['neither']))}"
            f"; exit codes {', '.join(map(str, codes))}",
        ),
        stays_finite("With both, every step of every seed is finite.", "both"),
        stays_finite(
            "Clipping alone is sufficient: every step of every seed is finite.", "clipping"
        ),
        stays_finite(
            "Layer scale alone is sufficient: every step of every seed is finite.", "layer scale"
        ),
        stays_finite(
            "Depth causes the divergence: with 4 layers and neither, every seed stays finite.",
            SHALLOW,
        ),
        lower(
            "With both, the validation loss falls below its initial value in every seed.",
            final_losses(arms["both"]),
            [o.curves["eval/loss"][0][1] for o in arms["both"]],
        ),
        lower(
            "Both together give a lower validation loss than clipping alone in every seed.",
            final_losses(arms["both"]),
            final_losses(arms["clipping"]),
        ),
        Claim(
            text="With both, the final loss varies less over seeds than with clipping alone.",
            holds=spreads["both"] < spreads["clipping"],
            figures=f"a standard deviation of {spreads['both']:.3f} nats against "
            f"{spreads['clipping']:.3f}",
        ),
    ]


def draw(results: Json) -> Figure:
    """Draw loss and gradient norm at each step."""
    arms = by_arm(read_outcomes(results))
    figure, (losses, norms, end) = panels(3, height=4.0)
    for index, (arm, outcomes) in enumerate(arms.items()):
        for number, outcome in enumerate(outcomes):
            label = None if number else arm
            for axes, metric in ((losses, "train/loss"), (norms, "train/grad_norm")):
                finite = [point for point in outcome.curves[metric] if math.isfinite(point[1])]
                axes.plot(*zip(*finite, strict=True), color=color(index), linewidth=0.9, alpha=0.75,
                          label=label)  # fmt: skip
                if outcome.exit_code:
                    axes.plot(*finite[-1], "x", color=color(index), markersize=8)
        if not any(o.exit_code for o in outcomes):
            steps, mean, spread = curve(outcomes, "train/loss")
            window = max(1, len(steps) // SMOOTHED)
            smooth, width = (moving_average(values, window) for values in (mean, spread))
            band(end, steps, smooth, width, index=index, label=arm)
    for axes in (losses, norms):
        axes.set_xscale("log")
        axes.set_yscale("log")
    loss = "loss in nats per character"
    dress(losses, x="step", y=loss, title="Training loss")
    dress(norms, x="step", y="gradient norm", title="Gradient before clipping")
    dress(end, x="step", y=loss, title="Arms that stay finite")
    legend_below(figure, losses)
    return figure


EXPERIMENT = Experiment(name="gradient_explosion", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
