"""Optimizers, each at its own best learning rate."""

from collections.abc import Mapping

import experiments.tuning as tuning
from experiments.arms import by_arm, final_losses, lower, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Page
from experiments.runs import SMALL_GPT, Flags, Json

FLAGS: Flags = {
    **SMALL_GPT,
    "train.max_steps": 500,
    "train.batch_size": 16,
    "train.eval_every": 100,
    "train.eval_tokens": 40_000,
    "train.sample_tokens": 0,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 50,
    "checkpoint.every": 1_000_000,
    "log.every": 20,
}
SMOKE: Flags = {"train.max_steps": 3, "train.eval_every": 2, "model.n_layer": 1}
# Around the best of a grid three times as coarse.
RATES: Mapping[str, tuple[float, ...]] = {
    "sgd": (0.1, 0.2, 0.4, 0.8),
    "adam": (1e-3, 2e-3, 4e-3, 8e-3),
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "lamb": (0.01, 0.02, 0.04, 0.08),
    "lion": (2e-4, 4e-4, 8e-4, 1.6e-3),
    "muon": (0.005, 0.01, 0.02, 0.04),
}


def measure(options: Options) -> Json:
    """Tune every optimizer, and run each at its best."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    arms = {name: {**flags, "optimizer.name": name} for name in RATES}
    rates = {name: each[:2] if options.smoke else each for name, each in RATES.items()}
    return {"flags": flags, **tuning.compare(arms, rates, options.seeds)}


def page(results: Json) -> Page:
    """Tell what came out."""
    flags = results["flags"]
    losses = {arm: final_losses(each) for arm, each in by_arm(read_outcomes(results)).items()}
    return Page(
        title="Optimizers at their own best rates",
        question="Which optimizer brings a small GPT furthest in the same number of steps?",
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, {flags['schedule.warmup_steps']} steps of warm-up "
            "and a cosine, clipping by a global norm of 1. Each optimizer has the trainer's "
            "defaults for everything but the rate, its weight decay included; muon's matrices go "
            "by Newton-Schulz and the rest by AdamW. Rates, a factor of two apart around the best "
            "of a coarser grid, were compared over two seeds, and the best run with "
            f"{len(next(iter(losses.values())))} others."
        ),
        columns=tuning.COLUMNS,
        rows=tuning.rows(results),
        table_note=(
            "Validation loss in nats a token after the last step: mean ± standard deviation over "
            "other seeds at the best rate, and the mean over two seeds at each rate tried."
        ),
        picture=(
            "Left: validation loss at the end by learning rate. Right: validation loss over the "
            "steps at the best rate; the band is one standard deviation over seeds."
        ),
        claims=[
            tuning.tuned_inside(results),
            tuning.stable(results),
            *(
                lower(
                    f"{better} has a lower validation loss than {worse} in every seed.",
                    losses[better],
                    losses[worse],
                )
                for better, worse in (
                    ("adamw", "sgd"), ("muon", "adamw"), ("lion", "adamw"), ("adamw", "lamb"),
                )
            ),
        ],
        conclusions=[
            f"From the lowest mean loss to the highest: {tuning.ranking(results)}.",
            tuning.not_tuned(results),
            "A rate of one optimizer is none for another: tune it where the optimizer is changed. "
            "The left picture shows how wide each one's valley is.",
            "Arms that lie within a standard deviation of each other are not told apart here.",
        ],
        limits=[
            "A model of this size after so few steps: what is fastest at the start need not be "
            "lowest at the end, nor with more parameters.",
            "The same number of steps, not the same time: a step of muon costs more.",
            "LAMB and LARS-like methods are made for batches of thousands of sequences.",
            "Only the rate was tuned. Weight decay and the betas have defaults, which suit some "
            "more than others.",
        ],
    )  # fmt: skip


EXPERIMENT = Experiment(name="optimizers", measure=measure, page=page, draw=tuning.draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
