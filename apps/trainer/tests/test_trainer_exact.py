"""Exact resume: an interrupted run is bit-identical to an uninterrupted one."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from job_runs import last_state, life
from one_device import only_one_device
from process_harness import records

import tjx_data
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import build_job

TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=14 --train.batch_size=16
--train.eval_every=5 --train.eval_tokens=200 --train.sample_tokens=0 --log.every=1
--optimizer.learning_rate=1e-2 --schedule.warmup_steps=2 --checkpoint.every=100
--train.accumulation=2 --model.dropout=0.2
""".split()  # noqa: SIM905  a list of words reads worse

KINDS = {
    # 14 steps of 16 rows are several epochs of so short a text; rows hold several documents.
    "documents": ["--data.packing=documents", "--optimizer.ema_decay=0.9"],
    # The first steps are skipped until the scale fits, which it leaves again every two steps.
    "fp16": [
        *("--train.precision=fp16", "--guard.initial_scale=524288.0"),
        *("--guard.growth_interval=2", "--guard.max_skipped=99", "--optimizer.name=adamw"),
    ],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join(f"{n} sheep {'more ' * (n % 3)}" for n in range(90)))
    return [*TINY, f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]


@pytest.mark.parametrize(
    ("kind", "half"),
    # Stopped at an evaluation, and between two.
    [
        ("documents", 5),
        ("fp16", 8),
        pytest.param("documents", 8, marks=pytest.mark.slow),
        pytest.param("fp16", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.key_reuse
def test_two_halves_are_the_whole_bit_for_bit(
    kind: str, half: int, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "halves"
    with only_one_device():
        job = build_job(*open_task(resolve([*words, *KINDS[kind]])))
        assert life(job, tmp_path / "whole") == 0
        assert life(job, path, end=half) == 143
        assert life(job, path) == 0
    assert records(path) == records(tmp_path / "whole")
    assert last_state(job, path, 14) == last_state(job, tmp_path / "whole", 14)
    found = [line for line in records(tmp_path / "whole") if "train/loss" in line]
    if kind == "fp16":
        scales = [line["train/loss_scale"] for line in found]
        assert 2 <= found[-1]["train/skipped"] < 14
        assert scales != sorted(scales, reverse=True), "it grew, too"
    else:
        loader = job.task.train_data
        assert isinstance(loader, tjx_data.TokenLoader)
        assert 14 * loader.batch_size * loader.seq_len > 2 * loader.n_tokens, "several epochs"


def test_another_mesh_trains_on_the_same_rows_and_finds_the_same_losses(
    words: list[str], tmp_path: Path
) -> None:
    meshes = {"one": ["--mesh.data=8"], "other": ["--mesh.data=2", "--mesh.fsdp=4"]}
    rows, found = [], []
    for name, mesh in meshes.items():
        job = build_job(*open_task(resolve([*words, *mesh])))
        if name == "one":
            assert life(job, tmp_path / "begun", end=6) == 143
        steps = map(job.task.train_data.batch, range(6, 9))
        rows.append([jax.device_get(job.put(batch)) for batch in steps])
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        assert life(job, tmp_path / name) == 0
        found.append(records(tmp_path / name))
    jax.tree.map(np.testing.assert_array_equal, *rows)
    for mine, other in zip(*found, strict=True):
        assert mine.keys() == other.keys()
        for name in {"train/loss", "eval/loss"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], abs=1e-5)
