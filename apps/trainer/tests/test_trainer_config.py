"""Configuration tree: checks within and between sections."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_core import ConfigError
from tjx_data.config import DataConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_tree import assemble, flatten, leaves
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.train_config import TrainConfig
from tjx_trainer.tasks.text_data import fit_vocabulary

SIZES = st.integers(1, 64)


def test_the_defaults_are_valid_and_flat_values_rebuild_them() -> None:
    assert assemble({}) == Config()
    assert assemble(flatten(Config())) == Config()


def test_the_names_that_scripts_rely_on_exist() -> None:
    promised = {
        "": "run_dir seed",
        "model.": "n_layer n_head n_kv_head d_model d_ff max_seq_len vocab_size dropout",
        "data.": "corpus path seq_len",
        "train.": "max_steps batch_size accumulation precision eval_every",
        "optimizer.": "name learning_rate weight_decay",
        "schedule.": "name warmup_steps",
        "mesh.": "stage data fsdp context expert tensor",
        "checkpoint.": "every keep",
    }
    names = {section + name for section, text in promised.items() for name in text.split()}
    assert names <= set(leaves())


@given(batch=SIZES, limit=SIZES, shards=st.integers(1, 8))
def test_pieces_are_equal_within_the_limit_and_as_few_as_can_be(
    batch: int, limit: int, shards: int
) -> None:
    train = TrainConfig(batch_size=batch, device_batch_size=limit)
    if batch % shards:
        with pytest.raises(ValueError, match="expected a multiple of"):
            train.accumulation_for(shards)
        return
    pieces = train.accumulation_for(shards)
    on_a_device = batch // shards
    assert on_a_device % pieces == 0
    assert on_a_device // pieces <= limit
    fewer = [n for n in range(1, pieces) if on_a_device % n == 0]
    assert all(on_a_device // n > limit for n in fewer)


def test_an_explicit_accumulation_is_kept_and_the_multiple_that_fits_is_named() -> None:
    assert TrainConfig(batch_size=24, accumulation=6, device_batch_size=1).accumulation_for(2) == 6
    with pytest.raises(ValueError, match=r"multiple of 18 .*--train.batch_size 36$"):
        TrainConfig(batch_size=24, accumulation=6).accumulation_for(3)


def test_every_contradiction_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(
            seed=-1,
            name="a/b",
            model=GPTConfig(vocab_size=300, max_seq_len=64),
            data=DataConfig(seq_len=65, tokenizer="bpe", vocab_size=301),
            train=TrainConfig(batch_size=9, precision="bf16", vocab_from_tokenizer=False),
            mesh=MeshConfig(data=2, tensor=5),
        )
    problems = str(caught.value)
    assert len(caught.value.problems) == 8
    for text in (
        "seed: got -1",
        "name: got 'a/b'",
        "data.seq_len: got 65; expected at most model.max_seq_len=64",
        "model.vocab_size: got 300; expected at least the tokenizer's 301",
        "model.dtype: got float32; expected bfloat16",
        "train.batch_size: got 9; expected a multiple of 2",
        "mesh.tensor: got 5; expected a divisor of model.n_head=12",
        "mesh.tensor: got 5; expected a divisor of model.d_ff=3072",
    ):
        assert text in problems


def test_every_value_of_a_section_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="max_steps") as caught:
        TrainConfig(max_steps=0, batch_size=0, eval_tokens=0, sample_tokens=-1)
    assert len(str(caught.value).splitlines()) == 4


def test_a_rejected_value_does_not_hide_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        assemble({"model.dropout": 2.0, "model.max_seq_len": 8, "data.seq_len": 9})
    first, second = map(str, caught.value.problems)
    assert first.startswith("model.dropout: got 2.0; expected")
    assert second.startswith("data.seq_len: got 9")


def test_an_inferred_mesh_size_is_checked_later() -> None:
    assert Config(train=TrainConfig(batch_size=9), mesh=MeshConfig(data=-1, fsdp=3))
    with pytest.raises(ConfigError, match="expected a multiple of 2"):
        Config(train=TrainConfig(batch_size=9), mesh=MeshConfig(data=-1, fsdp=2))


def test_the_vocabulary_follows_the_tokenizer_unless_it_was_given() -> None:
    following = Config()
    assert flatten(following.with_vocabulary(777))["model.vocab_size"] == 777
    padded = dataclasses.replace(following, train=TrainConfig(vocab_from_tokenizer=False))
    assert padded.with_vocabulary(50257) is padded
    masked = flatten(padded.with_vocabulary(50000))
    assert (masked["model.vocab_size"], masked["model.tokenizer_size"]) == (50257, 50000)
    with pytest.raises(ValueError, match=r"at least the tokenizer's 50258.*50304"):
        padded.with_vocabulary(50258)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"schedule.name": "wsd", "schedule.cooldown_steps": 20, "train.max_steps": 10},
            "schedule.*cooldown_steps: got 20 steps in a run of max_steps=10",
        ),
        (
            {"optimizer.name": "schedule_free_adamw"},
            "give --schedule.name constant",
        ),
        (
            {"model.mup_base": 64, "optimizer.name": "muon"},
            "expected one of adam, adamw, lion, schedule_free_adamw",
        ),
    ],
)
def test_optimizers_and_schedules_that_do_not_go_with_the_rest_are_refused(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        assemble(values)
    free = {"schedule.name": "constant", "schedule.cooldown_steps": None, "model.mup_base": None}
    assemble({**values, **free})


def test_profiled_steps_must_be_steps_of_the_run() -> None:
    with pytest.raises(ConfigError, match=r"profile.steps: got 9-11; .* train.max_steps=10"):
        assemble({"profile.steps": "9-11", "train.max_steps": 10})
    assemble({"profile.steps": "9-10", "train.max_steps": 10})


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/run", "s3://key:a@b@bucket/run"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint\.directory: got a URL with a user or a password"
    ) as caught:
        resolve(["--checkpoint.directory", url])
    assert "key" not in str(caught.value)
    resolve(["--checkpoint.directory", "s3://bucket/name@2x/run"])


def test_ids_that_the_tokenizer_lacks_are_masked_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = fit_vocabulary(resolve(["--model.vocab_size", "6000"]), 4096).model
    assert isinstance(fitted, GPTConfig)
    assert (fitted.vocab_size, fitted.tokenizer_size) == (6000, 4096)
    assert (
        "model.vocab_size 6,000 is larger than the tokenizer's 4,096 ids" in capsys.readouterr().err
    )
    fitted = fit_vocabulary(resolve([]), 4096).model
    assert isinstance(fitted, GPTConfig)
    assert (fitted.vocab_size, fitted.tokenizer_size) == (4096, None)
    assert not capsys.readouterr().err
