"""nanoGPT compatibility: flags, config files, resume and notes on differences."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from small_text import flags_of_sheep

import tjx_optim
from tjx_core import ConfigError
from tjx_metrics import read_metrics
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.nanogpt import translate as nanogpt
from tjx_trainer.cli.nanogpt.config_files import BUNDLED_CONFIGS
from tjx_trainer.cli.nanogpt.flags import FLAGS, to_config_values
from tjx_trainer.cli.nanogpt.translate import translate
from tjx_trainer.config.config_tree import flatten, leaves
from tjx_trainer.config.run_config import Config
from tjx_trainer.main import main

# The README's setting for a CPU, as it stands there behind `python train.py`.
PUBLISHED = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
DEFAULTS = {name: flag.default for name, flag in FLAGS.items()}

# Another value of each flag that has a meaning here.
OTHER: dict[str, Any] = {
    "out_dir": "there", "eval_interval": 7, "log_interval": 7, "eval_iters": 7,
    "always_save_checkpoint": False, "init_from": "gpt2-medium", "wandb_log": True,
    "wandb_project": "p", "wandb_run_name": "r", "dataset": "shakespeare_char",
    "gradient_accumulation_steps": 7, "batch_size": 7, "block_size": 7, "n_layer": 7, "n_head": 7,
    "n_embd": 7, "dropout": 0.5, "bias": True, "learning_rate": 1.0, "max_iters": 7,
    "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.5, "grad_clip": 0.0, "decay_lr": False,
    "warmup_iters": 7, "lr_decay_iters": 7, "min_lr": 0.5, "device": "cpu", "dtype": "float16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder without data, and leave the devices' variables as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def config_of(words: str) -> Config:
    return resolve(translate(["--nanogpt", *words.split()]).words)


def test_help_lists_every_flag_of_nanogpt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nanogpt", "--help"]) == 0
    printed = capsys.readouterr().out
    assert {f"--{name}" for name in FLAGS} <= set(printed.split())


def problems_of(words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        translate(["--nanogpt", *words.split()])
    return [str(problem) for problem in caught.value.problems]


def test_the_published_cpu_flags_give_the_published_setting() -> None:
    config = config_of(PUBLISHED)
    model, train, optimizer = config.model, config.train, config.optimizer
    assert (model.n_layer, model.n_head, model.d_model, model.max_seq_len) == (4, 4, 128, 64)
    assert (model.bias, model.activation, model.dropout) == (False, "gelu_erf", 0.0)
    assert (train.max_steps, train.batch_size, train.precision) == (2000, 12, "fp32")
    assert train.eval_tokens == 20 * 12 * 64
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (1e-3, 0.9, 0.99)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert optimizer.decay_embeddings
    assert (config.data.corpus, config.data.tokenizer) == ("shakespeare", "char")
    assert (config.data.holdout, config.data.holdout_fraction) == ("tail", 0.1)
    assert config.data.windows == "random"
    assert config.run_dir == "out-shakespeare-char"
    # The data set stands for its config file.
    assert config_of(PUBLISHED.replace("config/train_", "--dataset=").replace(".py", "")) == config


def test_without_a_flag_it_is_train_py_as_the_preset_has_it() -> None:
    of_flags, of_preset = flatten(config_of("")), flatten(resolve(["--config=nanogpt"]))
    other = {name for name in of_flags if of_flags[name] != of_preset[name]}
    assert other == {"run_dir", "name"}
    assert config_of("train.py --dataset=shakespeare_char").train.batch_size == 480


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_changes_only_the_fields_in_the_table(name: str) -> None:
    flag = FLAGS[name]
    assert set(flag.becomes) <= leaves().keys()
    if name not in OTHER:
        assert not flag.becomes
        return
    before = to_config_values(DEFAULTS)
    after = to_config_values({**DEFAULTS, name: OTHER[name]})
    changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    sizes = {"model.n_layer", "model.n_head", "model.d_model", "model.bias"}
    assert changed
    assert changed <= {*flag.becomes, *(sizes if name == "init_from" else ())}


def nanogpt_rate(it: int, *, peak: float, warmup: int, end: int, lowest: float) -> float:
    """Give the rate of a step as train.py's get_lr does."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > end:
        return lowest
    share = (it - warmup) / (end - warmup)
    return lowest + 0.5 * (1 + math.cos(math.pi * share)) * (peak - lowest)


@pytest.mark.parametrize("decays", [True, False])
def test_every_step_has_the_rate_that_train_py_gives_it(decays: bool) -> None:
    config = config_of(
        f"--dataset=shakespeare --learning_rate=1e-3 --min_lr=1e-4 --warmup_iters=10 "
        f"--lr_decay_iters=50 --max_iters=80 --decay_lr={decays}"
    )
    rates = tjx_optim.learning_rates(
        config.schedule, learning_rate=1e-3, max_steps=80, steps=np.arange(80)
    )
    expected = [
        nanogpt_rate(it, peak=1e-3, warmup=10, end=50, lowest=1e-4) if decays else 1e-3
        for it in range(80)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_a_step_has_the_same_sequences_on_any_number_of_devices() -> None:
    config = config_of("--batch_size=6 --gradient_accumulation_steps=8 --max_iters=9")
    assert config.train.batch_size == 48
    # As torchrun's processes divide the accumulation among them.
    assert [config.train.accumulation_for(shards) for shards in (1, 2, 8)] == [8, 4, 1]


@pytest.mark.parametrize("name", BUNDLED_CONFIGS)
def test_the_shipped_config_files_are_known(name: str) -> None:
    words = f"config/{name}.py --eval_only=False"
    values = BUNDLED_CONFIGS[name]
    assert set(values) <= set(FLAGS)
    config = config_of(words)
    pieces = int(values.get("gradient_accumulation_steps", 40))
    assert config.train.batch_size == int(values["batch_size"]) * pieces
    gpt2 = values.get("init_from")
    assert config.train.init_from == (gpt2 and f"openai-community/{gpt2}")
    if gpt2 == "gpt2-xl":
        assert (config.model.n_layer, config.model.bias) == (48, True)
        assert config.model.activation == "gelu_tanh"
    if name.startswith("eval"):
        assert "--eval_only" in translate(["--nanogpt", f"config/{name}.py"]).words
        assert "--eval_only" not in translate(["--nanogpt", *words.split()]).words
        problem = problems_of(f"config/{name}.py --init_from=resume --out_dir=old")[0]
        assert "apps/eval -- loss old" in problem


def test_a_users_config_file_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import time\n'words'\nbatch_size = 5 * 8  # rows\nlearning_rate = 3e-4\n"
        "wandb_run_name = 'a' + str(time.time())\nmine = 4\nn_layer=2\n"
    )
    translation = translate(["--nanogpt", str(file), "--n_layer=3", "--max_iters=9"])
    config = resolve(translation.words)
    assert (config.train.batch_size, config.model.n_layer) == (1600, 3)
    assert config.optimizer.learning_rate == 3e-4
    assert any(
        "mine.py:6: mine: train.py has no such setting; ignored" in n for n in translation.notes
    )
    file.write_text(
        "batch_sizes = 3\nn_head = open('x').read()\nif True:\n  n_embd = 4\nbias = 3\n"
    )
    problems = "\n".join(problems_of(str(file)))
    assert (
        "mine.py:1: batch_sizes: train.py has no such setting; did you mean batch_size?" in problems
    )
    assert "mine.py:2: got a computed n_head" in problems
    assert "mine.py:3: expected `name = value`" in problems
    assert "mine.py:5: bias: got '3'; expected true or false" in problems


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--batchsize=3", "did you mean --batch_size?"),
        ("--n_embed=3", "did you mean --n_embd?"),
        ("--lr=3", "did you mean --learning_rate?"),
        ("--d_model=3", "did you mean --model.d_model?"),
        ("--batch_size=ten", "--batch_size: got 'ten'; expected a whole number, such as 12"),
        ("--batch_size=3 --batch_size=4", "--batch_size: given twice"),
        ("--batch_size=0", "--batch_size: got 0; expected at least 1"),
        ("--init_from=gpt2-lage", "did you mean gpt2-large?"),
        ("--device=mps", "expected cpu, cuda, or one GPU"),
        ("--dtype=bf16", "did you mean bfloat16?"),
        ("--dataset=shakespere_char", "did you mean shakespeare_char?"),
        ("--init_from=resume", "--out_dir=out holds no run"),
        ("--init_from=gpt2 --dataset=shakespeare_char", "give --dataset=shakespeare"),
        ("--init_from=gpt2 --block_size=2048", "got 2048; expected at most 1024"),
        ("--config=quickstart", "give a config file without a flag"),
        ("conf/train_gpt3.py", "did you mean config/train_gpt2.py?"),
        ("quickstart", "belongs to no flag"),
        ("--eval_interval=0", "(nanoGPT's --eval_interval)"),
        ("--n_head=5", "(nanoGPT's --n_head, --n_embd)"),
    ],
)
def test_a_wrong_argument_is_reported_with_a_suggestion(words: str, says: str) -> None:
    assert says in "\n".join(problems_of(words))


def test_ignored_flags_are_noted_only_if_given() -> None:
    told = translate(["--nanogpt", "--compile=False", "--backend=gloo", "--device=cuda:1"])
    assert told.notes[:2] == [
        "--backend=gloo: JAX has its own communication; see --distributed.*; ignored",
        "--compile=False: tjx always compiles; ignored",
    ]
    assert told.environment == {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "1"}
    plain = translate(["--nanogpt"])
    assert len(plain.notes) == 1
    assert "the same 2,457,600 validation tokens" in plain.notes[0]
    assert not plain.environment


def test_missing_gpu_support_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanogpt, "_CUDA_PLUGINS", ("no_such_plugin",))
    with pytest.raises(ConfigError, match="--device=cuda"):
        nanogpt.check_device({"JAX_PLATFORMS": "cuda"})
    nanogpt.check_device({"JAX_PLATFORMS": "cpu"})
    nanogpt.check_device({})


def test_the_text_is_where_prepare_py_leaves_it_or_is_given_beside() -> None:
    Path("data/sheep_char").mkdir(parents=True)
    Path("data/sheep_char/input.txt").write_text("sheep")
    data = config_of("--dataset=sheep_char --max_iters=9").data
    assert (data.path, data.tokenizer) == ("data/sheep_char/input.txt", "char")
    assert (data.holdout, data.holdout_fraction) == ("tail", 0.1)
    beside = config_of("--dataset=sheep_char --data.path=mine.txt --model.bias --seed=3")
    assert (beside.data.path, beside.model.bias, beside.seed) == ("mine.txt", True, 3)
    assert config_of("--dataset=openwebtext").data.holdout_fraction == 0.0005


TINY = (  # batch_size is 8 as tests have 8 devices
    "--dataset=shakespeare_char --device=cpu --compile=False --eval_iters=2 --eval_interval=20 "
    "--log_interval=1 --block_size=16 --batch_size=8 --n_layer=1 --n_head=2 --n_embd=32 "
    "--lr_decay_iters=40 --warmup_iters=4 --learning_rate=1e-2 --dropout=0.0"
)


def test_a_tiny_run_learns_and_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [*flags_of_sheep(tmp_path), "--train.sample_tokens=0"]

    def run(*words: str, tiny: str = TINY) -> int:
        with jax.transfer_guard("allow"):
            return main(["--nanogpt", *tiny.split(), *ours, *words])

    assert run("--out_dir=none", "--max_iters=40", "--eval_only=True") == 0
    out = capsys.readouterr().out
    assert "Nothing was trained." in out
    assert float(out.partition("loss ")[2].split()[0]) > 2  # nats; nothing is learnt yet
    assert not Path("none").exists()

    assert run("--out_dir=whole", "--max_iters=40") == 0
    losses = {r["step"]: r["train/loss"] for r in read_metrics(Path("whole/metrics.jsonl"))
              if "train/loss" in r}  # fmt: skip
    assert losses[40] < losses[1] - 1.5
    assert "note           --compile=False: tjx always compiles" in capsys.readouterr().err

    assert run("--out_dir=parts", "--max_iters=20") == 0
    with pytest.raises(SystemExit):
        run("--out_dir=parts", "--max_iters=40")
    assert "resume it by --init_from=resume" in capsys.readouterr().err
    resume = ("--out_dir=parts", "--max_iters=40", "--init_from=resume")
    assert run(*resume, tiny=TINY.replace("n_layer=1", "n_layer=3")) == 0
    told = capsys.readouterr().err
    assert "--n_layer=3: the saved 1 is used" in told
    assert "from step 20" in told
    parts = {r["step"]: r["train/loss"] for r in read_metrics(Path("parts/metrics.jsonl"))
             if "train/loss" in r}  # fmt: skip
    assert parts == losses
