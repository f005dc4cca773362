"""Compare learning-rate schedules, each at its best peak rate of a sweep."""

from collections.abc import Mapping

import experiments.tuning as tuning
from experiments.arms import by_arm, final_losses, lower, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Page
from experiments.runs import SMALL_GPT, Flags, Json

FLAGS: Flags = {
    **SMALL_GPT,
    "train.max_steps": 600,
    "train.batch_size": 16,
    "train.eval_every": 100,
    "train.eval_tokens": 40_000,
    "train.sample_tokens": 0,
    "optimizer.b2": 0.99,
    "checkpoint.every": 1_000_000,
    "log.every": 20,
}
SMOKE: Flags = {"train.max_steps": 4, "train.eval_every": 2, "model.n_layer": 1}
WARMUP = 60
NONE, HOLD = "none", "hold (wsd)"
ARMS: Mapping[str, Flags] = {
    NONE: {"schedule.name": "constant", "schedule.warmup_steps": 0},
    "linear": {"schedule.name": "linear"},
    "cosine": {"schedule.name": "cosine"},
    "inverse_sqrt": {"schedule.name": "inverse_sqrt"},
    HOLD: {"schedule.name": "wsd"},
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def measure(options: Options) -> Json:
    """Sweep the peak rate of every schedule, and run each at its best rate."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    warmup = {"schedule.warmup_steps": 1 if options.smoke else WARMUP}
    arms = {name: {**flags, **warmup, **change} for name, change in ARMS.items()}
    rates = dict.fromkeys(ARMS, RATES[:2] if options.smoke else RATES)
    return {"flags": {**flags, **warmup}, **tuning.compare(arms, rates, options.seeds)}


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags = results["flags"]
    losses = {arm: final_losses(each) for arm, each in by_arm(read_outcomes(results)).items()}
    return Page(
        title="Learning-rate schedules with tuned peak rates",
        question="Does decaying the learning rate lower the loss, and which schedule is best?",
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, AdamW. *none* is a constant rate without warm-up; "
            f"the others have {flags['schedule.warmup_steps']} steps of warm-up. *linear* and "
            "*cosine* decay to a tenth of the peak; *hold* is warm-up, stable, decay (WSD): the "
            "peak rate, then decay in the last fifth; *inverse_sqrt* decays with the inverse "
            "square root of the step. The sweep compares peak rates over two seeds. The best rate "
            "is then run with "
            f"{len(next(iter(losses.values())))} other seeds."
        ),
        columns=tuning.COLUMNS,
        rows=tuning.rows(results),
        table_note=(
            "Validation loss in nats per token after the last step: mean ± standard deviation over "
            "the other seeds at the best rate, and mean over two seeds at each rate of the sweep."
        ),
        picture=(
            "Left: final validation loss over the peak rate. Right: validation loss over the steps "
            "at the best rate; the band is one standard deviation over seeds."
        ),
        claims=[
            tuning.tuned_inside(results),
            tuning.stable(results),
            *(
                lower(
                    f"{arm} has a lower validation loss than no schedule in every seed.",
                    losses[arm],
                    losses[NONE],
                )
                for arm in ARMS
                if arm != NONE
            ),
            lower(
                "cosine has a lower validation loss than inverse_sqrt in every seed.",
                losses["cosine"],
                losses["inverse_sqrt"],
            ),
            lower(
                "hold has a lower validation loss than cosine in every seed.",
                losses[HOLD],
                losses["cosine"],
            ),
        ],
        conclusions=[
            f"Arms by mean loss, lowest first: {tuning.ranking(results)}.",
            tuning.not_tuned(results),
            "Compare schedules at the last step only: the loss of a schedule that decays late is "
            "higher before the decay.",
            "*hold* (until its decay begins) and *inverse_sqrt* do not depend on the total number "
            "of steps; *linear* and *cosine* do.",
        ],
        limits=[
            "The model is small and the runs cover about half an epoch; with few steps at a low "
            "rate the differences between schedules are small.",
            "The sweep has four peak rates per schedule; a finer grid may change the loss of an "
            "arm by about as much as another seed.",
            "The decay length of *hold* and the final rate of *linear* and *cosine* have the "
            "trainer's defaults.",
        ],
    )


EXPERIMENT = Experiment(name="schedules", measure=measure, page=page, draw=tuning.draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
