"""Compare gradient accumulation with one large batch: loss, gradient, memory and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from experiments.arms import by_arm, curve, deviation, final_losses, mean_sd, read_outcomes
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import band, color, dress, panels
from experiments.runs import SMALL_GPT, Flags, Json, Outcome, Run, run_all, say
from matplotlib.figure import Figure

import tjx_nn
import tjx_optim
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import SINGLE_DEVICE
from tjx_trainer.cli.command_line import parse
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.task import HostBatch
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.train_state import TrainState, shardings_of
from tjx_trainer.training.train_step import TrainStep, make_gradients, make_train_step

PIECES = (1, 2, 3, 4, 8)
FLAGS: Flags = {
    **SMALL_GPT,
    "train.batch_size": 24,
    "train.eval_every": 100,
    "train.max_steps": 600,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 3e-3,
    "schedule.warmup_steps": 50,
    "checkpoint.every": 1_000_000,
    "log.every": 10,
}
SMOKE: Flags = {"train.max_steps": 3, "train.eval_every": 2, "model.n_layer": 1, "log.every": 1}
# GPT-2 small, for memory: its step is compiled, not run.
LARGE: Flags = {
    "model.n_layer": 12,
    "model.n_head": 12,
    "model.d_model": 768,
    "model.vocab_size": 50304,
    "model.max_seq_len": 1024,
    "data.seq_len": 1024,
    "train.batch_size": 8,
}
LARGE_PIECES = (1, 2, 4, 8)


class Gradient(NamedTuple):
    """Loss and gradient of a batch from the trainer's step; float64 [parameters]."""

    loss: float
    values: np.ndarray


def measure(options: Options) -> Json:
    """Compare gradients, compile for memory, and train with one and four microbatches."""
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]  # as jax is
    flags = {**FLAGS, **(SMOKE if options.smoke else {})}
    equality = compare_gradients(flags, range(options.seeds))
    large = flags if options.smoke else {**flags, **LARGE}
    memory = [compiled_memory(large, pieces) for pieces in LARGE_PIECES]
    runs = [
        Run(arm=f"k = {pieces}", flags={**flags, "train.accumulation": pieces}, seed=seed)
        for seed in range(options.seeds)
        for pieces in (1, 4)
    ]
    outcomes = run_all(runs)
    return {
        "flags": flags,
        "equality": equality,
        "memory": memory,
        "apart": [losses_apart(*pair) for pair in zip(*by_arm(outcomes).values(), strict=True)],
        "runs": [outcome.as_json() for outcome in outcomes],
    }


def losses_apart(one: Outcome, other: Outcome) -> Json:
    """Return the difference of the losses of two runs with the same seed, by step."""
    assert one.seed == other.seed
    steps, first, _ = curve([one], "train/loss")
    _, second, _ = curve([other], "train/loss")
    return {
        "seed": one.seed,
        "steps": steps.astype(int).tolist(),
        "train": np.abs(first - second).tolist(),
        "validation": abs(one.final_loss - other.final_loss),
    }


def open_job(flags: Flags, *, seed: int = 0) -> Job:
    """Build the model, optimizer, data and step of a run with the trainer."""
    config = parse(Run(arm="", flags=flags, seed=seed).words(Path("unused")))
    config, make_task = open_task(config, None)
    return build_job(config, make_task)


def compare_gradients(flags: Flags, seeds: range) -> list[Json]:
    """Compare k microbatches, and the mean of their means, with one batch."""
    found = []
    jobs = {seed: open_job(flags, seed=seed) for seed in seeds}
    steps = {pieces: gradient_step(jobs[0], pieces) for pieces in PIECES}  # seeds share these
    for seed, job in jobs.items():
        batch = with_unequal_counts(job.task.train_data.batch(0), seed)
        start = job.initial_state()
        # The gradient replaces the optimizer state; parameters have its shape.
        state = jax.device_get(start._replace(opt_state=start.params))

        def step(
            batch: HostBatch, pieces: int, job: Job = job, state: TrainState = state
        ) -> Gradient:
            after, metrics = steps[pieces](jax.device_put(state), job.put(batch))
            leaves = jax.tree.leaves(jax.device_get(after.opt_state))
            return Gradient(
                float(metrics["loss"]),
                np.concatenate([leaf.ravel() for leaf in leaves], dtype=float),
            )

        expected = step(batch, 1)
        for pieces in PIECES:
            split = tjx_optim.split_microbatches(batch, pieces)
            parts = [{name: rows[i] for name, rows in split.items()} for i in range(pieces)]
            each = [step(part, 1) for part in parts]
            means = Gradient(
                float(np.mean([part.loss for part in each])),
                np.mean([part.values for part in each], axis=0),
            )
            found.append({
                "seed": seed,
                "pieces": pieces,
                "tokens": [int((part["labels"] != IGNORE_INDEX).sum()) for part in parts],
                "accumulated": differences(step(batch, pieces), expected),
                "mean_of_means": differences(means, expected),
            })  # fmt: skip
        say(f"gradients compared, seed {seed}")
    return found


def with_unequal_counts(batch: HostBatch, seed: int) -> dict[str, np.ndarray]:
    """Mask labels so that the number of labels per row varies from one to all."""
    rows, length = batch["labels"].shape
    counts = length ** np.random.default_rng(seed).uniform(size=rows)  # from 1 up, mostly few
    kept = np.arange(length)[None, :] < counts[:, None]
    return {**batch, "labels": np.where(kept, batch["labels"], IGNORE_INDEX)}


def gradient_step(job: Job, pieces: int) -> TrainStep:
    """Return the trainer's step with an optimizer that stores the gradient and updates nothing.

    Its state replaces the state of the real optimizer.
    """
    keep = optax.GradientTransformation(
        lambda params: params,
        lambda gradients, *_: (jax.tree.map(lambda g: 0 * g, gradients), gradients),
    )
    shardings = shardings_of(job.abstract)
    return make_train_step(
        job.config,
        keep,
        lambda _: 0.0,
        gradients=make_gradients(job.config, job.mesh, SINGLE_DEVICE, accumulation=pieces),
        accumulation=pieces,
        shardings=shardings._replace(opt_state=shardings.params),
    )


def differences(found: Gradient, expected: Gradient) -> dict[str, float]:
    """Return the relative differences of the loss and of the gradient (L2)."""
    off = np.linalg.norm(found.values - expected.values)
    return {
        "loss": abs(found.loss - expected.loss) / expected.loss,
        "gradient": float(off / np.linalg.norm(expected.values)),
    }


def compiled_memory(flags: Flags, pieces: int) -> Json:
    """Return the temporary memory of a compiled step, without arguments and results."""
    job = open_job({**flags, "train.accumulation": pieces})
    rows = job.task.train_data.batch(0)
    shapes: Any = jax.eval_shape(lambda: rows)
    analysis = job.train_step.lower(job.abstract, shapes).compile().memory_analysis()  # type: ignore[attr-defined]  # jitted
    say(f"k = {pieces}: {analysis.temp_size_in_bytes / 2**20:.0f} MiB")
    return {
        "pieces": pieces,
        "rows": len(rows["labels"]),
        "bytes": analysis.temp_size_in_bytes,
        "parameter_bytes": 4 * tjx_nn.count_params(job.config.model),
    }


def page(results: Json) -> Page:
    """Build the page from the results."""
    flags, memory = results["flags"], results["memory"]
    worst = {pieces: worst_differences(results["equality"], pieces) for pieces in PIECES}
    bytes_of = {each["pieces"]: each["bytes"] for each in memory}
    counts = [each["tokens"] for each in results["equality"] if each["pieces"] == PIECES[-1]]
    gib = {pieces: f"{size / 2**30:.2f}" for pieces, size in bytes_of.items()}
    return Page(
        title="Gradient accumulation: equivalence and memory",
        question=(
            "Do k microbatches with very unequal numbers of real tokens give the loss and the "
            "gradient of one large batch? What memory does that save?"
        ),
        setup=(
            f"Numbers: the trainer's own step (`tjx_trainer.training.train_step`), a GPT of "
            f"{flags['model.n_layer']} layers, {flags['model.d_model']} wide, float32, on "
            f"{flags['train.batch_size']} rows of {flags['data.seq_len']} tokens of `python-docs`, "
            "each with a random number of unmasked labels, from one to all. With "
            f"{PIECES[-1]} microbatches, a microbatch has {min(map(min, counts))} to "
            f"{max(map(max, counts))} real tokens. Memory: temporary memory of the compiled step "
            f"of GPT-2 small, {memory[0]['rows']} rows of 1024 tokens, without "
            "parameters and optimizer state (compiled for the CPU, not run). Curves: "
            f"{flags['train.max_steps']} steps of training with `--train.accumulation` 1 and 4."
        ),
        columns=["microbatches", "loss", "gradient", "mean of means: loss", "gradient", "memory"],
        rows=[
            [
                f"k = {pieces}",
                *(f"{worst[pieces]['accumulated'][name]:.1e}" for name in ("loss", "gradient")),
                *(f"{worst[pieces]['mean_of_means'][name]:.1e}" for name in ("loss", "gradient")),
                f"{gib[pieces]} GiB" if pieces in gib else "not compiled",
            ]
            for pieces in PIECES
        ],
        table_note=(
            "Relative difference from the large batch, maximum over seeds; for the gradient, the "
            "L2 norm of the difference. A naive loop computes the mean of the microbatches' means; "
            "the trainer weights microbatches by their number of real tokens."
        ),
        picture=(
            "Left: memory of the compiled step of GPT-2 small. Middle: training loss with one "
            "microbatch and with four; the band is one standard deviation over seeds. Right: the "
            "difference between the two, one color per seed; differences of zero are not drawn."
        ),
        claims=_claims(results, worst, bytes_of),
        conclusions=[
            "`--train.accumulation` changes memory and speed, not the result: a learning rate "
            "tuned for a batch size also applies to the same batch size with accumulation.",
            "With unequal numbers of real tokens, the mean of means differs from the gradient of "
            "the large batch by far more than rounding.",
            "Two runs that differ only in rounding diverge over many steps, as on two machines; "
            "compare the difference with the standard deviation over seeds.",
        ],
        limits=[
            "Accumulation reduces activation memory only. Gradient sums and updates have the size "
            f"of the parameters, {memory[0]['parameter_bytes'] / 2**30:.2f} GiB each.",
            "Memory is that planned by XLA for the CPU; on an accelerator the attention kernels, "
            "and so the memory, differ.",
            "Gradients are compared at the initial parameters only.",
            "Speed is not measured: small microbatches reduce the utilization of an accelerator.",
        ],
    )


def worst_differences(equality: list[Json], pieces: int) -> dict[str, dict[str, float]]:
    """Return the largest differences over seeds."""
    records = [each for each in equality if each["pieces"] == pieces]
    return {
        way: {name: max(each[way][name] for each in records) for name in ("loss", "gradient")}
        for way in ("accumulated", "mean_of_means")
    }


def _claims(results: Json, worst: Mapping[int, Any], bytes_of: Mapping[int, int]) -> list[Claim]:
    arms = by_arm(read_outcomes(results))
    one, four = (final_losses(arms[name]) for name in ("k = 1", "k = 4"))
    apart = max(each["validation"] for each in results["apart"])
    spread = deviation(one)
    gradient = max(each["accumulated"]["gradient"] for each in worst.values())
    loss = max(each["accumulated"]["loss"] for each in worst.values())
    wrong = min(each["mean_of_means"]["gradient"] for k, each in worst.items() if k > 1)
    last = LARGE_PIECES[-1]
    ratio = bytes_of[last] / bytes_of[1]
    return [
        Claim(
            text="Loss and gradient of k microbatches are within 1e-6 of those of the large batch, "
            "for all k and seeds.",
            holds=max(gradient, loss) < 1e-6,
            figures=f"at most {loss:.1e} (loss) and {gradient:.1e} (gradient)",
        ),
        Claim(
            text="The gradient of the mean of means is off by more than 1 % for every k above 1.",
            holds=wrong > 0.01,
            figures=f"by {100 * wrong:.0f} % or more",
        ),
        Claim(
            text=f"{last} microbatches need less than half the memory of one batch.",
            holds=ratio < 1 / 2,
            figures=f"{bytes_of[last] / 2**30:.2f} against {bytes_of[1] / 2**30:.2f} GiB, "
            f"{100 * ratio:.0f} %",
        ),
        Claim(
            text="After training, k = 4 differs from k = 1 by less than one standard deviation "
            "over seeds, in every seed.",
            holds=apart < spread,
            figures=f"at most {apart:.1e} nats against {spread:.1e}; validation loss "
            f"{mean_sd(one, 4)} and {mean_sd(four, 4)}",
        ),
    ]


def draw(results: Json) -> Figure:
    """Draw memory over k, the two training curves, and their difference."""
    arms = by_arm(read_outcomes(results))
    figure, (memory, losses, apart) = panels(3, height=3.4)
    pieces = [str(each["pieces"]) for each in results["memory"]]
    sizes = [each["bytes"] / 2**30 for each in results["memory"]]
    memory.bar(pieces, sizes, color=color(0), width=0.6)
    dress(memory, x="microbatches k", y="memory of the step in GiB", title="Memory")
    for index, (arm, outcomes) in enumerate(arms.items()):
        steps, mean, spread = curve(outcomes, "train/loss")
        band(losses, steps, mean, spread, index=index, label=arm, dashed=bool(index))
    losses.legend(fontsize=9, edgecolor="none")
    dress(losses, x="step", y="training loss, nats per token", title="Training loss")
    for index, each in enumerate(results["apart"]):
        differences = np.array(each["train"])
        differs = differences > 0
        apart.plot(
            np.array(each["steps"])[differs], differences[differs], ".", color=color(index + 2)
        )
    apart.set_yscale("log")
    dress(apart, x="step", y="difference of the losses, nats", title="k = 4 minus k = 1")
    return figure


EXPERIMENT = Experiment(name="accumulation", measure=measure, page=page, draw=draw)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
