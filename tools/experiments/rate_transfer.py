"""Compare the best learning rate of a small model with that of wider and deeper ones."""

from collections.abc import Mapping

import experiments.tuning as tuning
from experiments.arms import by_arm, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.runs import SMALL_GPT, Flags, Json

LAYERS, HEADS, WIDTH, TIMES = 2, 2, 32, 4
FLAGS: Flags = {
    **SMALL_GPT,
    "model.n_layer": LAYERS,
    "model.n_head": HEADS,
    "model.d_model": WIDTH,
    "train.max_steps": 400,
    "train.batch_size": 16,
    "train.eval_every": 200,
    "train.eval_tokens": 40_000,
    "train.sample_tokens": 0,
    "optimizer.b2": 0.99,
    "optimizer.weight_decay": 0.0,
    "schedule.warmup_steps": 40,
    "checkpoint.every": 1_000_000,
    "log.every": 20,
}
SMOKE: Flags = {
    "train.max_steps": 4, "train.eval_every": 2, "schedule.warmup_steps": 1, "data.seq_len": 16,
}  # fmt: skip
WIDER: Flags = {"model.d_model": TIMES * WIDTH, "model.n_head": TIMES * HEADS}
DEEPER: Flags = {"model.n_layer": TIMES * LAYERS}
SCALED: Flags = {"model.mup_base": WIDTH, "model.mup_base_depth": LAYERS}
BASE, MUP_WIDE, MUP_DEEP = "base", f"muP, {TIMES}x width", f"CompleteP, {TIMES}x depth"
WIDE, DEEP = f"standard, {TIMES}x width", f"standard, {TIMES}x depth"
ARMS: Mapping[str, Flags] = {
    BASE: {},
    MUP_WIDE: {**WIDER, **SCALED},
    MUP_DEEP: {**DEEPER, **SCALED},
    WIDE: WIDER,
    DEEP: DEEPER,
}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def measure(options: Options) -> Json:
    """Sweep the learning rate of every model, and run each at its best rate."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    arms = {name: {**flags, **change} for name, change in ARMS.items()}
    rates = dict.fromkeys(ARMS, RATES[:2] if options.smoke else RATES)
    return {"flags": flags, **tuning.compare(arms, rates, options.seeds)}


def steps_from_base(results: Json, arm: str) -> int:
    """Return the steps of the grid from the best rate of the base model to that of an arm."""
    tried = [*tuning.loss_by_rate(by_arm(read_outcomes(results, "sweep"))[arm])]
    best = results["best"]
    return tried.index(best[arm]) - tried.index(best[BASE])


def loss_at_rate_of_base(results: Json, arm: str) -> float:
    """Return how much higher the loss at the base model's best rate is than at the arm's own."""
    losses = tuning.loss_by_rate(by_arm(read_outcomes(results, "sweep"))[arm])
    return losses[results["best"][BASE]] - losses[results["best"][arm]]


def transfers(results: Json, arm: str) -> Claim:
    """Claim that the best rate of an arm is that of the base model, within a step of the grid."""
    found = steps_from_base(results, arm)
    return Claim(
        text=f"The best rate of *{arm}* is that of *{BASE}* within one step of the grid.",
        holds=abs(found) <= 1,
        figures=f"{results['best'][arm]:g} against {results['best'][BASE]:g}, {found:+d} steps; at "
        f"the rate of *{BASE}* its loss is {loss_at_rate_of_base(results, arm):.3f} nats higher",
    )


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags, best = results["flags"], results["best"]
    costs = {arm: loss_at_rate_of_base(results, arm) for arm in ARMS if arm != BASE}
    return Page(
        title="Transfer of the learning rate over width and depth",
        question="Is the learning rate that is best for a small model best for larger ones too?",
        setup=(
            f"*{BASE}* is a GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, "
            f"on `python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, AdamW without weight decay. The other models are "
            f"{TIMES} times as wide or as deep, in the standard parametrization or with "
            f"`model.mup_base {WIDTH}` and `model.mup_base_depth {LAYERS}`, which change nothing "
            f"in *{BASE}*. Rates double from one to the next; the sweep has two seeds."
        ),
        columns=tuning.COLUMNS,
        rows=tuning.rows(results),
        table_note=(
            "Validation loss in nats per token after the last step: mean over two seeds at each "
            "rate of the sweep, and mean ± standard deviation over other seeds at the best rate."
        ),
        picture=(
            "Left: final validation loss over the learning rate. Right: validation loss over the "
            "steps at the best rate; the band is one standard deviation over seeds."
        ),
        claims=[
            tuning.tuned_inside(results),
            *(transfers(results, arm) for arm in (MUP_WIDE, MUP_DEEP)),
            *(
                Claim(
                    text=f"The best rate of *{BASE}* is nearer to the lowest loss of *{less}* than "
                    f"to that of *{more}*.",
                    holds=costs[less] < costs[more],
                    figures=f"{costs[less]:.3f} against {costs[more]:.3f} nats above the loss at "
                    "the best rate of each",
                )
                for less, more in ((MUP_WIDE, WIDE), (MUP_DEEP, DEEP))
            ),
        ],
        conclusions=[
            "Best rates: " + ", ".join(f"*{arm}* {rate:g}" for arm, rate in best.items()) + ".",
            "Losses at their own best rates, lowest first: " + tuning.ranking(results) + ".",
            "In the standard parametrization the best rate differs from that of the base model by "
            f"{steps_from_base(results, WIDE):+d} steps of the grid at {TIMES}x width and "
            f"{steps_from_base(results, DEEP):+d} at {TIMES}x depth.",
            "`--scale.depth` sets both parametrizations, with the base where its rate was tuned.",
        ],
        limits=[
            "The models are tiny and the runs short; one step of the grid is a factor of two.",
            "Width and depth grow separately, and by one factor. Where the best rate of the "
            "standard parametrization does not move either, the page does not show that muP is "
            "needed.",
        ],
    )


EXPERIMENT = Experiment(name="rate_transfer", measure=measure, page=page, draw=tuning.draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
