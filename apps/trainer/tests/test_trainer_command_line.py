"""Command line: a valid configuration, or all mistakes at once."""

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_core import ConfigError
from tjx_optim.schedule_config import ScheduleConfig
from tjx_trainer import main
from tjx_trainer.cli import help_page
from tjx_trainer.cli.arguments import COMMANDS, resolve
from tjx_trainer.cli.command_line import parse
from tjx_trainer.cli.help_page import UNITS, help_text
from tjx_trainer.config import presets
from tjx_trainer.config.config_tree import flatten, leaves
from tjx_trainer.config.presets import (
    RawValue,
    load_preset,
    preset_names,
    section_names,
    suggest_names,
)
from tjx_trainer.config.run_config import Config

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "datasets", "matplotlib", "tokenizers"}


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(argv)
    return [str(problem) for problem in caught.value.problems]


def only_problem_of(*argv: str) -> str:
    (problem,) = problems_of(*argv)
    return problem


def test_flags_override_the_preset_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer:\n  learning_rate: 6e-5\n  b1: 0.8\ntrain: {max_steps: 7}\n")
    config = resolve(["--config", str(file), "--optimizer.b1", "0.7"])
    assert (config.optimizer.learning_rate, config.optimizer.b1) == (6e-5, 0.7)
    assert config.train.max_steps == 7
    assert config.optimizer.b2 == Config().optimizer.b2
    assert config.name == "mine"


def test_the_forms_of_a_flag() -> None:
    config = resolve([
        "--seed=3",
        "--model.bias", "false",
        "--optimizer.decay_embeddings",
        "--optimizer.name=sgd", "--optimizer.nesterov",
        "--model.d_ff=none",
        "--optimizer.clip_norm", "none",
        "--optimizer.learning_rate", "6e-4",
        "--mesh.data", "-1",
        "--train.sample_prompt=--a = b",
    ])  # fmt: skip
    assert config.seed == 3
    assert config.model.bias is False
    assert config.optimizer.decay_embeddings is True
    assert config.optimizer.nesterov is True
    assert config.model.d_ff is None
    assert config.optimizer.clip_norm is None
    assert config.optimizer.learning_rate == 6e-4
    assert config.mesh.data == -1
    assert config.train.sample_prompt == "--a = b"


def test_three_mistakes_are_reported_together_with_suggestions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--config", "gpt2_smal", "--model.n_layers", "6", "--train.batch_size", "ten"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "3 mistakes" in err
    assert "did you mean gpt2_small?" in err
    assert "did you mean --model.n_layer?" in err
    assert "got 'ten'; expected a whole number, such as 12" in err
    assert len(err.splitlines()) <= 20


def test_a_refusal_loads_nothing_heavy() -> None:
    script = (
        "import json, sys\n"
        "from tjx_trainer.cli.command_line import parse\n"
        "import tjx_trainer.runtime.run_dir\n"
        "words = '--config gpt2_smal --model.n_layers 6 --train.batch_size ten'\n"
        "try: parse(words.split())\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stdout)
    assert code == 2
    assert not HEAVY & set(modules)


def test_versions_and_missing_files_are_reported_before_jax_is_imported(tmp_path: Path) -> None:
    script = (
        "import contextlib, io, json, sys\n"
        "from tjx_trainer import __version__, main\n"
        "def call(*words):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, \\\n"
        "            contextlib.redirect_stderr(out):\n"
        "        try: main.main(words)\n"
        "        except SystemExit as end: return end.code, out.getvalue()\n"
        "told = call('--version'), call('--data.path', 'gone.txt', '--data.tokenizer=byte')\n"
        "print(json.dumps([*told, __version__, 'jax' in sys.modules]))\n"
    )
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}

    def run(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, check=True,
            cwd=tmp_path,
        ).stdout  # fmt: skip

    versions, missing, own, has_jax = json.loads(run("-c", script))
    assert versions[0] == 0
    assert f"tjx-trainer    {own}\n" in versions[1]
    assert f"jax            {metadata.version('jax')}\n" in versions[1]
    assert missing[0] == 2
    assert "data.path: got 'gone.txt'; no such file" in missing[1]
    assert not has_jax
    assert run("-m", "tjx_trainer", "--version") == versions[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--n_head", "4"], "did you mean --model.n_head or --model.sparse.n_head?"),
        (["--n_layers", "4"], "did you mean --model.n_layer?"),
        (["--lr", "1e-3"], "did you mean --optimizer.learning_rate?"),
        (["--optimizer.lr", "1e-3"], "did you mean --optimizer.learning_rate?"),
        (["--optimizer.warmup", "4"], "did you mean --schedule.warmup_steps"),
        (
            ["--every", "4"],
            "did you mean --checkpoint.every or --log.every or --model.experts.every?",
        ),
        (["--Train.Max-Steps", "4"], "did you mean --train.max_steps?"),
        (["--modle.n_head", "4"], "did you mean --model.n_head?"),
        (["--confg", "quickstart"], "did you mean --config?"),
        (["-config", "quickstart"], "-config: unknown flag; did you mean --config?"),
        (["--model.zzz", "4"], "model has n_layer, n_head"),
        (["--zzz"], "see --help"),
        (["quickstart"], "did you mean --config quickstart?"),
        (["swep", "--seed", "1"], "swep: unknown command; did you mean sweep?"),
        (["--seed", "1", "plan"], "commands come first, as in `trainer plan ...`"),
        (["--nanogtp"], "did you mean --nanogpt?"),
        (["n_layer=6"], "did you mean --model.n_layer=6?"),
        (["junk"], "belongs to no flag"),
        (["--seed", "1", "--seed=2"], "--seed: given twice"),
        (["--config=quickstart", "--config=quickstart"], "--config: given twice"),
        (["--config"], "got no value; expected a preset (bert_base, "),
        (["--seed"], "got no value; expected a whole number"),
        (["--data.path="], "got no value; expected text, or none"),
        (["--train.max_steps", "1e3"], "such as 1000"),
        (["--train.max_steps", "2.5"], "expected a whole number"),
        (["--model.bias", "maybe"], "expected true or false"),
        (["--optimizer.learning_rate", "nan"], "expected a number"),
        (["--optimizer.name", "adamww"], "did you mean adamw?"),
        (["--seed", "none"], "got 'none'; expected a whole number"),
    ],
)
def test_a_wrong_argument_is_reported_with_a_suggestion(argv: list[str], says: str) -> None:
    assert says in only_problem_of(*argv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model:\n  n_layers: 3\n", "mine.yaml:2: model.n_layers: unknown key; did"),
        ("modle:\n  n_layer: 3\n", "did you mean model?"),
        ("model:\n  zzz: 3\n", "model has n_layer"),
        ("train:\n  batch_size: ten\n", "mine.yaml:2: train.batch_size: got 'ten'"),
        ("train:\n  batch_size: true\n", "expected a whole number"),
        ("train:\n  batch_size:\n", "expected a whole number"),
        ("train:\n  batch_size: [1, 2]\n", "got '1,2'; expected a whole number"),
        ("train:\n  batch_size: {a: 1}\n", "expected one value"),
        ("train:\n  batch_size: 12\n  batch_size: 12\n", "mine.yaml:3: train.batch_size: given"),
        ("train: 5\n", "train is a section"),
        ("[a]: 5\n", "expected a name"),
        ("- a\n", "expected sections"),
        ("a: [\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
        ("model: &m\n  n_layer: *m\n", "expected one value"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_preset_is_reported_with_its_line(
    tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert says in only_problem_of("--config", str(file))


def test_an_unreadable_preset_is_reported(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("# für\n".encode("latin-1"))
    assert "not UTF-8 (byte 3)" in only_problem_of("--config", str(latin))
    (tmp_path / "config.yaml").touch()
    assert str(tmp_path / "config.yaml") in only_problem_of("--config", str(tmp_path))
    missing = tmp_path / "latim.yaml"
    assert f"did you mean {latin}?" in only_problem_of("--config", str(missing))
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (presets.MAX_PRESET_BYTES + 1))
    assert "is it a preset?" in only_problem_of("--config", str(huge))


def test_an_empty_section_and_an_empty_file_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text in ("", "# only words\n", "model:\n  # n_layer: 3\ntrain: {}\n"):
        file.write_text(text)
        assert resolve(["--config", str(file)]) == Config()


def test_sections_are_checked_despite_wrong_arguments() -> None:
    problems = problems_of(
        "--config", "gpt2_smal", "--model.n_head", "5", "--data.seq_len", "4096", "--lr", "1"
    )
    assert len(problems) == 4
    assert any("with n_head 5" in line for line in problems)
    assert any(
        "data.seq_len: got 4096; expected at most model.max_seq_len" in line for line in problems
    )


def test_an_unreadable_value_is_not_checked_by_its_default() -> None:
    # 1600 is not divisible by the default n_head, but another n_head was meant.
    assert "n_head" in only_problem_of("--model.d_model", "1602", "--model.n_heads", "18")
    assert "ten" in only_problem_of("--train.batch_size", "ten", "--train.accumulation", "7")


def test_precision_and_vocabulary_imply_other_values(tmp_path: Path) -> None:
    assert resolve(["--train.precision", "bf16"]).model.dtype == "bfloat16"
    assert "--train.precision" in only_problem_of("--model.dtype", "bfloat16")
    assert resolve([]).train.vocab_from_tokenizer
    assert not resolve(["--model.vocab_size", "50304"]).train.vocab_from_tokenizer
    file = tmp_path / "resolved.yaml"
    file.write_text("model: {vocab_size: 9000}\ntrain: {vocab_from_tokenizer: true}\n")
    assert resolve(["--config", str(file)]).train.vocab_from_tokenizer
    later = resolve(["--config", str(file), "--model.vocab_size", "9000"])
    assert not later.train.vocab_from_tokenizer


def test_another_optimizer_ignores_the_numbers_of_the_presets_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "optimizer: {name: adamw, b2: 0.99, weight_decay: 0.2}\nschedule: {final_fraction: 0.3}\n"
    )
    config = ["--config", str(file)]
    assert resolve([*config, "--optimizer.name", "adamw"]).optimizer.b2 == 0.99
    sgd = resolve([*config, "--optimizer.name", "sgd", "--optimizer.momentum", "0.8"]).optimizer
    assert (sgd.b2, sgd.momentum, sgd.weight_decay) == (None, 0.8, None)
    held = resolve([*config, "--schedule.name", "constant"]).schedule
    assert held.final_fraction == ScheduleConfig().final_fraction
    assert "b2: got 0.9; expected none, since sgd does not use it" in only_problem_of(
        *config, "--optimizer.name", "sgd", "--optimizer.b2", "0.9"
    )


def test_lists_come_from_flags_and_presets(tmp_path: Path) -> None:
    pieces = ["--schedule.name=piecewise", "--schedule.factors=0.5,0.1"]
    steps = resolve([*pieces, "--schedule.boundaries=200,400"]).schedule
    assert steps.boundaries == (200, 400)
    assert all(isinstance(at, int) for at in steps.boundaries)
    assert resolve([*pieces, "--schedule.boundaries=0.5,0.8"]).schedule.boundaries == (0.5, 0.8)
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer:\n  groups:\n  - 'wte/*: frozen'\n  - 'blocks/*: weight_decay=0'\n")
    assert len(resolve(["--config", str(file)]).optimizer.parameter_groups) == 2
    flag = "--optimizer.groups=wte/*: frozen, blocks/*: learning_rate_scale=0.5 weight_decay=0"
    frozen, slow = resolve([flag]).optimizer.parameter_groups
    assert frozen.frozen
    assert (slow.learning_rate_scale, slow.weight_decay) == (0.5, 0.0)


def test_the_124_million_model_takes_a_batch_of_one() -> None:
    config = resolve([
        *("--config", "gpt2_small", "--data.corpus", "python-docs"),
        *("--train.max_steps", "2", "--train.batch_size", "1"),
    ])  # fmt: skip
    assert config.train.accumulation_for(shards=1) == 1
    assert flatten(config)["model.vocab_size"] == 50257


def test_help_shows_every_flag_with_its_line_the_presets_value_and_its_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--config", "gpt2_large", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    text = " ".join(out.split())
    for leaf in leaves():
        assert f"--{leaf} " in text
    for preset in preset_names():
        assert f"{preset} {load_preset(preset).description.split()[1]}" in text
    for command in main._COMMANDS:
        assert f"{command} {COMMANDS[command]}" in text
    assert "Number of blocks. [36 blocks]" in text
    assert "(fp32, bf16, fp16, fp8) [bf16]" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    usage, *rest = help_text().split("\n\n")
    assert max(len(line) for part in rest for line in part.splitlines()) <= min(width, 120)
    assert max(map(len, usage.splitlines())) <= 80


def test_help_of_a_section_lists_its_flags_only() -> None:
    for section in section_names():
        told = {w[2:] for w in help_text(["--help", section]).split() if w.startswith("--")}
        assert {n for n in leaves() if n.startswith(f"{section}.")} == told & set(leaves())
    assert "[36 blocks]" in help_text(["--help", "model", "--config", "gpt2_large"])
    assert "Reaches:" in help_text(["--help", "presets"])
    with pytest.raises(ConfigError, match="did you mean optimizer"):
        help_text(["--help", "optimzer"])


def test_every_flag_has_a_line_of_help_and_every_unit_a_flag() -> None:
    for leaf in leaves().values():
        assert help_page._lines_of(leaf.owner).get(leaf.name.rpartition(".")[2]), leaf.name
    assert UNITS.keys() <= leaves().keys()


def test_help_helps_beside_mistakes() -> None:
    assert "--model.n_layer" in help_text(["--help", "--config", "nope", "--zzz"])


@given(st.sampled_from(sorted(leaves())))
def test_a_right_name_is_its_own_nearest(name: str) -> None:
    assert suggest_names(name) == [name]
    assert suggest_names(name.upper().replace("_", "-")) == [name]
    own_name = name.rpartition(".")[2]
    assert own_name in leaves() or name in suggest_names(own_name)


@settings(max_examples=30)
@given(st.lists(st.text(max_size=12) | st.sampled_from([f"--{n}" for n in leaves()]), max_size=6))
def test_any_arguments_give_a_configuration_or_problems(words: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(resolve(words), Config)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_as_a_preset_gives_values_or_problems(text: str) -> None:
    values, problems = presets._read_values(text, "x.yaml")
    assert all(isinstance(value, RawValue) for value in values.values())
    assert all(problems)
