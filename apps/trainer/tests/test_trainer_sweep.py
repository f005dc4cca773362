"""Sweeps: every combination once, resumable, with a report of the best."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
from one_device import one_device  # noqa: F401
from small_text import flags_of_sheep

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.main import main
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.sweep import sweep_command
from tjx_trainer.sweep.grid import read_grid, separator_of
from tjx_trainer.sweep.plots import is_geometric

GRID = ["--config=quickstart", "--optimizer.learning_rate", "1e-3,1e-2", "--train.batch_size=4,8"]


class FakeTrainer:
    """Writes what a run leaves behind, with a loss that its configuration decides."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fails: dict[str, int] = {}
        self.unsaved: set[str] = set()

    def __call__(self, words: Sequence[str]) -> int:
        config = resolve(words)
        assert config.run_dir is not None
        run = RunDirectory(Path(config.run_dir))
        self.made.append(run.path.name)
        if code := self.fails.get(run.path.name):
            return code
        run.path.mkdir(parents=True)
        run.write_config(config)
        loss = 100 * config.optimizer.learning_rate + 1 / config.train.batch_size
        records = [(0, 9.0), (config.train.max_steps, loss)]
        run.metrics.write_text(
            "".join(json.dumps({"step": step, "eval/loss": v}) + "\n" for step, v in records)
        )
        if run.path.name not in self.unsaved:
            (run.checkpoints / str(config.train.max_steps)).mkdir(parents=True)
        return 0


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_grid(argv)
    return [str(problem) for problem in caught.value.problems]


def test_a_grid_is_every_combination_with_a_folder_of_its_own() -> None:
    grid = read_grid([*GRID, "--seed=3"])
    assert [c.name for c in grid.combinations] == [
        f"learning_rate={rate},batch_size={size}" for rate in ("1e-3", "1e-2") for size in (4, 8)
    ]
    config = resolve(grid.combinations[1].words)
    assert (config.optimizer.learning_rate, config.train.batch_size, config.seed) == (1e-3, 8, 3)
    assert config.name == "quickstart"
    presets = read_grid(["--config=gpt2_small,llama_small"]).combinations
    assert [c.name for c in presets] == ["config=gpt2_small", "config=llama_small"]
    paths = read_grid(["--data.path=a/b.txt;a-b.txt"]).combinations
    assert len({c.name for c in paths}) == 2


def test_texts_and_lists_are_separated_otherwise_than_numbers_and_choices() -> None:
    assert separator_of("optimizer.name") == separator_of("model.bias") == ","
    assert separator_of("data.path") == separator_of("optimizer.groups") == ";"
    (axis,) = read_grid(
        ["--schedule.name=piecewise", "--schedule.factors=0.5,0.1;0.3,0.1",
         "--schedule.boundaries=200,400"]
    ).axes.items()  # fmt: skip
    assert axis == ("schedule.factors", ("0.5,0.1", "0.3,0.1"))


def test_all_mistakes_of_all_combinations_are_reported_once() -> None:
    problems = problems_of(
        "--optimizer.learning_rate=1e-3,x", "--train.batch_size=8,8", "--model.n_head=4,5"
    )
    assert len(problems) == 3
    assert "got '8,8' with a repeated value" in problems[0]
    assert "with n_head 5" in problems[1]
    assert "(with learning_rate=1e-3,batch_size=8,n_head=5" in problems[1]
    assert "got 'x'; expected a number" in problems[2]
    assert "no flag has several values" in problems_of("--seed=1")[0]
    assert "--sweep.dir" in problems_of("--seed=1,2", "--run_dir=x")[0]
    assert "more than 1000" in problems_of("--seed=" + ",".join(map(str, range(1001))))[0]
    assert "did you mean --train.batch_size?" in problems_of("--batchsize=3,4")[0]


def test_a_sweep_resumes_and_reports_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    folder, trainer = tmp_path / "sweep", FakeTrainer()
    words = [*GRID, f"--sweep.dir={folder}"]
    trainer.fails = {"learning_rate=1e-3,batch_size=8": 9}
    assert sweep_command.run(words, launch=trainer) == 9
    assert len(trainer.made) == 4
    assert "failed (9), not started" in capsys.readouterr().out

    trainer.fails, trainer.made = {}, []
    assert sweep_command.run(words, launch=trainer) == 0
    assert trainer.made == ["learning_rate=1e-3,batch_size=8"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "finished" in line]
    assert ["1e-3" in line for line in lines] == [True, True, False, False]
    assert " 8 " in lines[0]
    assert "0.2250" in lines[0]

    # The values may be others; what the runs have in common may not.
    more = [w.replace("1e-3,1e-2", "1e-3,1e-4") for w in words]
    trainer.made = []
    assert sweep_command.run(more, launch=trainer) == 0
    assert len(trainer.made) == 2
    with pytest.raises(SystemExit):
        sweep_command.run([*words, "--seed=3"], launch=trainer)
    assert "holds another sweep" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_last_save_is_not_finished(tmp_path: Path) -> None:
    name = "learning_rate=1e-3,batch_size=8"
    trainer = FakeTrainer()
    trainer.unsaved = {name}
    words = [*GRID, f"--sweep.dir={tmp_path / 's'}"]
    assert sweep_command.run(words, launch=trainer) == 0
    made: list[str] = []

    def launch(words: Sequence[str]) -> int:
        made.append(Path(resolve(words).run_dir or "").name)
        return 0

    assert sweep_command.run(words, launch=launch) == 0
    assert made == [name]


def test_a_sweep_stops_with_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = FakeTrainer()
    trainer.fails = {"learning_rate=1e-3,batch_size=8": 143}
    assert sweep_command.run([*GRID, f"--sweep.dir={tmp_path / 's'}"], launch=trainer) == 143
    assert len(trainer.made) == 2
    assert "run the same command to continue" in capsys.readouterr().err


@pytest.mark.parametrize(
    "axes",
    [["--optimizer.learning_rate=1e-3,3e-3,1e-2"], ["--optimizer.name=adamw,lion"],
     ["--optimizer.learning_rate=1e-3,1e-2", "--train.batch_size=4,8"],
     ["--optimizer.learning_rate=1e-3,1e-2", "--train.batch_size=4,8", "--seed=1,2"]],
)  # fmt: skip
def test_a_summary_draws_one_axis_two_and_more(
    axes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert sweep_command.run([*axes, f"--sweep.dir={folder}"], launch=FakeTrainer()) == 0
    for picture in folder.glob("*.png"):
        picture.unlink()
    assert main(["sweep", "--summary", str(folder)]) == 0
    assert {p.name for p in folder.glob("*.png")} == {"result.png", "curves.png"}
    assert str(folder / "result.png") in capsys.readouterr().out.replace("\n", "")


def test_a_summary_without_a_sweep_names_the_sweeps_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_command.run(["--seed=1,2", f"--sweep.dir={tmp_path / 'one'}"], launch=FakeTrainer())
    for words, says in (
        (["--summary", str(tmp_path / "two")], f"no sweep.json); there are {tmp_path / 'one'}"),
        (["--summary", str(tmp_path / "one"), "--sweep.metric=eval/los"], "there are eval/loss"),
        (["--summary", str(tmp_path / "one"), "--seed=1"], "--seed=1 is for runs"),
        (["--seed=1,2", "--sweep.submit"], "are for --sweep.launcher slurm"),
        (["--seed=1,2", "--sweep.dri=x"], "did you mean --sweep.dir?"),
        (["--seed=1,2", "--sweep.launcher=slrm"], "did you mean slurm?"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            sweep_command.run(words, launch=FakeTrainer())
        assert says in capsys.readouterr().err


def test_geometric_spacing_is_distinguished_from_linear() -> None:
    assert is_geometric([1e-4, 3e-4, 1e-3])
    assert is_geometric([8.0, 16.0, 32.0, 64.0])
    assert not is_geometric([1.0, 2.0, 3.0, 4.0])
    assert not is_geometric([0.0, 0.1, 0.2])
    assert not is_geometric([0.9, 0.95])


def test_task_i_of_a_slurm_array_makes_run_i(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a sweep"
    words = [*GRID, "--train.sample_prompt=it's", f"--sweep.dir={folder}"]
    assert (
        sweep_command.run(
            [*words, "--sweep.launcher=slurm", "--sweep.options=--gpus=1;--time=1:00"]
        )
        == 0
    )
    script = folder / "array.sbatch"
    assert f"--summary {shlex.quote(str(folder))}" in capsys.readouterr().out
    text = script.read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert "#SBATCH --gpus=1\n#SBATCH --time=1:00\n" in text
    # A stand-in for srun prints the words that it is given.
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    for number, each in enumerate(read_grid(words[:-1]).combinations):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, check=True
        )
        python, module, *given = done.stdout.splitlines()[:1] + done.stdout.splitlines()[2:]
        assert (python, module) == (sys.executable, "tjx_trainer.main")
        assert given == [*each.words, f"--run_dir={folder / each.name}"]


def test_a_tiny_sweep_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sweep", *flags_of_sheep(tmp_path), "--optimizer.learning_rate=1e-4,1e-2",
        "--data.tokenizer=byte", "--data.holdout=tail", "--data.seq_len=8",
        "--train.max_steps=2", "--train.batch_size=8", "--train.sample_tokens=0",
        "--model.n_layer=1", "--model.n_head=1", "--model.d_model=8", "--model.max_seq_len=8",
        f"--sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip

    def launch(words: Sequence[str]) -> int:
        with jax.transfer_guard("allow"):
            return main(words)

    assert sweep_command.run(words[1:], launch=launch) == 0
    first, second = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.rstrip().endswith("finished │")
    ]
    assert "1e-2" in first
    assert "1e-4" in second
