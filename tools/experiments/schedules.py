"""Learning-rate schedules, each at its own best peak rate."""

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
    """Tune the peak rate of every schedule, and run each at its best."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    warmup = {"schedule.warmup_steps": 1 if options.smoke else WARMUP}
    arms = {name: {**flags, **warmup, **change} for name, change in ARMS.items()}
    rates = dict.fromkeys(ARMS, RATES[:2] if options.smoke else RATES)
    return {"flags": {**flags, **warmup}, **tuning.compare(arms, rates, options.seeds)}


def page(results: Json) -> Page:
    """Tell what came out."""
    flags = results["flags"]
    losses = {arm: final_losses(each) for arm, each in by_arm(read_outcomes(results)).items()}
    return Page(
        title="Schedules at their own best peak rates",
        question="What does it bring to let the learning rate fall, and in which shape?",
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"`python-docs` with a BPE vocabulary of {flags['data.vocab_size']}: "
            f"{flags['train.max_steps']} steps of {flags['train.batch_size']} sequences of "
            f"{flags['data.seq_len']} tokens, AdamW. *none* is a constant rate without warm-up; "
            f"the others have {flags['schedule.warmup_steps']} steps of warm-up. *linear* and "
            "*cosine* fall to a tenth of the peak; *hold* is warm-up, stable, decay: the peak, and "
            "a fall in the last fifth; *inverse_sqrt* falls with the root of the step. Peaks were "
            f"compared over two seeds, and the best run with "
            f"{len(next(iter(losses.values())))} others."
        ),
        columns=tuning.COLUMNS,
        rows=tuning.rows(results),
        table_note=(
            "Validation loss in nats a token after the last step: mean ± standard deviation over "
            "other seeds at the best peak, and the mean over two seeds at each peak tried."
        ),
        picture=(
            "Left: validation loss at the end by peak rate. Right: validation loss over the steps "
            "at the best peak; the band is one standard deviation over seeds."
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
            f"From the lowest mean loss to the highest: {tuning.ranking(results)}.",
            tuning.not_tuned(results),
            "Runs are to be compared at their ends, not on the way: a schedule that falls late is "
            "not yet where it will be.",
            "*hold* and *inverse_sqrt* need not know the end of the run beforehand (hold until its "
            "fall begins); *linear* and *cosine* must.",
        ],
        limits=[
            "Short runs of a small model, of about half an epoch; without many steps at a low rate "
            "differences between shapes are small.",
            "Four peaks a schedule: a finer grid may move any arm by about what a seed does.",
            "The fall of *hold* and the end of *linear* and *cosine* have the trainer's defaults.",
        ],
    )


EXPERIMENT = Experiment(name="schedules", measure=measure, page=page, draw=tuning.draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
