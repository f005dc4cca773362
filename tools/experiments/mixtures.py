"""Compare weights of a mixture: the loss of each source, and how often it is read."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from experiments.arms import by_arm, final_losses, lower, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, color, dress, legend_below, panels
from experiments.runs import SMALL_GPT, Flags, Json, Outcome, Run, run_all
from matplotlib.figure import Figure

import tjx_data
import tjx_metrics
from tjx_trainer.run_reader import SavedRun
from tjx_trainer.tasks.task import DataShard
from tjx_trainer.tasks.text_data import TextData, make_token_loader

DATA = "TJX_TEST_DATA"
STEPS, CHANGE = 400, 250
FLAGS: Flags = {
    **{name: value for name, value in SMALL_GPT.items() if name != "data.corpus"},
    "data.vocab_size": 1024,
    "data.holdout": "tail",
    "model.n_layer": 2,
    "train.max_steps": STEPS,
    "train.batch_size": 16,
    "train.eval_every": 50,
    "train.eval_tokens": 16_000,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 4e-3,
    "optimizer.b2": 0.99,
    "schedule.warmup_steps": 40,
    "checkpoint.every": 1_000_000,
    "log.every": 50,
}
SMOKE: Flags = {
    "train.max_steps": 4, "train.eval_every": 2, "train.eval_tokens": 2000, "model.n_layer": 1,
    "data.holdout": "documents",
}  # fmt: skip
# The smallest source first; the curriculum ends with the last.
SOURCES = ("names.txt", "shakespeare.txt", "tinystories_2M.txt", "books/war_and_peace.txt")
SMOKE_SOURCES = ("tiny-chat", "python-docs")
BY_SIZE, TEMPERATURE, EQUAL = "by size", "T = 3.3", "equal"
LIMIT = 0.4
LIMITED, CURRICULUM, DOREMI = f"equal, {LIMIT} epochs", "curriculum", "DoReMi"
ROUNDS = 4
"""Rounds of the proxy model whose excess loss determines the weights of DoReMi."""
RATE = 2.0
"""Step size of the exponentiated gradient in the weights, per nat of excess loss."""
SMOOTHING = 1e-3
"""Share of equal weights that is mixed in after each round."""


def arms_of(
    sources: tuple[str, ...], change: int, weights: Mapping[str, float]
) -> Mapping[str, Flags]:
    """Return the flags of each arm; `weights` are those of DoReMi."""
    names, equal = ",".join(sources), ",".join(f"{name}=1" for name in sources)
    return {
        BY_SIZE: {"data.mixture": names, "data.mixture_temperature": 1},
        TEMPERATURE: {"data.mixture": names, "data.mixture_temperature": 3.3},
        EQUAL: {"data.mixture": equal},
        LIMITED: {"data.mixture": equal, "data.max_epochs": LIMIT},
        CURRICULUM: {"data.mixture": equal, "data.curriculum": f"{change}:{sources[-1]}=1"},
        DOREMI: {"data.mixture": _as_flag(weights)},
    }


def _as_flag(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:.4f}" for name, weight in weights.items())


def doremi_rounds(flags: Flags, sources: tuple[str, ...], n_rounds: int) -> list[dict[str, float]]:
    """Return the weights of each round; their mean is the result.

    A reference model is trained on weights by size, a proxy model on the weights of the rounds, of
    which the first are equal. After a round, sources whose validation loss exceeds that of the
    reference get more weight (Xie et al. 2023, arXiv:2305.10429, with rounds in place of steps and
    models of the same size).
    """
    length = int(flags["train.max_steps"]) // n_rounds
    common: Flags = {**flags, "train.eval_every": length, "schedule.name": "constant"}

    def train(rounds_trained: int, own: Flags) -> Json:
        run = {**common, "train.max_steps": rounds_trained * length, **own}
        (outcome,) = run_all([Run(arm=DOREMI, flags=run, seed=0, after=losses_by_source)])
        return outcome.extra

    by_size: Flags = {"data.mixture": ",".join(sources), "data.mixture_temperature": 1}
    reference = train(n_rounds, by_size)
    rounds = [dict.fromkeys(sources, 1 / len(sources))]
    for done in range(1, n_rounds):
        later = [f"{n * length}:{_as_flag(rounds[n])}" for n in range(1, done)]
        own: dict[str, str] = {"data.mixture": _as_flag(rounds[0])}
        if later:
            own["data.curriculum"] = ";".join(later)
        proxy, step = train(done, own), done * length
        scaled = {
            name: rounds[-1][name] * np.exp(RATE * max(_loss_at(proxy[name], step)
                                                       - _loss_at(reference[name], step), 0.0))
            for name in sources
        }  # fmt: skip
        total = sum(scaled.values())
        equal = SMOOTHING / len(sources)
        rounds.append({n: float((1 - SMOOTHING) * s / total + equal) for n, s in scaled.items()})
    return rounds


def _loss_at(measured: Json, step: int) -> float:
    return float(dict(measured["loss"])[step])


def measure(options: Options) -> Json:
    """Train every arm; the texts are read from the folder that the variable names."""
    if not options.smoke and DATA not in os.environ:
        raise SystemExit(f"{DATA}: not set; expected the folder with {', '.join(SOURCES)}")
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    sources = SMOKE_SOURCES if options.smoke else SOURCES
    change = 2 if options.smoke else CHANGE
    # Names of sources are paths, relative to their folder.
    with contextlib.chdir("." if options.smoke else os.environ[DATA]):
        rounds = doremi_rounds(flags, sources, 2 if options.smoke else ROUNDS)
        weights = {name: float(np.mean([each[name] for each in rounds])) for name in sources}
        runs = [
            Run(arm=arm, flags={**flags, **own}, seed=seed, after=losses_by_source)
            for seed in range(options.seeds)
            for arm, own in arms_of(sources, change, weights).items()
        ]
        found = [outcome.as_json() for outcome in run_all(runs)]
    return {
        "flags": flags, "sources": list(sources), "change": change, "doremi_rounds": rounds,
        "runs": found,
    }  # fmt: skip


def losses_by_source(run_dir: Path) -> Json:
    """Return the curve of each source's validation loss, its share and its epochs."""
    config = SavedRun(run_dir).config
    folders = tjx_data.open_sets(config.data)
    text = TextData(folders, tjx_data.Tokenizer.load(next(iter(folders.values()))))
    size = config.train.batch_size
    rows = make_token_loader(config, text, DataShard(size, size, 0, 1), "train")
    assert isinstance(rows, tjx_data.MixtureLoader)
    n_rows = config.train.max_steps * size
    records = tjx_metrics.read_metrics(run_dir / "metrics.jsonl")
    counts, epochs = rows.rows_by_corpus(n_rows), rows.epochs_by_corpus(n_rows)
    return {
        name: {
            "loss": [(r["step"], r[key]) for r in records if (key := f"eval/loss/{name}") in r],
            "share": counts[name] / n_rows,
            "epochs": epochs[name],
        }
        for name in counts
    }


def losses_of(outcomes: list[Outcome], source: str) -> list[float]:
    """Return the last loss of a source, by seed."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    return [outcome.extra[source]["loss"][-1][1] for outcome in ordered]


def losses_at(outcomes: list[Outcome], source: str, step: int) -> list[float]:
    """Return the loss of a source after a step, by seed."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    return [dict(outcome.extra[source]["loss"])[step] for outcome in ordered]


def _name(source: str) -> str:
    return Path(source).stem


def claims_of(results: Json, arms: Mapping[str, list[Outcome]]) -> list[Claim]:
    """Return the claims."""
    sources = results["sources"]
    smallest, last = sources[0], sources[-1]
    losses = {arm: {s: losses_of(each, s) for s in sources} for arm, each in arms.items()}
    change = results["change"]
    claims = [
        lower(
            f"{_name(smallest)}, the smallest source, has a lower loss with *{EQUAL}* than with "
            f"*{BY_SIZE}* in every seed.",
            losses[EQUAL][smallest],
            losses[BY_SIZE][smallest],
        ),
        lower(
            f"{_name(last)}, the largest source, has a lower loss with *{BY_SIZE}* than with "
            f"*{EQUAL}* in every seed.",
            losses[BY_SIZE][last],
            losses[EQUAL][last],
        ),
        lower(
            f"With *{TEMPERATURE}* the loss of {_name(smallest)} is below that of *{BY_SIZE}* in "
            "every seed.",
            losses[TEMPERATURE][smallest],
            losses[BY_SIZE][smallest],
        ),
    ]
    claims += [
        lower(
            f"{_name(source)} has a lower loss with *{LIMITED}* than with *{EQUAL}* in every seed: "
            f"it gets rows that {_name(smallest)} has there.",
            losses[LIMITED][source],
            losses[EQUAL][source],
        )
        for source in sources[1:]
    ]
    claims.append(
        lower(
            f"*{CURRICULUM}* has the lowest loss of {_name(last)}, below *{BY_SIZE}*, in every "
            "seed.",
            losses[CURRICULUM][last],
            losses[BY_SIZE][last],
        )
    )
    claims += [
        lower(
            f"The loss of {_name(source)} rises after step {change} of *{CURRICULUM}*, which does "
            "not read it any more, in every seed.",
            losses_at(arms[CURRICULUM], source, change),
            losses[CURRICULUM][source],
        )
        for source in sources[:-1]
    ]
    means = {arm: np.mean(list(losses[arm].values()), axis=0).tolist() for arm in losses}
    claims.append(
        lower(
            f"The mean loss of the sources with *{DOREMI}* is below that of *{BY_SIZE}* in every "
            "seed.",
            means[DOREMI],
            means[BY_SIZE],
        )
    )
    return claims


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags, sources = results["flags"], results["sources"]
    arms = by_arm(read_outcomes(results))
    rows = []
    for arm, outcomes in arms.items():
        found = outcomes[0].extra
        cells = [
            f"{mean_sd(losses_of(outcomes, s))} ({found[s]['share']:.0%}, {found[s]['epochs']:.2f})"
            for s in sources
        ]
        rows.append([arm, *cells, mean_sd(final_losses(outcomes))])
    means = {
        arm: float(np.mean([losses_of(outcomes, s) for s in sources]))
        for arm, outcomes in arms.items()
    }
    change = results["change"]
    return Page(
        title="Weights of a mixture: the loss of each source",
        question="How do weights by size, an epoch limit and a curriculum change each source?",
        setup=(
            f"A GPT of {flags['model.n_layer']} layers, {flags['model.d_model']} wide, on "
            f"{', '.join(map(_name, sources))} with one BPE vocabulary of "
            f"{flags['data.vocab_size']}: {flags['train.max_steps']} steps of "
            f"{flags['train.batch_size']} sequences of {flags['data.seq_len']} tokens, AdamW at "
            f"{flags['optimizer.learning_rate']} with warm-up and cosine, the same for all arms; "
            f"{len(next(iter(arms.values())))} seeds. *{BY_SIZE}* and *{TEMPERATURE}* set "
            f"`data.mixture_temperature`, *{LIMITED}* `data.max_epochs`; *{CURRICULUM}* is *"
            f"{EQUAL}* until step {change} and reads only {_name(sources[-1])} then. *{DOREMI}* "
            f"has the mean weights of {ROUNDS} rounds of a proxy model: after each, a source gets "
            "more weight the more its loss exceeds that of a model trained by size (Xie et al. "
            "2023, with rounds in place of steps and a proxy of the same size). The last "
            f"tenth of each source is held out. The texts are read from the folder `{DATA}`."
        ),
        columns=["weights", *map(_name, sources), "mixture"],
        rows=rows,
        table_note=(
            "Validation loss in nats per token after the last step, mean ± standard deviation over "
            "seeds; in parentheses the share of the rows and the epochs of the source. The loss of "
            "the mixture has the proportions of the arm (of the curriculum, its last ones), so "
            "that it cannot be compared between arms."
        ),
        picture=(
            "Validation loss by step of two sources: the smallest (left) and the largest (right); "
            "the band is one standard deviation over seeds."
        ),
        claims=claims_of(results, arms),
        conclusions=[
            "Arms by the mean loss of the sources, lowest first: "
            + ", ".join(f"{arm} {means[arm]:.3f}" for arm in sorted(means, key=means.__getitem__))
            + ".",
            "Compare mixtures by `eval/loss/NAME` of each source: the loss of the mixture depends "
            "on the weights themselves.",
            "A source that is no longer read is forgotten: end a curriculum with some rows of each "
            "source that shall stay.",
        ],
        limits=[
            "The model is small and the runs are short, less than an epoch of every source, with "
            f"few seeds; the best temperature depends on that. The limit of {LIMIT} epochs is low "
            "so that it takes effect here; 4 are common.",
            f"The rounds of *{DOREMI}* use one seed and the validation losses that the arms are "
            "compared by; its cost is not counted.",
            "One learning rate for all arms; it decays while the curriculum reads its last source.",
            "Losses per token depend on the vocabulary, which is the same for all arms here.",
        ],
    )


def draw(results: Json) -> Figure:
    """Draw the loss of the smallest and of the largest source over the steps."""
    arms, sources = by_arm(read_outcomes(results)), results["sources"]
    figure, axes = panels(2)
    for axis, source in zip(axes, (sources[0], sources[-1]), strict=True):
        for index, (arm, outcomes) in enumerate(arms.items()):
            curves = np.array([outcome.extra[source]["loss"] for outcome in outcomes])
            steps, losses = curves[0, 1:, 0], curves[:, 1:, 1]  # without that before training
            spread = losses.std(axis=0, ddof=1) if len(losses) > 1 else np.zeros(len(steps))
            band(axis, steps, losses.mean(axis=0), spread, index=index, label=arm)
        axis.axvline(results["change"], color=color(len(arms)), linewidth=0.8, linestyle=":")
        dress(axis, x="step", y="validation loss [nats/token]", title=_name(source))
    legend_below(figure, axes[0])
    return figure


EXPERIMENT = Experiment(name="mixtures", measure=measure, page=page, draw=draw, seeds=2)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
