"""Run directory: nothing is overwritten, and only the same run resumes in it."""

import dataclasses
import math
import os
import re
import stat
import subprocess
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tjx_ckpt
import tjx_nn
from tjx_ckpt import CheckpointConfig
from tjx_core import ConfigError
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.values import format_value
from tjx_trainer.config import config_compat
from tjx_trainer.config.config_tree import assemble, flatten, leaves
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime import provenance, run_dir
from tjx_trainer.runtime.run_dir import (
    RunDirectory,
    check_run,
    open_run,
    to_yaml,
)
from tjx_trainer.runtime.signals import SignalHandler
from tjx_trainer.training import train
from tjx_trainer.training.build import Job
from tjx_trainer.training.preflight import apply_legacy_values

NOW = datetime(2026, 1, 2, 3, 4, 5)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a leaf's type that a user can write ("none" always means None)."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    if get_args(hint):
        return st.one_of(*map(values_of, get_args(hint)))
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
    return {
        bool: st.booleans(),
        int: st.integers(-1, 4096),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: texts.filter(lambda text: text.lower() not in {"none", "null"}),
        type(None): st.none(),
    }[hint]


def fitting(wanted: list[tuple[str, Any]]) -> Config:
    """Give as many of some values to the defaults as they take."""
    values = flatten(Config())
    for name, value in wanted:
        with suppress(ConfigError):
            assemble({**values, name: value})
            values[name] = value
    return assemble(values)


SOME_VALUES = st.lists(
    st.sampled_from(sorted(leaves())).flatmap(
        lambda name: st.tuples(st.just(name), values_of(leaves()[name].hint))
    ),
    max_size=12,
)


def as_flags(config: Config) -> list[str]:
    """Write every value as a flag."""
    return [f"--{name}={format_value(value)}" for name, value in flatten(config).items()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(wanted=SOME_VALUES)
@example(wanted=[("train.sample_prompt", "\x85 a \u2028 b \n\ufeff \u2029")])
def test_a_configuration_survives_its_file_and_its_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: list[tuple[str, Any]]
) -> None:
    config = fitting(wanted)
    monkeypatch.setattr(provenance, "git_revision", lambda: None)
    run = RunDirectory(tmp_path)
    run.write_config(config)
    assert run.read_config() == dataclasses.replace(config, run_dir=str(tmp_path))
    assert resolve(as_flags(config)) == config


def test_a_run_of_an_older_version_keeps_its_values(tmp_path: Path) -> None:
    words = ["--run_dir", str(tmp_path), "--model.vocab_size", "6000"]
    run, wanted = RunDirectory(tmp_path), resolve(words)
    run.write_config(wanted)
    text = run.config.read_text()
    for line in ("windows: shifted", "tokenizer_size: null", "scale_embeddings: true"):
        assert f"  {line}\n" in text
        text = text.replace(f"  {line}\n", "")
    run.config.write_text(text.replace("holdout: auto", "holdout: documents"))
    saved, started = run.read_config(), apply_legacy_values(wanted)
    for config in (saved, started):
        assert isinstance(config.model, GPTConfig)
        assert (config.data.windows, config.data.holdout) == ("aligned", "documents")
        assert not config.model.scale_embeddings
        assert config.with_vocabulary(4096).model == config.model  # nothing is masked
    assert isinstance(wanted.model, GPTConfig)
    fitted = wanted.with_vocabulary(4096).model
    assert isinstance(fitted, GPTConfig)
    assert fitted.tokenizer_size == 4096
    check_run(started)
    other = resolve([*words, "--data.windows", "random"])
    assert apply_legacy_values(other).data.windows == "random"
    with pytest.raises(ConfigError, match=r"data\.windows: got random; expected aligned"):
        check_run(other)
    # A preset that a user wrote means today's default.
    own = tmp_path / "own.yaml"
    own.write_text("data:\n  seq_len: 8\n")
    assert resolve(["--config", str(own)]).data.windows == "shifted"


@pytest.fixture
def run_path(tmp_path: Path) -> str:
    """Give the place of a run that has begun."""
    path = str(tmp_path / "deep" / "run")
    open_run(resolve(["--run_dir", path]))
    return path


def test_the_file_holds_versions_and_revision(run_path: str) -> None:
    text = RunDirectory(Path(run_path)).config.read_text()
    assert text.startswith("# ")
    saved = yaml.safe_load(text)
    assert saved["versions"]["jax"][0].isdigit()
    assert set(saved["versions"]) >= {"tjx-nn", "tjx-trainer", "jaxlib", "numpy"}
    assert "git" in saved
    assert "run_dir" not in saved


def test_versions_of_a_checkout_are_those_of_the_packages() -> None:
    assert provenance.versions()["tjx-nn"] == tjx_nn.__version__


def test_processes_compare_settings_seeds_and_versions() -> None:
    words = ["--distributed.num_processes=2", "--distributed.coordinator=127.0.0.1:1"]
    first, other = (
        provenance.shared_settings(resolve([*words, f"--distributed.process_id={index}", *more]))
        for index, more in enumerate([[], ["--seed=7", "--checkpoint.every=9", "--data.path=x"]])
    )
    assert first["version of jax"] == jax.__version__
    differing = {name for name in first.keys() | other.keys() if first[name] != other[name]}
    # Paths may differ: the data themselves are compared.
    assert differing == {"seed", "checkpoint.every"}


def test_the_revision_and_whether_it_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.check_output(
            ["git", "-C", tmp_path, *identity, *words], text=True
        ).strip()

    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    expected = {"revision": git("rev-parse", "HEAD"), "dirty": False}
    assert expected.items() <= dict(provenance.git_revision() or {}).items()
    (tmp_path / "file").write_text("2")
    assert (provenance.git_revision() or {})["dirty"] is True


def test_no_repository_or_no_git_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_revision() is None


def test_a_new_run_never_takes_a_directory_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [open_run(Config(name="tiny"), now=NOW).path for _ in range(3)]
    stem = "tiny-20260102-030405"
    assert paths == [Path("runs") / n for n in (stem, f"{stem}-2", f"{stem}-3")]
    assert all((path / "config.yaml").exists() for path in paths)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--mesh.fsdp", "2", "--mesh.data", "1"],
        ["--checkpoint.every", "7", "--log.every", "3"],
        ["--train.eval_every", "9", "--train.accumulation", "2", "--name", "other"],
        ["--train.max_steps", "900", "--schedule.decay_steps", str(Config().train.max_steps)],
    ],
    ids=" ".join,
)
def test_fields_without_effect_on_the_result_may_change(tmp_path: Path, flags: list[str]) -> None:
    first = resolve(["--config", "quickstart", "--run_dir", str(tmp_path / "run")])
    steps = ["--train.max_steps", str(Config().train.max_steps)]
    first = resolve(["--run_dir", str(tmp_path / "run"), *steps])
    open_run(first)
    wanted = dict(zip(flags[::2], flags[1::2], strict=True))
    flags = [word for pair in {"--train.max_steps": steps[1], **wanted}.items() for word in pair]
    again = resolve(["--run_dir", str(tmp_path / "run"), *flags])
    assert open_run(again).read_config() == again


def test_another_run_is_refused_with_each_value_that_differs(run_path: str) -> None:
    before = Path(run_path, "config.yaml").read_bytes()
    other = resolve(
        ["--run_dir", run_path, "--seed", "1", "--model.d_model", "64", "--log.every=2"]
    )
    with pytest.raises(ConfigError) as caught:
        open_run(other)
    (problem,) = map(str, caught.value.problems)
    head, *lines = problem.splitlines()
    width = resolve(["--config", "quickstart"]).model.d_model
    assert lines == ["seed: got 1; expected 0", f"model.d_model: got 64; expected {width}"]
    assert Path(run_path, "config.yaml").read_bytes() == before
    # The values that the error names resume the run, also if a preset has changed since.
    config = re.search(r"\(--config (\S+) gives all\)", head)
    assert config
    run_dir.check_run(resolve(["--config", config[1], "--run_dir", run_path]))


def test_every_value_is_compared_or_may_change_on_purpose() -> None:
    free = config_compat.CHANGEABLE_FIELDS
    assert free <= set(leaves())
    learnt_from = ("model.", "data.", "optimizer.", "schedule.", "seed")
    assert {name for name in free if name.startswith(learnt_from)} == {
        *("model.remat", "model.remat_every", "model.scan_layers"),
        *("model.attention_implementation", "model.check_ids", "data.cache_dir"),
    }
    decided_otherwise = {"train.max_steps", "model.vocab_size"}
    may_change = ("schedule.", *config_compat.CHANGEABLE_SECTIONS)  # what a schedule gives counts
    for name in flatten(Config()):
        is_free = name.startswith(may_change) and name not in config_compat.FIXED_FIELDS
        if name in free | decided_otherwise or is_free:
            continue
        saved, other = Config(), _with_another_value(name)
        assert any(
            name in line for line in config_compat.incompatible_changes(saved, other, steps_done=0)
        ), name


def _with_another_value(name: str) -> Config:
    """Return the defaults with another value in one leaf, past the checks."""
    config = Config()
    holder: Any = config
    *sections, field = name.split(".")
    for section in sections:
        inner = dataclasses.replace(getattr(holder, section))
        object.__setattr__(holder, section, inner)
        holder = inner
    object.__setattr__(holder, field, "another")
    return config


@pytest.mark.parametrize(
    ("flags", "steps_done"),
    [
        ("schedule.name=linear", 0),
        ("schedule.warmup_steps=99", 1),
        ("schedule.final_fraction=0.5", 500),
        ("schedule.name=wsd", 900),
        ("train.max_steps=2000", 700),
    ],
)
def test_another_learning_rate_of_a_step_that_was_made_is_another_run(
    flags: str, steps_done: int
) -> None:
    same = ["--schedule.warmup_steps=100", "--train.max_steps=1000"]
    saved = resolve(same)
    name = flags.partition("=")[0]
    wanted = resolve([*(word for word in same if not word.startswith(f"--{name}=")), f"--{flags}"])
    lines = config_compat.incompatible_changes(saved, wanted, steps_done=steps_done)
    assert any(name in line for line in lines)
    assert any("learning rate of step " in line for line in lines)


@pytest.mark.parametrize(
    ("steps", "cooldown", "steps_done", "allowed"),
    [
        (2000, 200, 801, True),  # the last step at the peak rate
        (2000, 200, 802, False),  # the cool-down had begun
        (900, 100, 800, True),  # cools down at once
        (850, 100, 800, False),  # should have begun
    ],
)
def test_a_cool_down_may_begin_anywhere_that_is_still_to_come(
    steps: int, cooldown: int, steps_done: int, allowed: bool
) -> None:
    wsd = ["--schedule.name=wsd", "--schedule.warmup_steps=10"]
    saved = resolve([*wsd, "--train.max_steps=1000", "--schedule.cooldown_steps=200"])
    wanted = resolve([*wsd, f"--train.max_steps={steps}", f"--schedule.cooldown_steps={cooldown}"])
    assert (not config_compat.incompatible_changes(saved, wanted, steps_done=steps_done)) == allowed


def test_a_longer_run_needs_an_explicit_schedule(run_path: str) -> None:
    steps = resolve([]).train.max_steps
    longer = ["--run_dir", run_path, "--train.max_steps", str(steps + 100)]
    with pytest.raises(ConfigError, match=f"give --schedule.decay_steps {steps} to continue"):
        open_run(resolve(longer))
    open_run(resolve([*longer, "--schedule.decay_steps", str(steps)]))
    # And once more by the first command, which asks for the same schedule.
    open_run(resolve(["--run_dir", run_path]))


def test_a_constant_learning_rate_lets_a_run_be_longer(tmp_path: Path) -> None:
    same = ["--run_dir", str(tmp_path), "--schedule.name", "constant"]
    open_run(resolve(same))
    assert open_run(resolve([*same, "--train.max_steps", "9"])).read_config().train.max_steps == 9


def test_the_vocabulary_of_the_tokenizer_is_kept_on_resume(run_path: str) -> None:
    run = RunDirectory(Path(run_path))
    run.write_config(run.read_config().with_vocabulary(777))
    again = resolve(["--run_dir", run_path])
    run_dir.check_run(again)  # before the tokenizer is known its vocabulary is no difference
    kept = open_run(again.with_vocabulary(777)).read_config()
    assert flatten(kept)["model.vocab_size"] == 777
    with pytest.raises(ConfigError, match="vocab_from_tokenizer: got false; expected true"):
        open_run(resolve(["--run_dir", run_path, "--model.vocab_size", "4096"]))


def test_the_written_file_starts_a_run_alike_elsewhere(run_path: str, tmp_path: Path) -> None:
    saved = f"{run_path}/config.yaml"
    config = resolve(["--config", saved, "--run_dir", str(tmp_path / "two"), "--seed", "5"])
    assert dataclasses.replace(config, seed=0, run_dir=None) == resolve([])


def test_files_without_a_configuration_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl but no config\.yaml"):
        open_run(Config(run_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("run_dir", [None, "new"])
def test_a_new_run_does_not_take_the_checkpoints_of_another(
    tmp_path: Path, run_dir: str | None
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "30").mkdir(parents=True)
    run_path = None if run_dir is None else str(tmp_path / run_dir)
    config = Config(run_dir=run_path, checkpoint=CheckpointConfig(directory=str(elsewhere)))
    with pytest.raises(ConfigError, match="holds step 30 of another run"):
        check_run(config)


def test_a_resumed_run_finds_its_checkpoint_directory(run_path: str) -> None:
    moved = resolve(["--run_dir", run_path, "--checkpoint.directory", "elsewhere"])
    with pytest.raises(ConfigError, match="directory: got elsewhere; expected none"):
        check_run(moved)


def test_only_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    left = [".config.yaml.x1", ".data.json.a", ".tokenizer.json.tmp-ysdc4frq", ".heartbeat.json.71",
            ".metrics.summary.json.1-2", "plots/.loss.png.tmp-1"]  # fmt: skip
    kept = ["config.yaml", ".gitignore", ".env.local", "heartbeat.json", "plots/loss.png"]
    (tmp_path / "plots").mkdir()
    for name in (*left, *kept):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).remove_temporary_files()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == sorted(
        [*kept, "plots"]
    )


def test_a_place_that_cannot_hold_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="this is a file"):
        open_run(Config(run_dir=str(file)))
    with pytest.raises(ConfigError, match="cannot be created"):
        open_run(Config(run_dir=str(file / "run")))


def test_a_damaged_configuration_is_refused(run_path: str) -> None:
    Path(run_path, "config.yaml").write_text("model: {n_layers: 3}\n")
    with pytest.raises(ConfigError, match=r"cannot be read(.|\n)*did you mean model\.n_layer"):
        open_run(resolve(["--run_dir", run_path]))


def test_the_data_pointer(tmp_path: Path) -> None:
    run = open_run(Config(run_dir=str(tmp_path / "run")))
    assert run.read_data_pointer() is None
    run.write_data_pointer({"books": tmp_path / "shards"}, identity={"tokens": "abc"})
    assert run.read_data_pointer() == ({"books": tmp_path / "shards"}, {"tokens": "abc"})


@pytest.mark.parametrize("kind", ["fifo", "endless", "nested", "digits", "twice", "list"])
def test_a_hostile_data_pointer_is_refused(tmp_path: Path, kind: str) -> None:
    run = open_run(Config(run_dir=str(tmp_path / "run")))
    texts = {
        "nested": '{"folders": ' + "[" * 100_000,
        "digits": '{"folders": ' + "1" * 10_000 + "}",
        "twice": '{"folders": {}, "folders": {}, "identity": {}}',
        "list": '{"folders": [], "identity": {}}',
    }
    if kind == "fifo":
        os.mkfifo(run.data)
    elif kind == "endless":
        run.data.symlink_to("/dev/zero")
    else:
        run.data.write_text(texts[kind])
    with pytest.raises(ConfigError, match=r"its data\.json cannot be read"):
        run.read_data_pointer()


def test_another_user_can_read_the_run(tmp_path: Path) -> None:
    run = open_run(Config(run_dir=str(tmp_path / "run")))
    run.write_data_pointer({"books": tmp_path / "shards"}, identity={"tokens": "abc"})
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (run.config, run.data)}
    assert modes == {"config.yaml": 0o644, "data.json": 0o644}


def test_numbers_keep_every_digit() -> None:
    config = assemble({"optimizer.learning_rate": math.pi * 1e-5})
    assert yaml.safe_load(to_yaml(config))["optimizer"]["learning_rate"] == math.pi * 1e-5


@pytest.mark.parametrize("other", ["runs", "has run"])
def test_a_run_that_comes_second_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Two runs that start in one new directory both find it empty; one claims it first."""
    path = tmp_path / "run"
    config = resolve(["--run_dir", str(path)])
    first = resolve(["--run_dir", str(path), "--optimizer.learning_rate", "0.5"])
    claims = ExitStack()
    job = object.__new__(Job)  # no more of it is used
    vars(job)["config"] = config

    def prepare(_config: Config) -> Job:
        checkpointer = claims.enter_context(tjx_ckpt.Checkpointer(path / "checkpoints"))
        checkpointer.claim()
        if other == "has run":
            open_run(first)
            claims.close()
        return job

    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    after_first: dict[str, bytes] = {}
    make = run_dir.make_run_dir

    def make_and_look(config: Config) -> RunDirectory:
        after_first.update(content())
        return make(config)

    for name in ("check_requirements", "check_data_unchanged"):
        monkeypatch.setattr(train, name, lambda _: None)
    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "make_run_dir", make_and_look)
    error = tjx_ckpt.DirectoryInUseError if other == "runs" else ConfigError
    with claims, pytest.raises(error), SignalHandler() as signal_handler:
        train.start(config, signal_handler, dry_run=False, eval_only=False)
    assert after_first
    changed = {name: text for name, text in content().items() if after_first.get(name) != text}
    assert {Path(name).name for name in changed} <= {".writer"}  # who tried to lock it last


def test_a_directory_of_checkpoints_elsewhere_does_not_let_two_runs_in(tmp_path: Path) -> None:
    words = ["--run_dir", str(tmp_path / "run"), "--checkpoint.directory"]
    run = RunDirectory(tmp_path / "run")
    one, two = (resolve([*words, str(tmp_path / name)]) for name in ("one", "two"))
    with (
        train.open_checkpointer(one, run) as first,
        train.open_checkpointer(two, run) as second,
        train.claim_run_dir(one, run, first),
        pytest.raises(tjx_ckpt.DirectoryInUseError),
        train.claim_run_dir(two, run, second),
    ):
        raise AssertionError("both runs have the directory")
