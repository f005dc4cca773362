"""Compare optimizers, each at its best learning rate of a sweep."""

from collections.abc import Mapping, Sequence

import experiments.tuning as tuning
import numpy as np
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
# Centered on the best rate of a grid three times as coarse.
RATES: Mapping[str, tuple[float, ...]] = {
    "sgd": (0.1, 0.2, 0.4, 0.8),
    "adam": (1e-3, 2e-3, 4e-3, 8e-3),
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "lamb": (0.01, 0.02, 0.04, 0.08),
    "lion": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "muon": (0.005, 0.01, 0.02, 0.04),
    "adamw, untied head": (1e-3, 2e-3, 4e-3, 8e-3),
    "lion, untied head": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
}


def flags_of(arm: str) -> Flags:
    """Return the flags of an arm: an optimizer, or an optimizer with an untied output head."""
    name, _, untied = arm.partition(", ")
    return {"optimizer.name": name, **({"model.tied_head": "false"} if untied else {})}


def measure(options: Options) -> Json:
    """Sweep the learning rate of every optimizer, and run each at its best rate."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    arms = {name: {**flags, **flags_of(name)} for name in RATES}
    rates = {name: each[:2] if options.smoke else each for name, each in RATES.items()}
    return {"flags": flags, **tuning.compare(arms, rates, options.seeds)}


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags = results["flags"]
    losses = {arm: final_losses(each) for arm, each in by_arm(read_outcomes(results)).items()}
    return Page(
        title="Optimizer comparison with tuned learning rates",
        question="Which optimizer reaches the lowest loss of a small GPT after the same steps?",
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, {flags['schedule.warmup_steps']} steps of warm-up "
            "and cosine decay, gradient clipping at a global norm of 1. Each optimizer has the "
            "trainer's defaults for everything but the learning rate, weight decay included; muon "
            "updates matrices by Newton-Schulz and all other parameters by AdamW. Two arms have an "
            "output head of their own, `--model.tied_head false`. The sweep "
            "compares rates a factor of two apart, around the best of a coarser grid, over two "
            "seeds. The best rate is then run with "
            f"{len(next(iter(losses.values())))} other seeds."
        ),
        columns=tuning.COLUMNS,
        rows=tuning.rows(results),
        table_note=(
            "Validation loss in nats per token after the last step: mean ± standard deviation over "
            "the other seeds at the best rate, and mean over two seeds at each rate of the sweep."
        ),
        picture=(
            "Left: final validation loss over the learning rate. Right: validation loss over the "
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
                    ("lion, untied head", "adamw, untied head"),
                )
            ),
        ],
        conclusions=[
            f"Arms by mean loss, lowest first: {tuning.ranking(results)}.",
            tuning.not_tuned(results),
            "The best learning rate depends on the optimizer: tune it again when you change the "
            "optimizer. The left panel shows how sensitive each optimizer is.",
            "lion with a tied head stays in some seeds near the loss that it has after 60 steps; "
            "with an untied head every seed trains, to a loss "
            f"{100 * _excess(losses):.1f}% above that of adamw with one.",
            "Arms within one standard deviation of each other are not distinguishable here.",
        ],
        limits=[
            "The model is small and the run short: the fastest optimizer here need not reach the "
            "lowest loss in a longer run or with more parameters.",
            "The number of steps is equal, not the time: a step of muon costs more.",
            "LAMB and similar methods are designed for batches of thousands of sequences.",
            "Only the learning rate is tuned. The defaults of weight decay and betas favor some "
            "optimizers.",
        ],
    )  # fmt: skip


def _excess(losses: Mapping[str, Sequence[float]]) -> float:
    """Return how far the mean loss of lion is above that of adamw, both with an untied head."""
    lion, adamw = (float(np.mean(losses[f"{name}, untied head"])) for name in ("lion", "adamw"))
    return lion / adamw - 1


EXPERIMENT = Experiment(name="optimizers", measure=measure, page=page, draw=tuning.draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
