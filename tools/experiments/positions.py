"""Compare position encodings: loss at the training length and beyond it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from experiments.arms import Numbers, by_arm, final_losses, lower, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Page
from experiments.pictures import band, dress, legend_below, panels
from experiments.runs import SMALL_GPT, Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

import tjx_data
import tjx_nn
from tjx_eval.load_model import load_model

SEQ_LEN = 64
LONGEST = 4 * SEQ_LEN
BIN = 8  # positions averaged per point of the figure
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")
FLAGS: Flags = {
    **SMALL_GPT,
    "data.seq_len": SEQ_LEN,
    "model.max_seq_len": LONGEST,
    "model.init_std": 0.125,
    "train.max_steps": 1500,
    "train.batch_size": 16,
    "train.eval_every": 250,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.b2": 0.99,
    "schedule.warmup_steps": 100,
    "checkpoint.every": 1_000_000,
    "log.every": 50,
}
SMOKE: Flags = {"train.max_steps": 4, "train.eval_every": 2, "model.n_layer": 1}


def measure(options: Options) -> Json:
    """Train every arm at `SEQ_LEN`, and evaluate it at four times that length."""
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    runs = [
        Run(
            arm=positions,
            flags={**flags, "model.positions": positions},
            seed=seed,
            after=loss_by_position,
        )
        for seed in range(options.seeds)
        for positions in POSITIONS
    ]
    return {"flags": flags, "runs": [outcome.as_json() for outcome in run_all(runs)]}


def loss_by_position(run_dir: Path) -> Json:
    """Return the mean loss at each position of held-out windows of `LONGEST` tokens.

    Windows start every `SEQ_LEN` tokens, so that every range of `SEQ_LEN` positions is evaluated
    on the same tokens, except at the ends of the text.
    """
    trained = load_model(run_dir)
    assert trained.config is not None  # a run directory has a configuration
    (folder,) = tjx_data.open_sets(trained.config.data).values()
    loader = tjx_data.TokenLoader(
        folder, split="validation", seq_len=LONGEST, batch_size=1, tokenizer=trained.tokenizer
    )
    tokens = loader.read(0, loader.n_tokens).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, LONGEST + 1)[::SEQ_LEN]

    @jax.jit
    def total_of(params: Any, rows: Any) -> Any:
        network: Any = tjx_nn.bind(trained.gpt, params)
        return network.losses(rows[:, :-1], rows[:, 1:]).tokens.sum(axis=0)

    batches = np.array_split(windows, len(windows) // 16)
    total = np.sum([np.asarray(total_of(trained.params, rows)) for rows in batches], axis=0)
    return {"loss_by_position": (total / len(windows)).tolist(), "windows": len(windows)}


def stretches(losses: Numbers) -> dict[str, float]:
    """Return the mean loss of each range of positions, within and beyond the training length."""
    ends = {"within": (0, SEQ_LEN), "x2": (SEQ_LEN, 2 * SEQ_LEN), "x4": (2 * SEQ_LEN, LONGEST)}
    return {name: float(losses[start:end].mean()) for name, (start, end) in ends.items()}


def by_stretch(arms: Mapping[str, list[Outcome]]) -> dict[str, dict[str, list[float]]]:
    """Return the loss of each arm and position range, by seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm, outcomes in arms.items():
        each = [stretches(np.array(o.extra["loss_by_position"])) for o in outcomes]
        found[arm] = {name: [values[name] for values in each] for name in each[0]}
    return found


def page(results: Json) -> Page:
    """Build the page from the results."""
    arms = by_arm(read_outcomes(results))
    parts = by_stretch(arms)
    flags = results["flags"]
    rows = [
        [
            arm,
            mean_sd(final_losses(outcomes)),
            *(mean_sd(parts[arm][name]) for name in ("within", "x2", "x4")),
        ]
        for arm, outcomes in arms.items()
    ]
    best = min(parts, key=lambda arm: np.mean(parts[arm]["within"]))
    return Page(
        title="Position encodings: loss at and beyond the training length",
        question=(
            "Which position encoding has the lowest loss at the training length, and which "
            "extrapolates to longer text?"
        ),
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, "
            f"{flags['model.n_head']} heads, on `python-docs` with a BPE vocabulary of "
            f"{flags['data.vocab_size']}: {flags['train.max_steps']} steps of "
            f"{flags['train.batch_size']} sequences of {SEQ_LEN} tokens, AdamW at "
            f"{flags['optimizer.learning_rate']} with warm-up and cosine, the same for all arms; "
            f"{len(next(iter(arms.values())))} seeds. Each model is then evaluated on held-out "
            f"windows of {LONGEST} tokens, one starting every {SEQ_LEN} tokens, so that all "
            f"columns of the table but the first cover the same text. `max_seq_len` is {LONGEST} "
            f"for all arms: the learned embeddings of positions beyond {SEQ_LEN} exist but are "
            f"untrained. `init_std` is {flags['model.init_std']}: with the default of 0.02 the "
            "token embeddings are negligible beside the sinusoids, which range from -1 to 1."
        ),
        columns=["positions", f"validation loss, T = {SEQ_LEN}", f"tokens 1 to {SEQ_LEN}",
                 f"{SEQ_LEN + 1} to {2 * SEQ_LEN}", f"{2 * SEQ_LEN + 1} to {LONGEST}"],
        rows=rows,
        table_note=(
            "Nats per token, mean ± standard deviation over seeds. The first column is the "
            "trainer's own evaluation; the others are position ranges of the windows of "
            f"{LONGEST} tokens."
        ),
        picture=(
            f"Left: loss by position, averaged over {BIN} positions; bands are one standard "
            f"deviation over seeds; the dotted line is the training length. Right: the "
            "same with a limited loss axis."
        ),
        claims=[
            *(
                lower(
                    f"Within the training length *{arm}* has a lower loss than *none* in every "
                    "seed.",
                    parts[arm]["within"],
                    parts["none"]["within"],
                )
                for arm in POSITIONS[:-1]
            ),
            lower(
                "*alibi* has a lower loss beyond x2 than within the training length in "
                "every seed: it extrapolates to the longer context.",
                parts["alibi"]["x4"],
                parts["alibi"]["within"],
            ),
            *(
                lower(
                    f"Beyond x2, *alibi* has a lower loss than *{arm}* in every seed.",
                    parts["alibi"]["x4"],
                    parts[arm]["x4"],
                )
                for arm in POSITIONS
                if arm != "alibi"
            ),
            *(
                lower(
                    f"*{arm}* is worse beyond the training length (to x2) than within it in every "
                    "seed.",
                    parts[arm]["within"],
                    parts[arm]["x2"],
                )
                for arm in ("learned", "sinusoidal", "rope", "none")
            ),
        ],
        conclusions=[
            f"**{best}** has the lowest loss within the training length; see the claims for what "
            "holds in every seed, and the standard deviations for the variation over seeds.",
            "For text longer than the training length, use an encoding that extrapolates according "
            "to the claims above, or train further at the longer length. `model.rope.scaling` "
            "rescales rotary positions; it is not used here.",
            "Learned position embeddings do not extrapolate: embeddings beyond the training length "
            "keep their random initial values.",
        ],
        limits=[
            "The model and the training length are tiny. The order of the arms at the training "
            "length depends on model size and training duration.",
            "All arms use the same learning rate; it is not tuned per arm.",
            "Loss at later positions also falls because more context is available: compare arms "
            "with each other at the same positions.",
        ],
    )  # fmt: skip


def draw(results: Json) -> Figure:
    """Draw the loss over the position."""
    arms = by_arm(read_outcomes(results))
    figure, axes = panels(2)
    middles = np.arange(BIN / 2, LONGEST, BIN)
    binned: dict[str, Numbers] = {}
    for index, (arm, outcomes) in enumerate(arms.items()):
        losses = np.array([o.extra["loss_by_position"] for o in outcomes])
        binned[arm] = losses.reshape(len(outcomes), -1, BIN).mean(axis=-1)
        spread = binned[arm].std(axis=0, ddof=1) if len(outcomes) > 1 else 0 * middles
        for each in axes:
            band(each, middles, binned[arm].mean(axis=0), spread, index=index, label=arm)
    # Arms that fail to extrapolate compress the y-axis; the second panel limits it.
    shown = np.concatenate([losses[:, 1 : SEQ_LEN // BIN].ravel() for losses in binned.values()])
    low, high = min(each.min() for each in binned.values()), shown.max()
    axes[1].set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    for each, title in zip(axes, ("All arms", "Limited loss axis"), strict=True):
        each.axvline(SEQ_LEN, color="black", linestyle=":", linewidth=1)
        dress(each, x="position in tokens", y="loss in nats per token", title=title)
        each.set_xticks(range(0, LONGEST + 1, SEQ_LEN))
    legend_below(figure, axes[0])
    return figure


EXPERIMENT = Experiment(name="positions", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
