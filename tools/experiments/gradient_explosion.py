"""Gradient explosion in a deep model, and its cure: clipping and layer scale."""

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
SMOOTHED = 20  # of so many parts of the run, each is averaged in the picture
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
    """Run the four arms of the deep model, and the shallow one without a cure."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(arm=arm, flags={**flags, **change}, seed=seed)
        for seed in range(options.seeds)
        for arm, change in ARMS.items()
    ]
    return {"flags": flags, "runs": [outcome.as_json() for outcome in run_all(runs)]}


def skipped(outcome: Outcome) -> int:
    """Return how many steps were not finite; the guard skipped them."""
    return round(outcome.curves["train/skipped"][-1][1])


def first_skipped(outcome: Outcome) -> int | None:
    """Return the first step that was not finite."""
    return next((step for step, count in outcome.curves["train/skipped"] if count), None)


def largest(outcome: Outcome, metric: str) -> float:
    """Return the largest finite value of a metric."""
    return max(value for _, value in outcome.curves[metric] if math.isfinite(value))


def page(results: Json) -> Page:
    """Tell what came out."""
    arms = by_arm(read_outcomes(results))
    flags = results["flags"]
    return Page(
        title="Gradient explosion and its cure",
        question=(
            "Does a deep model that diverges to numbers that are not finite train stably with "
            "clipping and layer scale, at the same learning rate? Which of the two does it?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, with the "
            "norm after each sublayer (`--model.norm_position post`, as the first transformer had "
            f"it), on characters of `python-docs`: {flags['train.max_steps']} steps of "
            f"{flags['train.batch_size']} sequences of {flags['data.seq_len']}, SGD with momentum "
            f"{flags['optimizer.momentum']} at a constant rate of "
            f"{flags['optimizer.learning_rate']}, no warm-up. The arms turn on "
            f"`--optimizer.clip_norm {CLIP_NORM}` and `--model.layer_scale {LAYER_SCALE}`. A fifth "
            "arm has 4 layers and neither. Steps that are not finite are skipped and counted by "
            "the trainer; after 10 in a row it ends with exit code 3."
        ),
        columns=["arm", "steps not finite", "first at step", "exit codes", "largest loss",
                 "largest gradient norm", "validation loss"],
        rows=[_row(arm, outcomes) for arm, outcomes in arms.items()],
        table_note=(
            "By seed, separated by commas; the validation loss in nats a character, mean ± "
            "standard deviation over seeds, where all seeds came to the end. Largest values are "
            "the largest finite ones."
        ),
        picture=(
            "Left and middle: training loss and norm of the gradient at each step, a line for each "
            "seed; a cross is the last finite value of a run that the trainer ended. Right: the "
            "training loss of the arms of which no run was ended, averaged over "
            f"{flags['train.max_steps'] // SMOOTHED} steps; bands are one standard deviation over "
            "seeds."
        ),
        claims=_claims(arms),
        conclusions=[
            "The same depth, rate, seed and data, with and without the cure: what differs is the "
            "two flags.",
            "The trainer notices divergence by itself: steps that are not finite change nothing, "
            "are counted in `train/skipped`, and end the run after `--guard.max_skipped` in a row.",
            "Clipping bounds the length of a step and nothing else; whether it alone also lets the "
            "deep model learn is what its validation loss says.",
        ],
        limits=[
            "The rate was chosen so that the deep model diverges and one of 4 layers does not; at "
            "half of it neither may diverge, and at twice of it both may.",
            "The model is narrow and the run is short. Adam, warm-up and the norm before each "
            "sublayer, which the presets have, each make explosion rarer; they were left out.",
            "Characters with 32 of context: losses are far from what the text allows.",
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
        figures = f"steps that were not finite, by seed: {', '.join(map(str, counts[arm]))}"
        return Claim(text=text, holds=not any(counts[arm]), figures=figures)

    return [
        Claim(
            text="Without clipping and layer scale the deep model diverges to non-finite in every "
            "seed, and the trainer ends the run with exit code 3.",
            holds=all(counts["neither"]) and set(codes) == {3},
            figures=f"steps that were not finite, by seed: {', '.join(map(str, counts['neither']))}"
            f"; exit codes {', '.join(map(str, codes))}",
        ),
        stays_finite("With both, every step of every seed is finite.", "both"),
        stays_finite("Clipping alone is enough: every step of every seed is finite.", "clipping"),
        stays_finite(
            "Layer scale alone is enough: every step of every seed is finite.", "layer scale"
        ),
        stays_finite(
            "It is the depth: 4 layers at the same rate, with neither, stay finite in every seed.",
            SHALLOW,
        ),
        lower(
            "With both, the validation loss falls below that before training in every seed.",
            final_losses(arms["both"]),
            [o.curves["eval/loss"][0][1] for o in arms["both"]],
        ),
        lower(
            "Both together give a lower validation loss than clipping alone in every seed.",
            final_losses(arms["both"]),
            final_losses(arms["clipping"]),
        ),
        Claim(
            text="With both, seeds differ less in the end than with clipping alone.",
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
    loss = "loss in nats a character"
    dress(losses, x="step", y=loss, title="Training loss")
    dress(norms, x="step", y="norm of the gradient", title="Gradient before clipping")
    dress(end, x="step", y=loss, title="Arms that stay finite")
    legend_below(figure, losses)
    return figure


EXPERIMENT = Experiment(name="gradient_explosion", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
