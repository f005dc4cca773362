"""transformers checkpoints: round trips, variants of files and names, and errors."""

import dataclasses
import errno
import json
import pathlib
import re
import resource
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tjx_nn import (
    BertConfig,
    ExpertsConfig,
    GPTConfig,
    RopeConfig,
    TransformerConfig,
    ViTConfig,
    hf,
    init,
)
from tjx_nn.binding import Params, param_shapes
from tjx_nn.hf.convert_config import functional_fields, read_config
from tjx_nn.hf.convert_params import read_params
from tjx_nn.hf.families import all_families
from tjx_nn.hf.safetensors_folder import Tensors
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.flops import count_params

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))

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


def error_of(call: Callable[[], Any]) -> str:
    """Message of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    pytest.fail("nothing was refused")


def assert_same(a: tuple[TransformerConfig, Params], b: tuple[TransformerConfig, Params]) -> None:
    assert a[0] == b[0]
    chex.assert_trees_all_equal(a[1], b[1], strict=True)


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
def test_load_save_load_is_bitwise_equal(name: str, tmp_path: pathlib.Path) -> None:
    read = hf.load(GOLDEN / name)
    assert count_params(read[0]) == sum(x.size for x in jax.tree.leaves(read[1]))
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
def test_saved_files_equal_those_of_transformers(
    name: str, tmp_path: pathlib.Path, record: Callable[[str, object], None]
) -> None:
    before = json.loads((GOLDEN / name / "config.json").read_text())
    hf.save(tmp_path, *hf.load(GOLDEN / name), model_type=before["model_type"])
    theirs = load_file(GOLDEN / name / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        # The first two rows of the position tables of BART and RoBERTa are unused.
        first = 2 if re.search("embed_positions|roberta.*position_embeddings", key) else 0
        np.testing.assert_array_equal(ours[key][first:], x[first:].astype(np.float32))
    after = json.loads((tmp_path / "config.json").read_text())
    # Special tokens belong to the tokenizer; the dtype is an argument of save.
    skipped = {"bos_token_id", "eos_token_id", "dtype"}
    skipped |= {"head_dim"} if before.get("head_dim") is None else set()
    # transformers 5 writes true for every T5, and 4 would then tie the head.
    skipped |= {"tie_word_embeddings"} if "t5" in name else set()
    shared = (before.keys() & after.keys()) - skipped
    assert {key: before[key] for key in shared} == {key: after[key] for key in shared}
    assert {"architectures", "model_type"} <= shared
    record(f"{name}: round trip", "equal")


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_half_precision_is_saved_rounded_and_loaded_as_float32(
    dtype: str, kind: str, tmp_path: pathlib.Path
) -> None:
    config = GPTConfig(vocab_size=11, max_seq_len=4, n_layer=1, n_head=2, d_model=4)
    params = random_params(config)
    hf.save(tmp_path, config, params, dtype=dtype)
    _, found = hf.load(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(np.dtype(kind)).astype(np.float32), params)
    chex.assert_trees_all_equal(found, rounded, strict=True)
    chex.assert_type(jax.tree.leaves(found), np.float32)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    tensors = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(kind)}
    assert ml_dtypes.bfloat16 == np.dtype("bfloat16")


def test_saved_zero_biases_and_omitted_padding_rows_change_nothing(tmp_path: pathlib.Path) -> None:
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


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi3"])
def test_parameters_load_onto_a_mesh_one_by_one(name: str) -> None:
    """Fused tensors (GPT-2, Phi-3) and experts (Mixtral) too."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    over_last, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # type: ignore[no-untyped-call]  # as jax is
        for axes in ((None, "model"), ())
    )

    def shardings(config: TransformerConfig) -> Any:
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        return jax.tree.map(lambda x: over_last if x.ndim == 2 else whole, shapes)

    config, expected = hf.load(GOLDEN / name)
    assert hf.load_config(GOLDEN / name) == config
    _, found = hf.load(GOLDEN / name, shardings=shardings)
    chex.assert_trees_all_equal(jax.device_get(found), expected)
    assert found["wte"]["embedding"].sharding == over_last

    seen: list[weakref.ref[Any]] = []
    alive = []

    def count(_: str, value: np.ndarray) -> np.ndarray:
        seen.append(weakref.ref(value))
        alive.append(sum(each() is not None for each in seen))
        return value.sum(keepdims=True)

    family = next(each for each in all_families() if each.model_type == name)
    with Tensors(GOLDEN / name) as tensors:
        read_params(family, config, tensors, count)
    assert max(alive) <= 3  # query, key and value of a fused tensor


def test_old_names_and_tied_copies_load(change: Callable[..., pathlib.Path]) -> None:
    def of_openai(weights: DecodeWeights) -> DecodeWeights:
        named = {name.removeprefix("transformer."): x for name, x in weights.items()}
        named["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
        return {**named, "lm_head.weight": named["wte.weight"]}

    assert_same(hf.load(change("gpt2", of_openai)), hf.load(GOLDEN / "gpt2"))


def test_old_names_of_bert_load(change: Callable[..., pathlib.Path]) -> None:
    def of_google(weights: DecodeWeights) -> DecodeWeights:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
            for name, x in weights.items()
        }
        return {**renamed, "bert.pooler.dense.weight": np.ones((16, 16), np.float32)}

    assert_same(hf.load(change("bert", of_google)), hf.load(GOLDEN / "bert"))


def test_the_tensors_of_a_t5_decide_whether_its_head_is_tied(
    change: Callable[..., pathlib.Path],
) -> None:
    tied, unused = (
        "shared.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias",
    )

    def of_google(weights: DecodeWeights) -> DecodeWeights:
        copies = dict.fromkeys(
            ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
            weights[tied],
        )
        return {**weights, **copies, f"{unused}.weight": np.ones((8, 4), np.float32)}

    old = {"tie_word_embeddings": None, "scale_decoder_outputs": None, "n_positions": 512}
    folder = change("t5", of_google)
    path = folder / "config.json"
    entries = json.loads(path.read_text()) | old
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    assert_same(hf.load(folder), hf.load(GOLDEN / "t5"))
    for name, is_tied in (("t5", True), ("t5_v1_1", False), ("mt5", False)):
        config = hf.load_config(GOLDEN / name)
        assert isinstance(config, EncoderDecoderConfig)
        assert config.tied_head == is_tied
        assert hf.inspect(GOLDEN / name).problems == ()


def test_rope_of_transformers_4_loads(change: Callable[..., pathlib.Path]) -> None:
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
    # JSON integers become floats for float fields.
    assert isinstance(config.attention_dropout, float)
    assert isinstance(config.rope.base, float)


def test_config_of_the_first_release_of_modernbert_loads(
    change: Callable[..., pathlib.Path],
) -> None:
    folder = change("modernbert")
    path = folder / "config.json"
    entries = json.loads(path.read_text())
    del entries["layer_types"], entries["rope_parameters"]
    entries |= {
        "global_attn_every_n_layers": 3, "global_rope_theta": 5000.0, "local_rope_theta": 100.0,
        "layer_norm_eps": 1e-05, "position_embedding_type": "absolute", "reference_compile": None,
    }  # fmt: skip
    path.write_text(json.dumps(entries))
    assert_same(hf.load(folder), hf.load(GOLDEN / "modernbert"))


def test_presets_of_modernbert_are_the_models_of_transformers() -> None:
    config = BertConfig.preset("modernbert_base")
    family = next(each for each in all_families() if each.model_type == "modernbert")
    default = read_config(family, {"model_type": "modernbert"})
    assert functional_fields(default) == functional_fields(config)


def test_window_patterns_of_modernbert_load(change: Callable[..., pathlib.Path]) -> None:
    def windows(*kinds: str) -> tuple[int | None, ...]:
        folder = change("modernbert", layer_types=[f"{kind}_attention" for kind in kinds])
        found = hf.load_config(folder)
        shutil.rmtree(folder)
        assert found.symmetric_window == any(found.windows)
        return found.windows

    full, local = "full", "sliding"
    assert windows(full, local, local, full, local) == (None, 4, 4, None, 4)
    assert windows(local, full, local, full, local) == (4, None, 4, None, 4)
    assert windows(full, local, local, local, local) == (None, 4, 4, 4, 4)
    assert windows(*[local] * 5) == (4,) * 5
    assert windows(*[full] * 5) == (None,) * 5
    assert "layer_types" in error_of(lambda: windows(full, local, local, full, full))


def test_window_patterns_of_qwen3_load(
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
    assert "layer_types" in error_of(lambda: windows("full", "sliding"))


def test_all_tensor_errors_are_in_one_exception(change: Callable[..., pathlib.Path]) -> None:
    def spoil(weights: DecodeWeights) -> DecodeWeights:
        del weights["transformer.ln_f.bias"]
        weights["transformer.wpe.weight"] = np.ones((17, 16), np.float32)
        return {**weights, "score.weight": np.ones((3, 16), np.float32)}

    message = error_of(lambda: hf.load(change("gpt2", spoil)))
    assert "transformer.ln_f.bias: missing; expected shape [16]" in message
    assert "transformer.wpe.weight: got shape [17, 16]; expected [16, 16]" in message
    assert "score.weight: got shape [3, 16]; expected no such tensor in GPT2LMHeadModel" in message


def test_an_untied_copy_of_a_tied_head_raises(
    change: Callable[..., pathlib.Path],
) -> None:
    def untie(weights: DecodeWeights) -> DecodeWeights:
        return {**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}

    message = error_of(lambda: hf.load(change("gpt2", untie)))
    assert "lm_head.weight: got other values than transformer.wte.weight" in message


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "layer_idx: got True; expected False"),
        ("gpt2", {"activation_function": "mish"}, "got 'mish'; expected one of ["),
        ("gpt2", {"n_head": 3}, "d_model: got 16 with n_head 3"),
        ("gpt2", {"model_type": "mamba"}, "model_type: got 'mamba'"),
        ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, "GPT2ForTokenClassification"),
        ("llama", {"attention_bias": True}, "as tjx has one bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}"),
        ("qwen3", {"attention_bias": {}}, "attention_bias: got {}; expected False"),
        ("llama", {"attention_bias": "a" * 10**5}, " ... "),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type: got 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor: missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": None}},
            "truncate: got None; expected a boolean",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "truncate": False}},
            "rope_parameters.truncate: got False",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias: got True; expected False"),
        ("bert", {"is_decoder": True}, "is_decoder: got True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("vit", {"patch_size": [2, 4]}, "patch_size: got [2, 4]; expected a square"),
        ("bart", {"decoder_ffn_dim": 8}, "as tjx has one d_ff"),
        ("t5", {"dense_act_fn": "silu"}, "dense_act_fn: got silu with feed_forward_proj 'relu'"),
        ("t5", {"num_decoder_layers": 1 << 20}, "num_decoder_layers: got 1048576"),
        ("t5", {"scale_decoder_outputs": None}, "scale_decoder_outputs: got True and None"),
        ("t5", {"relative_attention_num_buckets": 7}, "relative_buckets: got 7; expected an even"),
    ],
)  # fmt: skip
def test_unsupported_features_raise(
    name: str, entries: dict[str, Any], said: str, change: Callable[..., pathlib.Path]
) -> None:
    message = error_of(lambda: hf.load(change(name, **entries)))
    assert said in message
    assert len(message) < 10_000


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPTConfig(window=4), ["GPT2LMHeadModel", "windows: got (4,"]),
        (GPTConfig(d_head=32, mup_base=64), ["d_head: got 32", "mup_base: got 64"]),
        (GPTConfig(mup_base_depth=4), ["mup_base_depth: got 4"]),
        (GPTConfig(positions="alibi"), ["positions: got 'alibi'; expected 'learn"]),
        (
            GPTConfig(
                positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
                rope=RopeConfig(scaling="ntk", factor=2.0),
            ),
            ["LlamaForCausalLM", "rope.scaling: got 'ntk'"],
        ),
        (BertConfig(n_token_types=0), ["n_token_types: got 0"]),
        (BertConfig(n_classes=3), ["BertForMaskedLM", "n_classes: got 3"]),
        (BertConfig(activation="swiglu"), ["activation: got 'swiglu'"]),
        (
            BertConfig.preset("modernbert_base", symmetric_window=False),
            ["ModernBertForMaskedLM", "symmetric_window: got False"],
        ),
        (ViTConfig(pool="mean", image_size=(32, 48)), ["image_size: got [32, 48]"]),
        (ViTConfig(n_registers=2), ["ViTForImageClassification", "n_registers: got 2"]),
        (
            ViTConfig(pool="class_mean", layer_scale=1.0, mask_token=True, d_ff=770),
            ["Dinov2ForImageClassification", "d_ff: got 770; expected 768"],
        ),
        (EncoderDecoderConfig(), ["BartForConditionalGeneration", "positions: got 'sinusoidal'"]),
    ],
)  # fmt: skip
def test_models_that_transformers_cannot_represent_raise(
    config: TransformerConfig, said: list[str], tmp_path: pathlib.Path
) -> None:
    message = error_of(lambda: hf.save(tmp_path / "out", config, {}))
    assert all(words in message for words in said), message
    assert not (tmp_path / "out").exists()


def test_invalid_parameters_and_arguments_raise(tmp_path: pathlib.Path) -> None:
    config = GPTConfig(vocab_size=11, max_seq_len=4, n_layer=1, n_head=2, d_model=4)
    params = random_params(config)
    wrong = {**params, "wpe": {"embedding": np.ones((5, 4))}, "extra": {"kernel": np.ones(1)}}
    del wrong["ln_f"]
    message = error_of(lambda: hf.save(tmp_path, config, wrong))
    assert "params wpe.embedding: got shape [5, 4]; expected [4, 4]" in message
    assert "params ln_f.scale: missing" in message
    assert "params extra.kernel: got shape" in message
    assert "dtype: got 'int8'" in error_of(lambda: hf.save(tmp_path, config, params, dtype="int8"))
    assert "expected a positive number" in error_of(
        lambda: hf.save(tmp_path, config, params, max_shard_bytes=0)
    )
    params["wpe"]["embedding"][0] = 1e6
    message = error_of(lambda: hf.save(tmp_path / "large", config, params, dtype="float16"))
    assert "transformer.wpe.weight: got values up to 1e+06" in message
    hf.save(tmp_path / "twice", config, params)
    message = error_of(lambda: hf.save(tmp_path / "twice", config, params))
    assert "got a folder with a model (config.json, model.safetensors)" in message


def test_a_file_that_cannot_be_written_raises_os_error(tmp_path: pathlib.Path) -> None:
    read = hf.load(GOLDEN / "gpt2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors") as caught:
            hf.save(tmp_path / "model", *read)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_pickles_are_never_loaded(tmp_path: pathlib.Path) -> None:
    shutil.copy(GOLDEN / "gpt2" / "config.json", tmp_path)
    assert "neither model.safetensors nor" in error_of(lambda: hf.load(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = error_of(lambda: hf.load(tmp_path))
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_damaged_and_missing_files_raise(tmp_path: pathlib.Path) -> None:
    read = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path / "shards", *read, max_shard_bytes=9000)
    first = sorted((tmp_path / "shards").glob("model-*"))[0]
    first.write_bytes(first.read_bytes()[:100])
    assert f"{first}: missing or damaged" in error_of(lambda: hf.load(tmp_path / "shards"))
    header = json.dumps("a" * 100_000).encode()
    first.write_bytes(len(header).to_bytes(8, "little") + header)
    message = error_of(lambda: hf.load(tmp_path / "shards"))
    assert f"{first}: missing or damaged" in message
    assert len(message) < 1000
    first.unlink()
    assert f"{first}: missing or damaged" in error_of(lambda: hf.load(tmp_path / "shards"))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "expected safetensors files of its folder" in error_of(
        lambda: hf.load(tmp_path / "shards")
    )
    config = tmp_path / "shards" / "config.json"
    config.write_text("{")
    assert f"{config}: got invalid JSON" in error_of(lambda: hf.load(tmp_path / "shards"))
    config.write_text("[]")
    assert "got a list; expected an object" in error_of(lambda: hf.load(tmp_path / "shards"))
    config.unlink()
    assert "found no config.json" in error_of(lambda: hf.load(tmp_path / "shards"))


def test_quantized_tensors_raise(change: Callable[..., pathlib.Path]) -> None:
    def quantize(weights: DecodeWeights) -> DecodeWeights:
        return {**weights, "transformer.wte.weight": np.ones((61, 16), np.int8)}

    assert "transformer.wte.weight (I8)" in error_of(lambda: hf.load(change("gpt2", quantize)))


def fp8(weights: DecodeWeights, block: tuple[int, int]) -> tuple[bytes, DecodeWeights]:
    """Return a safetensors file with block-scaled FP8 matrices, and the values that it stores."""
    stored: dict[str, tuple[str, np.ndarray]] = {}
    values = {}
    for name, x in ((name, x.astype(np.float32)) for name, x in weights.items()):
        if x.ndim != 2 or "proj" not in name:
            stored[name], values[name] = ("F32", x), x
            continue
        y = np.zeros_like(x)
        scales = np.zeros([-(-n // b) for n, b in zip(x.shape, block, strict=True)], np.float32)
        for row, column in np.ndindex(scales.shape):
            part = tuple(
                slice(i * b, (i + 1) * b) for i, b in zip((row, column), block, strict=True)
            )
            scales[row, column] = np.abs(x[part]).max() / 448
            y[part] = x[part] / scales[row, column]
        e4m3 = y.astype(ml_dtypes.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = ("F8_E4M3", e4m3), ("F32", scales)
        values[name] = np.zeros_like(x)
        for (row, column), scale in np.ndenumerate(scales):
            part = tuple(
                slice(i * b, (i + 1) * b) for i, b in zip((row, column), block, strict=True)
            )
            values[name][part] = e4m3[part].astype(np.float32) * scale
    header, data = {}, b""
    for name, (dtype, x) in stored.items():
        end = len(data) + x.nbytes
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(data), end]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data, values


def test_fp8_matrices_are_multiplied_with_the_scales_of_their_blocks(
    change: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 12],
        "activation_scheme": "dynamic",
    }  # fmt: skip
    folder = change("llama", quantization_config=quantization)
    data, values = fp8(load_file(folder / "model.safetensors"), (16, 12))
    (folder / "model.safetensors").write_bytes(data)
    config, found = hf.load(folder)
    plain = shutil.copytree(GOLDEN / "llama", tmp_path / "plain")
    save_file(values, plain / "model.safetensors")
    expected_config, expected = hf.load(plain)
    assert config == expected_config
    chex.assert_trees_all_equal(found, expected)
    assert np.any(
        found["blocks"]["mlp"]["up"]["kernel"]
        != hf.load(GOLDEN / "llama")[1]["blocks"]["mlp"]["up"]["kernel"]
    )
    assert hf.inspect(folder).problems == ()

    wrong = {**quantization, "weight_block_size": [16, 11]}
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, "quantization_config": wrong}))
    assert "_scale_inv: got shape" in error_of(lambda: hf.load(folder))
    (folder / "config.json").write_text(json.dumps({**config_json, "quantization_config": None}))
    assert "F8_E4M3" in error_of(lambda: hf.load(folder))
    other = {**quantization, "fmt": "e5m2"}
    (folder / "config.json").write_text(json.dumps({**config_json, "quantization_config": other}))
    assert "quantization_config: got" in error_of(lambda: hf.load(folder))


def e2m1(code: int) -> float:
    """Value of a 4-bit float: sign, two bits of the exponent and one of the mantissa."""
    exponent, half = code // 2 % 4, code % 2 / 2
    size = half if exponent == 0 else 2.0 ** (exponent - 1) * (1 + half)
    return -size if code >= 8 else size


def test_mxfp4_experts_are_multiplied_with_the_powers_of_their_blocks(
    tmp_path: pathlib.Path,
) -> None:
    config = GPTConfig(
        vocab_size=11, max_seq_len=8, n_layer=1, n_head=2, d_model=64, d_ff=32, positions="rope",
        norm="rmsnorm", activation="clamped_swiglu", attention_sinks=True, tied_head=False,
        experts=ExpertsConfig(count=2, capacity_factor=None, use_bias=True),
    )  # fmt: skip
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    hf.save(plain, config, random_params(config))
    values = load_file(plain / "model.safetensors")
    stored, rng = dict(values), np.random.default_rng(0)
    for name in [name for name in values if name.endswith("_proj")]:
        stored.pop(name)
        experts, inputs, outputs = values[name].shape
        codes = rng.integers(0, 16, (experts, outputs, inputs))
        powers = rng.integers(120, 130, (experts, outputs, inputs // 32))
        for e, o, i in np.ndindex(codes.shape):
            values[name][e, i, o] = e2m1(int(codes[e, o, i])) * 2.0 ** (powers[e, o, i // 32] - 127)
        pairs = codes[..., ::2] + 16 * codes[..., 1::2]
        stored[f"{name}_blocks"] = pairs.reshape(*powers.shape, 16).astype(np.uint8)
        stored[f"{name}_scales"] = powers.astype(np.uint8)
    shutil.copytree(plain, packed)
    save_file(values, plain / "model.safetensors")
    save_file(stored, packed / "model.safetensors")
    config_json = json.loads((plain / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}

    def write(quantization: Any) -> None:
        entries = {**config_json, "quantization_config": quantization}
        (packed / "config.json").write_text(json.dumps(entries))

    write(quantization)
    assert_same(hf.load(packed), hf.load(plain))
    assert hf.inspect(packed).problems == ()
    write(None)
    assert "down_proj_blocks (U8)" in error_of(lambda: hf.load(packed))
    write({**quantization, "bits": 4})
    assert "quantization_config: got" in error_of(lambda: hf.load(packed))
    write(quantization)
    down = "model.layers.0.mlp.experts.down_proj"
    without = {name: x for name, x in stored.items() if name != f"{down}_scales"}
    both = {**stored, down: values[down]}
    for wrong in (without, both):
        save_file(wrong, packed / "model.safetensors")
        assert f"tensor {down}_blocks: got shape (2, 64, 1, 16)" in error_of(
            lambda: hf.load(packed)
        )


def test_hub_downloads_exclude_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_model_neither_local_nor_on_the_hub_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = error_of(lambda: hf.load("owner/model"))
    assert "got owner/model, which is not a local folder" in message
    assert "cannot be reached" in message
    assert "expected a folder, or a name" in error_of(lambda: hf.load("./nowhere/at/all"))
    folder = GOLDEN / "gpt2"
    assert "revision: got 'v1' for the local folder" in error_of(
        lambda: hf.load(folder, revision="v1")
    )


def test_training_fields_do_not_prevent_saving(tmp_path: pathlib.Path) -> None:
    config, params = hf.load(GOLDEN / "llama")
    trained = dataclasses.replace(config, dropout=0.3, dtype="bfloat16", remat="full")
    hf.save(tmp_path, trained, params)
    assert_same(hf.load(tmp_path), (config, params))


def test_ids_from_tokenizer_size_on_are_not_saved(tmp_path: pathlib.Path) -> None:
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
