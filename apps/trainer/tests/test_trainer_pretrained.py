"""Runs from pretrained weights, and rejection of incompatible ones."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tjx_ckpt
import tjx_nn
from tjx_core import ConfigError
from tjx_data import train_bpe
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.run_config import Config
from tjx_trainer.training import pretrained
from tjx_trainer.training.build import build_step_components, make_update_rule
from tjx_trainer.training.pretrained import check_pretrained, check_tokenizer, pretrained_params
from tjx_trainer.training.train_state import initial_state

THEIRS = GPTConfig(n_layer=2, n_head=2, d_model=8, max_seq_len=16, vocab_size=257)
FLAGS = [
    *("--model.n_layer=2", "--model.n_head=2", "--model.d_model=8", "--model.vocab_size=257"),
    *("--model.max_seq_len=8", "--data.seq_len=8", "--data.tokenizer=byte", "--mesh.data=1"),
    *("--model.vocab_multiple=4", "--train.batch_size=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs")
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(THEIRS, jax.random.key(3))
        tjx_nn.hf.save(path, THEIRS, jax.device_get(params))
    return path


def test_the_weights_are_the_folders_and_tables_are_fitted(folder: Path) -> None:
    config = resolve([*FLAGS, f"--train.init_from={folder}"])
    parts = build_step_components(config, jax.devices()[:1])
    with jax.transfer_guard("allow"):
        state = initial_state(config, parts.optimizer, parts.abstract)
    _, theirs = tjx_nn.hf.load(folder)
    ours = jax.device_get(state.params)
    assert ours["wte"]["embedding"].shape == (260, 8)
    np.testing.assert_array_equal(ours["wte"]["embedding"][:257], theirs["wte"]["embedding"])
    assert not ours["wte"]["embedding"][257:].any()
    np.testing.assert_array_equal(ours["wpe"]["embedding"], theirs["wpe"]["embedding"][:8])
    chex.assert_trees_all_equal(ours["blocks"], theirs["blocks"], strict=True)
    assert int(jax.device_get(state.step)) == 0


def test_another_shape_is_reported_with_the_flags_that_fix_it(folder: Path) -> None:
    config = resolve([*FLAGS, f"--train.init_from={folder}"])
    assert isinstance(config.model, GPTConfig)
    model = replace(config.model, n_layer=3, bias=False, vocab_size=300, max_seq_len=32)
    with pytest.raises(ValueError, match="n_layer") as caught:
        check_pretrained(replace(config, model=model))
    problems = str(caught.value).splitlines()
    assert len(problems) == 4
    assert problems[0].startswith("model.n_layer: got 3; expected 2, that of train.init_from")
    assert problems[1].endswith("give --model.bias true")
    assert "data.tokenizer: got one of 300 tokens; expected 257" in problems[2]
    assert "give --model.max_seq_len 16" in problems[3]


def test_the_module_of_multi_token_prediction_is_omitted_or_required(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, with_module = (
        resolve([*FLAGS, f"--train.init_from={folder}", f"--model.multi_token_loss={weight}"])
        for weight in (0, 0.1)
    )
    with pytest.raises(ConfigError, match=r"model\.multi_token_loss: got 0\.1; expected 0"):
        check_pretrained(with_module)
    params = {**tjx_nn.hf.load(folder)[1], "multi_token": {}}
    theirs = replace(THEIRS, multi_token_loss=0.3)
    monkeypatch.setattr(pretrained, "load_pretrained", cache(lambda _: (theirs, params)))
    assert pretrained_params(with_module).keys() == params.keys()
    assert pretrained_params(without).keys() == params.keys() - {"multi_token"}


def extended(folder: Path, rows: str) -> Config:
    flags = [flag for flag in FLAGS if "vocab_size" not in flag]
    more = [f"--train.init_from={folder}", f"--train.new_tokens={rows}"]
    return resolve([*flags, "--model.vocab_size=261", *more])


def test_rows_of_new_tokens_are_the_mean_or_random(folder: Path) -> None:
    _, theirs = tjx_nn.hf.load(folder)
    old = theirs["wte"]["embedding"]
    for rows in ("mean", "random"):
        table = pretrained_params(extended(folder, rows))["wte"]["embedding"]
        np.testing.assert_array_equal(table[:257], old)
        assert not table[261:].any()
        if rows == "mean":
            np.testing.assert_allclose(table[257:261], np.tile(old.mean(0), (4, 1)), rtol=1e-5)
        else:
            assert 0.01 < table[257:261].std() < 0.04
    with pytest.raises(ValueError, match="expected 257, those of") as caught:
        check_pretrained(extended(folder, "error"))
    assert "--train.new_tokens mean" in str(caught.value)
    config = extended(folder, "mean")
    assert isinstance(config.model, GPTConfig)
    smaller = replace(config, model=replace(config.model, vocab_size=200))
    with pytest.raises(ValueError, match="expected 257, those of"):
        check_pretrained(smaller)


def test_frozen_blocks_do_not_move_and_the_others_move_by_their_rates() -> None:
    flags = [flag for flag in FLAGS if "n_layer" not in flag]
    flags += ["--optimizer.name=sgd", "--optimizer.momentum=0", "--optimizer.weight_decay=0.1"]
    flags += ["--schedule.warmup_steps=0", "--model.n_layer=3"]
    config = resolve([*flags, "--train.freeze_layers=1", "--train.layer_decay=0.5"])
    schedule, optimizer = make_update_rule(config)
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(config.model, jax.random.key(0))

        @jax.jit
        def updates_of(params: Any) -> Any:
            gradients = jax.tree.map(jnp.ones_like, params)
            return optimizer.update(gradients, optimizer.init(params), params)[0]

        updates = jax.device_get(updates_of(params))
        rate, params = np.asarray(schedule(0)), jax.device_get(params)
    # The gradients of frozen blocks do not count in the norm, to which the others are clipped.
    moved = sum(leaf.size for leaf in jax.tree.leaves(params))
    moved -= sum(leaf[0].size for leaf in jax.tree.leaves(params["blocks"]))
    step = -rate / moved**0.5
    assert step < 0
    for name in ("kernel", "bias"):
        leaf, param = (tree["blocks"]["mlp"]["up"][name] for tree in (updates, params))
        decay = -rate * 0.1 * param if name == "kernel" else 0 * param
        assert not leaf[0].any()
        np.testing.assert_allclose(leaf[1], (step + decay[1]) / 4, rtol=1e-5)
        np.testing.assert_allclose(leaf[2], (step + decay[2]) / 2, rtol=1e-5)
    decay = -rate * 0.1 * params["wte"]["embedding"]
    np.testing.assert_allclose(updates["wte"]["embedding"], (step + decay) / 16, rtol=1e-4)
    np.testing.assert_allclose(updates["ln_f"]["scale"], step, rtol=1e-5)


def test_a_model_with_latents_without_norms_starts_from_converted_weights(folder: Path) -> None:
    latent = ["--model.latent.kv_dim=3", "--model.latent.use_norm=false"]
    config = resolve([*FLAGS, f"--train.init_from={folder}", *latent, "--model.latent.rope_dim=0"])
    _, expected = tjx_nn.to_latent_attention(THEIRS, tjx_nn.hf.load(folder)[1], 3)
    chex.assert_trees_all_equal(pretrained_params(config)["blocks"], expected["blocks"])
    config = resolve([*FLAGS, f"--train.init_from={folder}", *latent])
    with pytest.raises(ConfigError, match=r"give --model\.latent\.rope_dim 0"):
        check_pretrained(config)
    many = ["--model.latent.kv_dim=9", "--model.latent.use_norm=false"]
    config = resolve([*FLAGS, f"--train.init_from={folder}", *many])
    with pytest.raises(ConfigError, match=r"model\.latent: of .* expected 1 to 8"):
        check_pretrained(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.freeze_layers=3"], "train.freeze_layers: got 3; expected at most model.n_layer"),
        (["--train.layer_decay=0"], "train.layer_decay: got 0.0; expected (0, 1]"),
        (["--train.layer_decay=0.9", "--lora.rank=2"], "train.layer_decay: got 0.9 with"),
        (["--train.new_tokens=mean"], "train.new_tokens: got mean without init_from"),
    ],
)
def test_layer_rates_that_do_not_fit_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([*FLAGS, *flags])
    assert message in str(caught.value)


def test_the_tokenizer_is_the_folders_unless_another_is_given(folder: Path) -> None:
    start = ["--train.init_from", str(folder), "--data.path", "x.txt"]
    assert resolve(start).data.tokenizer == str(folder)
    assert resolve([*start, "--data.tokenizer", "byte"]).data.tokenizer == "byte"
    assert resolve(["--data.path", "x.txt"]).data.tokenizer == "bpe"


def test_a_tokenizer_with_other_ids_is_refused_though_it_is_as_large(tmp_path: Path) -> None:
    config = resolve([*FLAGS, f"--train.init_from={tmp_path}"])
    text = ["the cat sat on the mat and saw another cat, " * 9]
    theirs, ours = train_bpe(text, 262), train_bpe([text[0][::-1]], 262)
    assert theirs.vocab_size == ours.vocab_size
    (note,) = check_tokenizer(config, ours)
    assert "no tokenizer to compare with" in note
    theirs.save(tmp_path / "tokenizer.json")
    assert check_tokenizer(config, theirs) == []
    with pytest.raises(ValueError, match=r"data\.tokenizer: got byte") as caught:
        check_tokenizer(config, ours)
    message = str(caught.value)
    assert theirs.fingerprint[:8] in message
    assert ours.fingerprint[:8] in message
    assert f"give --data.tokenizer {tmp_path}" in message
    # The same ids in a file that was written by another library.
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["post_processor"] = described["pre_tokenizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (note,) = check_tokenizer(config, theirs)
    assert "has the same ids" in note


def test_a_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        check_pretrained(resolve([*FLAGS, f"--train.init_from={tmp_path}"]))


@pytest.mark.parametrize("below", [("params", "params"), ("params",), ()])
def test_parameters_of_an_orbax_checkpoint(below: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "orbax"
    config = resolve([*FLAGS, f"--train.init_from=orbax:{path}"])
    assert config.data.tokenizer == "byte"
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(config.model, jax.random.key(5))
        expected = tree = jax.device_get(params)
        for name in reversed(below):
            tree = {name: tree}
        if below:
            tree["opt_state"] = {"mu": np.ones(3, np.float32)}
        tjx_ckpt.write_orbax(path, tree)
        check_pretrained(config)
        chex.assert_trees_all_equal(pretrained_params(config), expected, strict=True)
        model = replace(config.model, n_layer=3, bias=False)
        with pytest.raises(ValueError, match="expected the parameters of the model") as caught:
            check_pretrained(replace(config, model=model))
    missing = resolve([*FLAGS, f"--train.init_from=orbax:{tmp_path / 'missing'}"])
    with pytest.raises(ValueError, match=r"train\.init_from: path: got .*missing, which holds no"):
        check_pretrained(missing)
    assert "params ln_f.bias: got shape [8]; expected no such parameter" in str(caught.value)
    assert "blocks.attention.key.kernel: got shape [2, 8, 8]; expected [3, 8, 8]" in str(
        caught.value
    )


IMAGES = [
    *("--config=vit_mnist", "--data.path=images", "--model.image_size=8", "--model.patch_size=4"),
    *("--model.n_layer=1", "--model.n_head=2", "--model.d_model=8", "--model.n_classes=3"),
    *("--mesh.data=1", "--train.batch_size=2"),
]
ENCODER = ViTConfig(image_size=8, patch_size=4, channels=1, n_layer=1, n_head=2, d_model=8)
DINOV2: dict[str, Any] = {"layer_scale": 1.0, "mask_token": True}


@pytest.mark.parametrize(
    ("theirs", "pool"),
    [
        (replace(ENCODER, **DINOV2, pool="class_mean", n_classes=5), "class_mean"),
        (replace(ENCODER, **DINOV2, pool="class", n_classes=None), "class_mean"),
        (replace(ENCODER, pool="map", n_classes=None), "map"),
        (replace(ENCODER, pool="map", n_classes=None), "mean"),
    ],
    ids=["DINOv2", "DINOv2 without a head", "SigLIP", "SigLIP, mean"],
)
def test_a_vision_encoder_trains_with_a_new_head(
    theirs: ViTConfig, pool: str, tmp_path: Path
) -> None:
    with jax.transfer_guard("allow"):
        params = jax.device_get(jax.jit(tjx_nn.init, static_argnums=0)(theirs, jax.random.key(3)))
        tjx_nn.hf.save(tmp_path / "model", theirs, params)
    given = [f"--model.{name}={str(x).lower()}" for name, x in DINOV2.items() if theirs.layer_scale]
    words = [*IMAGES, *given, f"--model.pool={pool}", f"--train.init_from={tmp_path / 'model'}"]
    with pytest.raises(ValueError, match=r"give --train\.new_head true") as caught:
        check_pretrained(resolve(words))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + (pool != theirs.pool)
    assert lines[-1].startswith(f"model.n_classes: got 3; expected {theirs.n_classes}")
    config = resolve([*words, "--train.new_head=true"])
    parts = build_step_components(config, jax.devices()[:1])
    with jax.transfer_guard("allow"):
        state = initial_state(config, parts.optimizer, parts.abstract)
    ours = jax.device_get(state.params)
    head = ours.pop("head")
    assert head["kernel"].shape == (16 if pool == "class_mean" else 8, 3)
    assert head["kernel"].std() > 0.01
    chex.assert_trees_all_equal(ours, {name: params[name] for name in ours}, strict=True)


def test_a_vision_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with jax.transfer_guard("allow"):
        params = jax.device_get(jax.jit(tjx_nn.init, static_argnums=0)(ENCODER, jax.random.key(3)))
        tjx_nn.hf.save(tmp_path / "model", ENCODER, params)
    start = [*IMAGES, f"--train.init_from={tmp_path / 'model'}"]
    check_pretrained(resolve(["--model.n_classes=1000" if "n_classes" in x else x for x in start]))
    with pytest.raises(ValueError, match="pool") as caught:
        check_pretrained(
            resolve([*start, "--train.new_head=true", "--model.pool=mean", "--model.bias=false"])
        )
    lines = sorted(str(caught.value).splitlines())
    assert lines[0].endswith("give --model.bias true")
    assert lines[1].endswith("give --model.pool class")
    assert len(lines) == 2
    larger = [x.replace("size=8", "size=12") for x in start]
    with pytest.raises(ValueError, match=r"give --model\.image_size 8,8, or weights of"):
        check_pretrained(resolve([*larger, "--train.new_head=true"]))
    for weights in ("None", "orbax:x"):
        with pytest.raises(ValueError, match=rf"train\.new_head: got true with .* {weights}"):
            resolve([*IMAGES, "--train.new_head=true", f"--train.init_from={weights.lower()}"])


def test_only_vision_encoders_have_a_new_head(folder: Path) -> None:
    config = resolve([*FLAGS, f"--train.init_from={folder}", "--train.new_head=true"])
    with pytest.raises(ValueError, match=r"train\.new_head: got true with model\.family gpt"):
        check_pretrained(config)
