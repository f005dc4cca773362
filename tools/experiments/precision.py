"""Precision: bfloat16 and float16 against float32."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from experiments.arms import by_arm, curve, deviation, final_losses, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, dress, legend_below, panels, zoom
from experiments.runs import Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

WITHIN = 0.001
FLAGS: Flags = {
    "data.corpus": "python-docs",
    "data.tokenizer": "bpe",
    "data.vocab_size": 512,
    "data.seq_len": 64,
    "model.max_seq_len": 64,
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.d_model": 64,
    "train.max_steps": 1200,
    "train.batch_size": 16,
    "train.eval_every": 150,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.b2": 0.99,
    "schedule.warmup_steps": 100,
    "guard.growth_interval": 300,
    "checkpoint.every": 1_000_000,
    "log.every": 10,
}
SMOKE: Flags = {"train.max_steps": 4, "train.eval_every": 2, "model.n_layer": 1}
PRECISIONS = ("fp32", "bf16", "fp16")


def measure(options: Options) -> Json:
    """Train each precision with the same seeds."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(arm=precision, flags={**flags, "train.precision": precision}, seed=seed)
        for seed in range(options.seeds)
        for precision in reversed(PRECISIONS)  # the slowest first
    ]
    outcomes = sorted(run_all(runs), key=lambda o: (o.seed, PRECISIONS.index(o.arm)))
    return {"flags": flags, "runs": [outcome.as_json() for outcome in outcomes]}


def page(results: Json) -> Page:
    """Tell what came out."""
    flags = results["flags"]
    arms = by_arm(read_outcomes(results))
    losses = {arm: final_losses(outcomes) for arm, outcomes in arms.items()}
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
            f"{flags['data.seq_len']} tokens, AdamW, {len(losses['fp32'])} seeds, which the arms "
            "share: the same initial parameters and the same batches. `--train.precision` is the "
            "only difference. Parameters and optimizer state are float32 in all arms; fp16 scales "
            f"the loss, doubling the scale after {flags['guard.growth_interval']} finite steps and "
            "halving it where gradients overflow."
        ),
        columns=["precision", "validation loss", "from fp32, mean", "from fp32, each seed",
                 "steps skipped", "last loss scale"],
        rows=[_row(arm, outcomes, losses) for arm, outcomes in arms.items()],
        table_note=(
            "Validation loss in nats a token, mean ± standard deviation over seeds; differences in "
            "per cent of the loss of fp32."
        ),
        picture=(
            "Left: validation loss over the steps, mean over seeds; bands are one standard "
            "deviation. Right: difference from fp32 of the same seed, mean and standard deviation; "
            f"dotted lines are ±{100 * WITHIN:g} %."
        ),
        claims=_claims(losses, arms),
        conclusions=[
            "Where the mean over seeds is within the bound and single seeds are not, the precision "
            "does not decide the loss: rounding drives two runs apart as another seed does.",
            "bf16 needs no loss scale; fp16 does, and the trainer's finds its own.",
        ],
        limits=[
            "On a CPU 16 bits are emulated: nothing is said of speed or memory, and products are "
            "summed as XLA's CPU compiler does it, not as tensor cores do.",
            "A small model for a short time; large ones, trained for long, meet larger activations "
            "and gradients, which is where fp16 overflows.",
            f"{len(losses['fp32'])} seeds bound the mean difference to about its standard "
            "deviation over the root of that number.",
        ],
    )  # fmt: skip


def differences(losses: Mapping[str, Sequence[float]], arm: str) -> list[float]:
    """Return the relative difference from fp32 of each seed."""
    return [a / b - 1 for a, b in zip(losses[arm], losses["fp32"], strict=True)]


def _row(arm: str, outcomes: Sequence[Outcome], losses: Mapping[str, Sequence[float]]) -> list[str]:
    apart = [100 * each for each in differences(losses, arm)]
    scales = [o.curves["train/loss_scale"][-1][1] for o in outcomes if arm == "fp16"]
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
    for arm in PRECISIONS[1:]:
        apart = differences(losses, arm)
        mean, worst = statistics.fmean(apart), max(map(abs, apart))
        found += [
            Claim(
                text=f"{arm}: the mean loss over seeds is within {100 * WITHIN:g} % of fp32's.",
                holds=abs(mean) < WITHIN,
                figures=f"{100 * mean:+.3f} %",
            ),
            Claim(
                text=f"{arm}: so is every single seed.",
                holds=worst < WITHIN,
                figures=f"at most {100 * worst:.3f} %",
            ),
        ]
    spread = deviation(losses["fp32"]) / statistics.fmean(losses["fp32"])
    largest = max(abs(each) for arm in PRECISIONS[1:] for each in differences(losses, arm))
    unscaled = [*arms["fp32"], *arms["bf16"]]
    skipped = sum(o.curves["train/skipped"][-1][1] for o in unscaled)
    return [
        *found,
        Claim(
            text="Another seed changes the loss of fp32 (one standard deviation) by more than "
            "another precision does in any seed.",
            holds=spread > largest,
            figures=f"{100 * spread:.3f} % against at most {100 * largest:.3f} %",
        ),
        Claim(
            text="fp32 and bf16 skip no step.", holds=skipped == 0, figures=f"{skipped:.0f} skipped"
        ),
    ]


def draw(results: Json) -> Figure:
    """Draw the curves, and the differences from fp32."""
    arms = by_arm(read_outcomes(results))
    figure, (losses, apart) = panels(2)
    by_seed = {
        arm: {o.seed: curve([o], "eval/loss") for o in outcomes} for arm, outcomes in arms.items()
    }
    for index, (arm, outcomes) in enumerate(arms.items()):
        steps, mean, spread = curve(outcomes, "eval/loss")
        band(losses, steps, mean, spread, index=index, label=arm, dashed=bool(index))
        off = np.array([
            100 * (by_seed[arm][seed][1] / by_seed["fp32"][seed][1] - 1) for seed in by_seed["fp32"]
        ])  # fmt: skip
        deviation = off.std(axis=0, ddof=1) if len(off) > 1 else 0 * off[0]
        band(apart, steps, off.mean(axis=0), deviation, index=index, label=arm, dashed=bool(index))
    zoom(losses, [curve(arms["fp32"], "eval/loss")[1][1:]], share=1.0)
    for bound in (-100 * WITHIN, 100 * WITHIN):
        apart.axhline(bound, color="black", linestyle=":", linewidth=1)
    dress(losses, x="step", y="validation loss in nats a token", title="Validation loss")
    dress(apart, x="step", y="difference in %", title="From fp32 of the same seed")
    legend_below(figure, losses)
    return figure


EXPERIMENT = Experiment(name="precision", measure=measure, page=page, draw=draw, seeds=4)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
