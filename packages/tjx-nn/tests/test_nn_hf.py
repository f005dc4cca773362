"""Reading and writing transformers' format: round trips, files of every form, and errors."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tjx_nn import BertConfig, GPTConfig, RopeConfig, TransformerConfig, ViTConfig, hf
from tjx_nn.functional import Params, param_shapes
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ["gpt2", "llama", "llama3_rope", "mistral", "qwen3", "bert", "vit", "bart"]

DecodeWeights = dict[str, np.ndarray]


@pytest.fixture
def change(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """change(name, weights, **config): a golden folder with other weights and config entries."""

    def copy(
        name: str, weights: Callable[[DecodeWeights], DecodeWeights] = lambda x: x, **entries: Any
    ) -> pathlib.Path:
        folder = tmp_path / "changed"
        shutil.copytree(GOLDEN / name, folder)
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
        return folder

    return copy


def refused(call: Callable[[], Any]) -> str:
    """Return what the ValueError says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    pytest.fail("nothing was refused")


def assert_same(a: tuple[TransformerConfig, Params], b: tuple[TransformerConfig, Params]) -> None:
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def random_params(config: TransformerConfig) -> Params:
    rng = np.random.default_rng(0)
    params: Params = {}
    for path, shape in param_shapes(config).items():
        *parents, leaf = path.split(".")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = rng.standard_normal(shape).astype(np.float32)
    return params


@pytest.mark.parametrize("name", NAMES)
def test_reading_writing_and_reading_again_is_bitwise(name: str, tmp_path: pathlib.Path) -> None:
    read = hf.load(GOLDEN / name)
    hf.save(tmp_path / "whole", *read)
    assert_same(hf.load(tmp_path / "whole"), read)
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    hf.save(tmp_path / "shards", *read, max_shard_bytes=5000)
    assert_same(hf.load(tmp_path / "shards"), read)
    shards = [load_file(path) for path in (tmp_path / "shards").glob("model-*-of-*.safetensors")]
    sizes = [sum(x.nbytes for x in shard.values()) for shard in shards if len(shard) > 1]
    assert len(sizes) > 2
    assert max(sizes) <= 5000
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert index["weight_map"].keys() == whole.keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_transformers_wrote(name: str, tmp_path: pathlib.Path) -> None:
    hf.save(tmp_path, *hf.load(GOLDEN / name))
    theirs = load_file(GOLDEN / name / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        # BART never reads the first two rows of its tables of positions.
        first = 2 if key.endswith("embed_positions.weight") else 0
        np.testing.assert_array_equal(ours[key][first:], x[first:].astype(np.float32))
    before = json.loads((GOLDEN / name / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    # Ids of special tokens come with the tokenizer; that a model is float32 is our choice.
    skipped = {"bos_token_id", "eos_token_id", "dtype"}
    shared = (before.keys() & after.keys()) - skipped
    assert {key: before[key] for key in shared} == {key: after[key] for key in shared}
    assert {"architectures", "model_type"} <= shared


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_short_types_are_written_rounded_and_read_as_float32(
    dtype: str, kind: str, tmp_path: pathlib.Path
) -> None:
    config = GPTConfig(vocab_size=11, max_seq_len=4, n_layer=1, n_head=2, d_model=4)
    params = random_params(config)
    hf.save(tmp_path, config, params, dtype=dtype)
    _, found = hf.load(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(np.dtype(kind)).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    tensors = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(kind)}
    assert ml_dtypes.bfloat16 == np.dtype("bfloat16")


def test_biases_and_padded_rows_change_nothing_when_written(tmp_path: pathlib.Path) -> None:
    config = GPTConfig(
        vocab_size=11, max_seq_len=4, n_layer=2, n_head=2, d_model=4, bias=False, vocab_multiple=8
    )
    params = random_params(config)
    hf.save(tmp_path, config, params)
    read, found = hf.load(tmp_path)
    assert read.bias
    assert isinstance(read, GPTConfig)
    assert read.vocab_rows == 11
    np.testing.assert_array_equal(found["wte"]["embedding"], params["wte"]["embedding"][:11])
    assert not found["blocks"]["attention"]["query"].pop("bias").any()
    assert not found["ln_f"].pop("bias").any()
    np.testing.assert_array_equal(found["ln_f"]["scale"], params["ln_f"]["scale"])


def test_older_names_and_tied_copies_are_read(change: Callable[..., pathlib.Path]) -> None:
    def of_openai(weights: DecodeWeights) -> DecodeWeights:
        named = {name.removeprefix("transformer."): x for name, x in weights.items()}
        named["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
        return {**named, "lm_head.weight": named["wte.weight"]}

    assert_same(hf.load(change("gpt2", of_openai)), hf.load(GOLDEN / "gpt2"))


def test_older_names_of_bert_are_read(change: Callable[..., pathlib.Path]) -> None:
    def of_google(weights: DecodeWeights) -> DecodeWeights:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
            for name, x in weights.items()
        }
        return {**renamed, "bert.pooler.dense.weight": np.ones((16, 16), np.float32)}

    assert_same(hf.load(change("bert", of_google)), hf.load(GOLDEN / "bert"))


def test_rope_is_read_as_transformers_4_wrote_it(change: Callable[..., pathlib.Path]) -> None:
    scaling = {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16,
    }  # fmt: skip
    folder = change(
        "llama", rope_parameters=None, rope_theta=500, rope_scaling=scaling, attention_dropout=0
    )
    expected = RopeConfig(
        base=500.0, scaling="yarn", factor=4.0, original_seq_len=8, beta_fast=16.0
    )
    config = hf.load(folder)[0]
    assert config.rope == expected
    # JSON's whole numbers become what the fields are.
    assert isinstance(config.attention_dropout, float)
    assert isinstance(config.rope.base, float)


def test_windows_of_qwen3_that_follow_a_pattern_are_read(
    change: Callable[..., pathlib.Path],
) -> None:
    def windows(*kinds: str, **entries: Any) -> tuple[int | None, ...]:
        entries = {"use_sliding_window": True, "sliding_window": 5, **entries}
        folder = change("qwen3", layer_types=[f"{kind}_attention" for kind in kinds], **entries)
        found = hf.load(folder)[0].windows
        shutil.rmtree(folder)
        return found

    assert windows("sliding", "sliding") == (5, 5)
    assert windows("sliding", "full") == (5, None)
    assert windows("full", "full") == (None, None)
    assert "layer_types" in refused(lambda: windows("full", "sliding"))


def test_all_wrong_tensors_are_named_at_once(change: Callable[..., pathlib.Path]) -> None:
    def spoil(weights: DecodeWeights) -> DecodeWeights:
        del weights["transformer.ln_f.bias"]
        weights["transformer.wpe.weight"] = np.ones((17, 16), np.float32)
        return {**weights, "score.weight": np.ones((3, 16), np.float32)}

    message = refused(lambda: hf.load(change("gpt2", spoil)))
    assert "transformer.ln_f.bias is missing; its shape would be [16]" in message
    assert "transformer.wpe.weight has shape [17, 16]; by config.json it is [16, 16]" in message
    assert "score.weight is not a part of GPT2LMHeadModel; its shape is [3, 16]" in message


def test_a_head_that_is_not_tied_though_it_should_is_refused(
    change: Callable[..., pathlib.Path],
) -> None:
    def untie(weights: DecodeWeights) -> DecodeWeights:
        return {**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}

    message = refused(lambda: hf.load(change("gpt2", untie)))
    assert "lm_head.weight differs from transformer.wte.weight" in message


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True: only"),
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish': only ["),
        ("gpt2", {"n_head": 3}, "n_head must divide d_model"),
        ("gpt2", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, "GPT2ForTokenClassification"),
        ("llama", {"attention_bias": True}, "must be equal: we have one bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "there is no factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "mscale of rope_parameters is 0.7",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias is True: only False"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("vit", {"patch_size": [2, 4]}, "patch_size is [2, 4]: only squares"),
        ("bart", {"decoder_ffn_dim": 8}, "must be equal: we have one d_ff"),
    ],
)  # fmt: skip
def test_a_model_that_does_what_ours_does_not_is_refused_by_name(
    name: str, entries: dict[str, Any], said: str, change: Callable[..., pathlib.Path]
) -> None:
    assert said in refused(lambda: hf.load(change(name, **entries)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPTConfig(window=4), ["GPT2LMHeadModel", "windows is (4,"]),
        (GPTConfig(d_head=32, mup_base=64), ["d_head is 32", "mup_base is 64"]),
        (GPTConfig(positions="alibi"), ["positions is 'alibi' and would be read back as 'learn"]),
        (
            GPTConfig(
                positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
                rope=RopeConfig(scaling="ntk", factor=2.0),
            ),
            ["LlamaForCausalLM", "rope.scaling is 'ntk'"],
        ),
        (BertConfig(n_token_types=0), ["n_token_types is 0"]),
        (BertConfig(n_classes=3), ["BertForMaskedLM", "n_classes is 3"]),
        (BertConfig(activation="swiglu"), ["activation is 'swiglu'"]),
        (ViTConfig(pool="mean"), ["ViTForImageClassification", "pool is 'mean'"]),
        (EncoderDecoderConfig(), ["BartForConditionalGeneration", "positions is 'sinusoidal'"]),
    ],
)  # fmt: skip
def test_a_model_that_transformers_has_no_place_for_is_refused_by_name(
    config: TransformerConfig, said: list[str], tmp_path: pathlib.Path
) -> None:
    message = refused(lambda: hf.save(tmp_path / "out", config, {}))
    assert all(words in message for words in said), message
    assert not (tmp_path / "out").exists()


def test_wrong_parameters_and_arguments_are_refused(tmp_path: pathlib.Path) -> None:
    config = GPTConfig(vocab_size=11, max_seq_len=4, n_layer=1, n_head=2, d_model=4)
    params = random_params(config)
    wrong = {**params, "wpe": {"embedding": np.ones((5, 4))}, "extra": {"kernel": np.ones(1)}}
    del wrong["ln_f"]
    message = refused(lambda: hf.save(tmp_path, config, wrong))
    assert "params wpe.embedding: got shape [5, 4]; expected [4, 4]" in message
    assert "params ln_f.scale: missing" in message
    assert "params extra.kernel: got shape" in message
    assert "give one of" in refused(lambda: hf.save(tmp_path, config, params, dtype="int8"))
    assert "above 0" in refused(lambda: hf.save(tmp_path, config, params, max_shard_bytes=0))
    params["wpe"]["embedding"][0] = 1e6
    message = refused(lambda: hf.save(tmp_path / "large", config, params, dtype="float16"))
    assert "transformer.wpe.weight has values up to 1e+06" in message
    hf.save(tmp_path / "twice", config, params)
    message = refused(lambda: hf.save(tmp_path / "twice", config, params))
    assert "has a model already (config.json, model.safetensors)" in message


def test_a_pickle_is_never_read(tmp_path: pathlib.Path) -> None:
    shutil.copy(GOLDEN / "gpt2" / "config.json", tmp_path)
    assert "neither model.safetensors nor" in refused(lambda: hf.load(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refused(lambda: hf.load(tmp_path))
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_damaged_and_missing_files_are_named(tmp_path: pathlib.Path) -> None:
    read = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path / "shards", *read, max_shard_bytes=9000)
    first = sorted((tmp_path / "shards").glob("model-*"))[0]
    first.write_bytes(first.read_bytes()[:100])
    assert f"{first} is missing or damaged" in refused(lambda: hf.load(tmp_path / "shards"))
    first.unlink()
    assert f"{first} is missing or damaged" in refused(lambda: hf.load(tmp_path / "shards"))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "files of its own folder" in refused(lambda: hf.load(tmp_path / "shards"))
    config = tmp_path / "shards" / "config.json"
    config.write_text("{")
    assert f"{config} is no JSON" in refused(lambda: hf.load(tmp_path / "shards"))
    config.write_text("[]")
    assert "should hold an object" in refused(lambda: hf.load(tmp_path / "shards"))
    config.unlink()
    assert "has no config.json" in refused(lambda: hf.load(tmp_path / "shards"))


def test_quantised_tensors_are_refused(change: Callable[..., pathlib.Path]) -> None:
    def quantise(weights: DecodeWeights) -> DecodeWeights:
        return {**weights, "transformer.wte.weight": np.ones((61, 16), np.int8)}

    assert "transformer.wte.weight (I8)" in refused(lambda: hf.load(change("gpt2", quantise)))


def test_a_hub_name_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(GOLDEN / "gpt2")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(hf.load("owner/model", revision="v1"), hf.load(GOLDEN / "gpt2"))
    assert asked[0]["name"] == "owner/model"
    assert asked[0]["revision"] == "v1"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0]["allow_patterns"])


def test_what_is_neither_here_nor_on_the_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused(lambda: hf.load("owner/model"))
    assert "owner/model is no folder here" in message
    assert "cannot be reached" in message
    assert "no folder, and no name" in refused(lambda: hf.load("./nowhere/at/all"))
    folder = GOLDEN / "gpt2"
    assert "has no revision" in refused(lambda: hf.load(folder, revision="v1"))


def test_choices_of_training_do_not_stand_in_the_way(tmp_path: pathlib.Path) -> None:
    config, params = hf.load(GOLDEN / "llama")
    trained = dataclasses.replace(config, dropout=0.3, dtype="bfloat16", remat="full")
    hf.save(tmp_path, trained, params)
    assert_same(hf.load(tmp_path), (config, params))


def test_ids_that_the_tokenizer_lacks_are_not_written(tmp_path: pathlib.Path) -> None:
    config = GPTConfig(
        vocab_size=11, tokenizer_size=7, max_seq_len=4, n_layer=1, n_head=2, d_model=4,
        scale_embeddings=False,
    )  # fmt: skip
    params = random_params(config)
    hf.save(tmp_path, config, params)
    found, tables = hf.load(tmp_path)
    assert isinstance(found, GPTConfig)
    assert found.vocab_size == 7
    np.testing.assert_array_equal(tables["wte"]["embedding"], params["wte"]["embedding"][:7])
