"""Compare training in bfloat16 and float16 with float32."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from experiments.arms import by_arm, curve, deviation, final_losses, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, dress, legend_below, panels
from experiments.runs import SMALL_GPT, Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

WITHIN = 0.001
FLAGS: Flags = {
    **SMALL_GPT,
    "train.max_steps": 1200,
    "train.batch_size": 16,
    "train.eval_every": 150,
    "train.sample_tokens": 0,
    "optimizer.b2": 0.99,
    "schedule.warmup_steps": 100,
    "guard.growth_interval": 300,
    "checkpoint.every": 1_000_000,
    "log.every": 10,
}
SMOKE: Flags = {"train.max_steps": 4, "train.eval_every": 2, "model.n_layer": 1}
PRECISIONS = ("fp32", "bf16", "fp16")
# At the second, higher rate, two runs that differ only in rounding diverge from each other.
CALM, FAST = 1e-3, 3e-3


def measure(options: Options) -> Json:
    """Train with each precision at each learning rate with the same seeds."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(
            arm=arm_of(precision, rate),
            flags={**flags, "train.precision": precision, "optimizer.learning_rate": rate},
            seed=seed,
        )
        for seed in range(options.seeds)
        for precision in reversed(PRECISIONS)  # slowest first
        for rate in (CALM, FAST)
    ]
    outcomes = sorted(run_all(runs), key=lambda o: (o.seed, ARMS.index(o.arm)))
    return {"flags": flags, "runs": [outcome.as_json() for outcome in outcomes]}


def arm_of(precision: str, rate: float) -> str:
    """Return the name of the arm of a precision and a learning rate."""
    return f"{precision}, {rate:g}"


ARMS = [arm_of(precision, rate) for rate in (CALM, FAST) for precision in PRECISIONS]


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags = results["flags"]
    arms = by_arm(read_outcomes(results))
    losses = {arm: final_losses(outcomes) for arm, outcomes in arms.items()}
    seeds = len(losses[ARMS[0]])
    fast = [arm_of(precision, FAST) for precision in PRECISIONS[1:]]
    largest = max(abs(each) for arm in fast for each in differences(losses, arm))
    return Page(
        title="Mixed precision: bf16 and fp16 compared with fp32",
        question=(
            "Does training in bf16 or fp16 reach the loss of float32 within "
            f"{100 * WITHIN:g} %?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, AdamW at two peak rates, {CALM:g} and {FAST:g}, "
            f"{seeds} seeds. Arms share the seeds, and so the initial parameters and the batches; "
            "`--train.precision` is the only difference. Parameters and optimizer state "
            "are float32 in all arms; fp16 uses dynamic loss scaling, which doubles the scale "
            f"after {flags['guard.growth_interval']} finite steps and halves it when gradients "
            "overflow."
        ),
        columns=["precision, rate", "validation loss", "difference, mean", "difference, by seed",
                 "steps skipped", "final loss scale"],
        rows=[_row(arm, outcomes, losses) for arm, outcomes in arms.items()],
        table_note=(
            "Validation loss in nats per token, mean ± standard deviation over seeds; difference "
            "from fp32 at the same learning rate, in percent."
        ),
        picture=(
            "Difference of the validation loss from fp32 with the same seed over the steps: mean "
            f"and standard deviation over seeds; dotted lines are ±{100 * WITHIN:g} %. Left: "
            f"learning rate {CALM:g}. Right: {FAST:g}."
        ),
        claims=_claims(losses, arms),
        conclusions=[
            f"At the learning rate {CALM:g} runs with the same seed stay close, so the effect of "
            f"precision is measurable. At {FAST:g} rounding differences grow over the run, to "
            f"{100 * largest:.2f} % here: that is variation between runs, as between seeds, and "
            "not an effect of precision.",
            "bf16 needs no loss scaling; fp16 does, and the trainer adjusts the scale dynamically.",
        ],
        limits=[
            "The CPU emulates 16-bit types: speed and memory are not measured, and products are "
            "accumulated as XLA does on CPUs, not as on tensor cores.",
            "The model is small and the runs are short; larger models and longer runs have larger "
            "activations and gradients, at which fp16 may overflow.",
            f"With {seeds} seeds, the standard error of a mean difference is its standard "
            f"deviation divided by the square root of {seeds}.",
        ],
    )  # fmt: skip


def differences(losses: Mapping[str, Sequence[float]], arm: str) -> list[float]:
    """Return the relative difference from fp32 at the same rate, by seed."""
    reference = losses["fp32, " + arm.partition(", ")[2]]
    return [a / b - 1 for a, b in zip(losses[arm], reference, strict=True)]


def _row(arm: str, outcomes: Sequence[Outcome], losses: Mapping[str, Sequence[float]]) -> list[str]:
    apart = [100 * each for each in differences(losses, arm)]
    scales = [o.curves["train/loss_scale"][-1][1] for o in outcomes if arm.startswith("fp16")]
    return [
        arm,
        mean_sd(losses[arm], 4),
        f"{statistics.fmean(apart):+.3f} %",
        ", ".join(f"{each:+.3f} %" for each in apart),
        ", ".join(f"{o.curves['train/skipped'][-1][1]:.0f}" for o in outcomes),
        ", ".join(f"{scale:.0f}" for scale in scales) or "-",
    ]


def _claims(
    losses: Mapping[str, Sequence[float]], arms: Mapping[str, Sequence[Outcome]]
) -> list[Claim]:
    found = []
    for rate in (CALM, FAST):
        for precision in PRECISIONS[1:]:
            apart = differences(losses, arm_of(precision, rate))
            mean, worst = statistics.fmean(apart), max(map(abs, apart))
            found.append(
                Claim(
                    text=f"{precision} at {rate:g}: the loss is within {100 * WITHIN:g} % of "
                    "that of fp32 in every seed.",
                    holds=worst < WITHIN,
                    figures=f"{100 * mean:+.3f} % on average, at most {100 * worst:.3f} %",
                )
            )
    calm = losses[arm_of("fp32", CALM)]
    spread = deviation(calm) / statistics.fmean(calm)
    largest = max(abs(d) for p in PRECISIONS[1:] for d in differences(losses, arm_of(p, CALM)))
    unscaled = [o for arm, each in arms.items() for o in each if not arm.startswith("fp16")]
    skipped = sum(o.curves["train/skipped"][-1][1] for o in unscaled)
    return [
        *found,
        Claim(
            text=f"At {CALM:g} the standard deviation of the fp32 loss over seeds exceeds the "
            "difference between precisions in every seed.",
            holds=spread > largest,
            figures=f"{100 * spread:.3f} % against at most {100 * largest:.3f} %",
        ),
        Claim(
            text="fp32 and bf16 skip no steps.",
            holds=skipped == 0,
            figures=f"{skipped:.0f} skipped",
        ),
    ]


def draw(results: Json) -> Figure:
    """Draw the difference from fp32 over the steps at each rate."""
    arms = by_arm(read_outcomes(results))
    figure, axes = panels(2)
    for each, rate in zip(axes, (CALM, FAST), strict=True):
        reference = {o.seed: curve([o], "eval/loss")[1] for o in arms[arm_of("fp32", rate)]}
        for index, precision in enumerate(PRECISIONS[1:], start=1):
            curves = {o.seed: curve([o], "eval/loss") for o in arms[arm_of(precision, rate)]}
            off = np.array(
                [100 * (found / reference[s] - 1) for s, (_, found, _) in curves.items()]
            )
            steps = next(iter(curves.values()))[0]
            deviation = off.std(axis=0, ddof=1) if len(off) > 1 else 0 * off[0]
            mean = off.mean(axis=0)
            band(each, steps, mean, deviation, index=index, label=precision, dashed=index > 1)
        for bound in (-100 * WITHIN, 100 * WITHIN):
            each.axhline(bound, color="black", linestyle=":", linewidth=1)
        dress(each, x="step", y="difference from fp32 in %", title=f"Learning rate {rate:g}")
    legend_below(figure, axes[0])
    return figure


EXPERIMENT = Experiment(name="precision", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
