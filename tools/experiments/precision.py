"""Precision: bfloat16 and float16 against float32."""

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
# At the second, which learns faster, two runs that differ in rounding alone drift apart.
CALM, FAST = 1e-3, 3e-3


def measure(options: Options) -> Json:
    """Train each precision at each rate with the same seeds."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(
            arm=arm_of(precision, rate),
            flags={**flags, "train.precision": precision, "optimizer.learning_rate": rate},
            seed=seed,
        )
        for seed in range(options.seeds)
        for precision in reversed(PRECISIONS)  # the slowest first
        for rate in (CALM, FAST)
    ]
    outcomes = sorted(run_all(runs), key=lambda o: (o.seed, ARMS.index(o.arm)))
    return {"flags": flags, "runs": [outcome.as_json() for outcome in outcomes]}


def arm_of(precision: str, rate: float) -> str:
    """Name an arm."""
    return f"{precision}, {rate:g}"


ARMS = [arm_of(precision, rate) for rate in (CALM, FAST) for precision in PRECISIONS]


def page(results: Json) -> Page:
    """Tell what came out."""
    flags = results["flags"]
    arms = by_arm(read_outcomes(results))
    losses = {arm: final_losses(outcomes) for arm, outcomes in arms.items()}
    seeds = len(losses[ARMS[0]])
    fast = [arm_of(precision, FAST) for precision in PRECISIONS[1:]]
    largest = max(abs(each) for arm in fast for each in differences(losses, arm))
    return Page(
        title="Precision: bf16 and fp16 against fp32",
        question=(
            "Does training that computes in 16 bits end at the loss of float32, within "
            f"{100 * WITHIN:g} %?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, AdamW at two peak rates, {CALM:g} and {FAST:g}, "
            f"{seeds} seeds, which the arms share: the same initial parameters and the same "
            "batches. `--train.precision` is the only difference. Parameters and optimizer state "
            "are float32 in all arms; fp16 scales the loss, doubling the scale after "
            f"{flags['guard.growth_interval']} finite steps and halving it where gradients "
            "overflow."
        ),
        columns=["precision, rate", "validation loss", "from fp32, mean", "from fp32, each seed",
                 "steps skipped", "last loss scale"],
        rows=[_row(arm, outcomes, losses) for arm, outcomes in arms.items()],
        table_note=(
            "Validation loss in nats a token, mean ± standard deviation over seeds; differences in "
            "per cent of the loss of fp32 at the same rate."
        ),
        picture=(
            "Difference of the validation loss from fp32 of the same seed over the steps, mean and "
            f"standard deviation over seeds; dotted lines are ±{100 * WITHIN:g} %. Left: at the "
            f"rate {CALM:g}. Right: at {FAST:g}."
        ),
        claims=_claims(losses, arms),
        conclusions=[
            f"At the rate {CALM:g} the runs of a seed stay together, and what 16 bits change can "
            f"be measured. At {FAST:g} rounding may drive them apart, by up to "
            f"{100 * largest:.2f} % here: that is the difference of two runs, such as two seeds "
            "have, and says nothing of the precision.",
            "bf16 needs no loss scale; fp16 does, and the trainer's finds its own.",
        ],
        limits=[
            "On a CPU 16 bits are emulated: nothing is said of speed or memory, and products are "
            "summed as XLA's CPU compiler does it, not as tensor cores do.",
            "A small model for a short time; large ones, trained for long, meet larger activations "
            "and gradients, which is where fp16 overflows.",
            f"{seeds} seeds bound a mean difference to about its standard deviation over the root "
            "of that number.",
        ],
    )  # fmt: skip


def differences(losses: Mapping[str, Sequence[float]], arm: str) -> list[float]:
    """Return the relative difference from fp32 at the same rate, of each seed."""
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
                    "fp32's in every seed.",
                    holds=worst < WITHIN,
                    figures=f"{100 * mean:+.3f} % in the mean, at most {100 * worst:.3f} %",
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
            text=f"At {CALM:g} another seed changes the loss of fp32 (one standard deviation) by "
            "more than another precision does in any seed.",
            holds=spread > largest,
            figures=f"{100 * spread:.3f} % against at most {100 * largest:.3f} %",
        ),
        Claim(
            text="fp32 and bf16 skip no step.", holds=skipped == 0, figures=f"{skipped:.0f} skipped"
        ),
    ]


def draw(results: Json) -> Figure:
    """Draw the differences from fp32 at each rate."""
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
        dress(each, x="step", y="difference from fp32 in %", title=f"At the rate {rate:g}")
    legend_below(figure, axes[0])
    return figure


EXPERIMENT = Experiment(name="precision", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
