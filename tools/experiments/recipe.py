"""Train with a recipe for fewer steps than a tuned AdamW takes to the same loss."""

from collections.abc import Mapping, Sequence

from experiments import tuning
from experiments.arms import (
    by_arm,
    curve,
    final_losses,
    lower,
    mean_sd,
    paired_p_value,
    read_outcomes,
)
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, dress, legend_below, panels, zoom
from experiments.runs import SMALL_GPT, Flags, Json, Run, run_all, say
from matplotlib.figure import Figure

FLAGS: Flags = {
    **{name: value for name, value in SMALL_GPT.items() if name != "data.corpus"},
    "data.holdout": "tail",
    "model.d_model": 160,
    "train.max_steps": 400,
    "train.batch_size": 16,
    "train.eval_every": 50,
    "train.eval_tokens": 40_000,
    "train.sample_tokens": 0,
    "checkpoint.every": 1_000_000,
    "log.every": 50,
}
SMOKE: Flags = {"train.max_steps": 4, "train.eval_every": 2, "model.n_layer": 1}
BASELINE, RECIPE = "adamw", "recipe"
SHARE = 0.4  # of the baseline's steps
RATES = {BASELINE: (5e-4, 1e-3, 2e-3, 4e-3), RECIPE: (2.5e-3, 5e-3, 1e-2, 2e-2)}
# Settings of the baseline, each kept if it lowers the mean loss of the sweep, in this order.
TUNED: tuple[Flags, ...] = (
    {"schedule.name": "linear", "schedule.final_fraction": 0},
    {"schedule.warmup_steps": 80},
    {"schedule.warmup_steps": 20},
    {"optimizer.weight_decay": 0.3},
    {"optimizer.weight_decay": 0.03},
    {"optimizer.b1": 0.95},
    {"optimizer.b2": 0.99},
)
WARMUP: Flags = {"schedule.name": "cosine", "schedule.warmup_steps": 40}
# What the recipe changes; docs/models.md and docs/optimizers.md have the sources.
CHANGES: Flags = {
    "optimizer.name": "muon",
    "optimizer.polar_express": "true",
    "optimizer.neuron_b2": 0.95,
    "schedule.name": "linear",
    "schedule.final_fraction": 0,
    "schedule.warmup_steps": 10,
    "model.positions": "rope",
    "model.norm": "rmsnorm",
    "model.bias": "false",
    "model.qk_norm": "true",
    "model.activation": "relu2",
    "model.zero_init_residual": "true",
    "model.tied_head": "false",
}


def measure(options: Options) -> Json:
    """Tune AdamW and the recipe's learning rate, and run both with other seeds."""
    flags = {**FLAGS, **options.data, **(SMOKE if options.smoke else {})}
    steps = round(SHARE * int(flags["train.max_steps"]))
    recipe = {**flags, **CHANGES, "train.max_steps": steps}
    rates = {arm: tried[:2] if options.smoke else tried for arm, tried in RATES.items()}
    baseline, tuned = tune({**flags, **WARMUP}, rates[BASELINE], options)
    sweep = run_all(
        [
            Run(arm=RECIPE, flags={**recipe, tuning.RATE: rate}, seed=seed)
            for rate in rates[RECIPE]
            for seed in tuning.SWEEP_SEEDS
        ],
        journal=options.journal,
    )
    arms = {BASELINE: baseline, RECIPE: {**recipe, tuning.RATE: tuning.best_rate(sweep)}}
    first = len(tuning.SWEEP_SEEDS)
    runs = run_all(
        [
            Run(arm=arm, flags=arms[arm], seed=seed)
            for seed in range(first, first + options.seeds)
            for arm in arms
        ],
        journal=options.journal,
    )
    return {
        "flags": flags,
        "arms": arms,
        "tuned": tuned,
        "sweep": [outcome.as_json() for outcome in sweep],
        "runs": [outcome.as_json() for outcome in runs],
    }


def tune(flags: Flags, rates: Sequence[float], options: Options) -> tuple[Flags, list[Json]]:
    """Tune AdamW: its learning rate, then each of `TUNED`.

    Returns
    -------
    flags : mapping
        The flags with the lowest mean loss over the seeds of the sweep.
    tried : list of dict
        What was changed at each trial, "loss", and whether it was "kept".
    """
    changes: tuple[Flags, ...] = tuple({tuning.RATE: rate} for rate in rates)
    best, lowest = flags, float("inf")
    tried: list[Json] = []
    for change in (*changes, *(TUNED[:1] if options.smoke else TUNED)):
        candidate = {**best, **change}
        outcomes = run_all(
            [Run(arm=BASELINE, flags=candidate, seed=seed) for seed in tuning.SWEEP_SEEDS],
            journal=options.journal,
        )
        losses = final_losses(outcomes)
        loss = sum(losses) / len(losses)
        kept = loss < lowest
        if kept:
            best, lowest = candidate, loss
        tried.append({"change": dict(change), "loss": loss, "kept": kept})
        say(f"{change}: {loss:.4f}{', kept' if kept else ''}")
    return best, tried


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags, arms = results["flags"], results["arms"]
    outcomes = by_arm(read_outcomes(results))
    losses = {arm: final_losses(each) for arm, each in outcomes.items()}
    steps = {arm: int(arms[arm]["train.max_steps"]) for arm in arms}
    seconds = {arm: [each.seconds for each in outcomes[arm]] for arm in arms}
    p_value = paired_p_value(losses[RECIPE], losses[BASELINE])
    changed = ", ".join(f"`--{name} {value}`" for name, value in CHANGES.items())
    kept = ", ".join(_words(each["change"]) for each in results["tuned"] if each["kept"])
    return Page(
        title="A recipe that takes fewer steps than a tuned AdamW to the same loss",
        question=(
            "Do the improvements of current speed runs together take less than half of the steps "
            "of a tuned AdamW to the same loss?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide (1.2 million "
            "parameters without embeddings), on novels with a BPE vocabulary of "
            f"{flags['data.vocab_size']}, in batches of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens. *{BASELINE}* is the GPT-2 architecture for "
            f"{steps[BASELINE]} steps; learning rate, schedule, warm-up, weight decay and betas "
            "are tuned one after the other over two seeds. "
            f"*{RECIPE}* runs for {steps[RECIPE]} steps and changes {changed}; only its learning "
            "rate is tuned, over two seeds. Both are then run with "
            f"{len(losses[BASELINE])} other seeds; a seed decides parameters and data order of "
            "both."
        ),
        columns=("arm", "steps", "learning rate", "validation loss", "seconds"),
        rows=[
            [arm, f"{steps[arm]}", f"{arms[arm][tuning.RATE]:g}", mean_sd(losses[arm]),
             f"{sum(seconds[arm]) / len(seconds[arm]):.0f}"]
            for arm in arms
        ],
        table_note=(
            "Validation loss in nats per token after the last step, mean ± standard deviation over "
            "the seeds; mean seconds of a run on one core, compilation included. Kept in tuning "
            f"AdamW: {kept}."
        ),
        picture=(
            "Validation loss over the steps, mean over the seeds; the band is one standard "
            "deviation."
        ),
        claims=[
            lower(
                f"In {steps[RECIPE] / steps[BASELINE]:g} of the steps, the recipe reaches a lower "
                "validation loss than tuned AdamW in every seed.",
                losses[RECIPE],
                losses[BASELINE],
            ),
            Claim(
                text="The difference is significant at p < 0.01 (sign-flip test of the paired "
                "differences, one-sided).",
                holds=p_value < 0.01,
                figures=f"p = {p_value:.2g} with {len(losses[RECIPE])} seeds",
            ),
        ],
        conclusions=[
            f"Final losses: {mean_sd(losses[RECIPE])} after {steps[RECIPE]} steps against "
            f"{mean_sd(losses[BASELINE])} after {steps[BASELINE]}.",
            "The page compares the whole recipe. It does not say what each of its parts adds.",
        ],
        limits=[
            "The model is small and the runs are short; at other scales the ratio differs.",
            "A step of the recipe costs more than one of AdamW: the column of seconds includes it.",
            "AdamW is tuned one setting after the other, not jointly.",
            *results.get("notes", ()),
        ],
    )  # fmt: skip


def _words(change: Mapping[str, str | int | float]) -> str:
    return " ".join(f"`--{name} {value}`" for name, value in change.items())


def draw(results: Json) -> Figure:
    """Draw the validation loss over the steps."""
    figure, (axes,) = panels(1, height=4.2)
    ends = []
    for index, (arm, outcomes) in enumerate(by_arm(read_outcomes(results)).items()):
        steps, mean, spread = curve(outcomes, "eval/loss")
        ends.append(mean[1:])
        band(axes, steps, mean, spread, index=index, label=arm)
    zoom(axes, ends, share=0.95)
    dress(axes, x="step", y="validation loss in nats per token", title="")
    legend_below(figure, axes)
    return figure


EXPERIMENT = Experiment(
    name="recipe", measure=measure, page=page, draw=draw, seeds=10, text_flag="--data.path"
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
