"""Mixtures in the trainer: weights from sizes, curricula, and the loss of each corpus."""

import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from process_harness import at, final_state, records, run_attempt, send

import tjx_metrics
import tjx_nn
from tjx_data import MixtureLoader, TokenLoader
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.text_data import format_mixture
from tjx_trainer.training.build import Job, build_job

TINY = """
--model.n_layer=1 --model.n_head=1 --model.d_model=8 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=byte --data.holdout=tail --train.max_steps=12 --train.batch_size=8
--train.eval_every=6 --train.sample_tokens=0 --log.every=1 --checkpoint.every=100
--optimizer.learning_rate=1e-2 --schedule.warmup_steps=2
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "sheep.txt").write_text(
        "".join(f"{n} sheep {'more ' * (n % 5)}\n" for n in range(99))
    )
    (folder / "wall.txt").write_text("the wall is high and the wall is long\n" * 200)
    return folder


def make_job(folder: Path, *flags: str) -> Job:
    words = [*TINY, f"--data.cache_dir={folder / 'cache'}", *flags]
    return build_job(*open_task(resolve(words)))


@pytest.fixture(scope="module")
def job(folder: Path) -> Job:
    sheep, wall = folder / "sheep.txt", folder / "wall.txt"
    change = f"--data.curriculum=4:{wall}=1;8:{sheep}=0.5,{wall}=0.5"
    return make_job(folder, f"--data.mixture={sheep}=3,{wall}=1", change)


def test_a_run_resumed_within_its_curriculum_is_the_same_run(
    job: Job, folder: Path, tmp_path: Path
) -> None:
    assert run_attempt(job, tmp_path / "whole") == 0
    with at("train", 6, send(signal.SIGTERM)):
        assert run_attempt(job, tmp_path / "halves") == 143
    assert run_attempt(job, tmp_path / "halves") == 0
    assert records(tmp_path / "halves") == records(tmp_path / "whole")
    assert final_state(job, tmp_path / "halves") == final_state(job, tmp_path / "whole")

    rows = job.task.train_data
    assert isinstance(rows, MixtureLoader)
    assert list(rows.rows_by_corpus(12 * 8).values()) == [24 + 16, 8 + 32 + 16]
    lines = tjx_metrics.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    logged = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in logged] == [0, 6, 12]
    names = [f"eval/loss/{folder / name}" for name in ("sheep.txt", "wall.txt")]
    for line in logged:
        # The mixture has the last weights, one to one, up to the end of the shorter corpus.
        losses = [line[name] for name in names]
        assert min(losses) < line["eval/loss"] < max(losses)
        assert f"eval/bits_per_byte/{folder / 'wall.txt'}" in line


def test_loss_of_a_corpus_is_the_mean_over_its_held_out_labels(job: Job) -> None:
    params = job.initial_state().params
    found = job.evaluate_corpora(params)
    assert found.keys() == job.task.folders.keys()
    with jax.transfer_guard("allow"):
        network: Any = tjx_nn.bind(job.config.model, params)
        label_losses = jax.jit(lambda batch: network.losses(**batch).tokens)
        for name, folder in job.task.folders.items():
            loader = TokenLoader(folder, split="validation", seq_len=16, batch_size=1)
            losses: list[float] = []
            for batch in loader.evaluation_batches():
                each = np.asarray(label_losses(batch), np.float64)
                losses += each[batch["labels"] >= 0].tolist()
            assert found[name].tokens == len(losses)
            assert found[name].metrics()["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_weights_from_sizes_and_a_limit_of_epochs(folder: Path) -> None:
    mixture = f"--data.mixture={folder / 'sheep.txt'},{folder / 'wall.txt'}"
    flat = make_job(folder, mixture, "--data.mixture_temperature=1e9")
    loader = flat.task.train_data
    assert isinstance(loader, MixtureLoader)
    assert list(loader.rows_by_corpus(1000).values()) == [500, 500]
    loaders: Any = loader.loaders
    sizes = {name: each.n_tokens for name, each in loaders.items()}
    proportional = make_job(folder, mixture, "--data.mixture_temperature=1").task.train_data
    assert isinstance(proportional, MixtureLoader)
    for name, count in proportional.rows_by_corpus(10_000).items():
        assert count / 10_000 == pytest.approx(sizes[name] / sum(sizes.values()), abs=2e-4)
    # Of the smaller corpus half an epoch, of the other the rest of the 96 rows.
    limited = make_job(folder, mixture, "--data.mixture_temperature=1e9", "--data.max_epochs=0.3")
    rows = limited.task.train_data
    assert isinstance(rows, MixtureLoader)
    epochs = rows.epochs_by_corpus(12 * 8)
    assert max(epochs.values()) <= 0.3
    assert epochs[str(folder / "sheep.txt")] > 0.29
    assert "sheep.txt" in str(format_mixture(rows, limited.config))
    assert "(0.30 epochs)" in str(format_mixture(rows, limited.config))
    # The validation split has the same proportions.
    task: Any = limited.task
    for name, value in task.validation_data.identity.items():
        assert not name.endswith("/share") or value == rows.identity[name]
    with pytest.raises(ValueError, match=r"max_epochs: got 0\.1; expected text for"):
        make_job(folder, mixture, "--data.mixture_temperature=1", "--data.max_epochs=0.1")
