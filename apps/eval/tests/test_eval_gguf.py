"""GGUF exports: llama.cpp's tokens, probabilities and ids, and the stored values."""

import dataclasses
import hashlib
import io
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import pytest
import tokenizers
from eval_tiny_run import tiny_run
from gguf_models import CASES, MESSAGES, TEXTS, export, make_model, make_tokenizer

from tjx_data import CHAT_TOKENS, Tokenizer, byte_tokenizer, char_tokenizer
from tjx_eval.errors import EvalError
from tjx_eval.export import gguf
from tjx_eval.export.gguf_file import Dtype
from tjx_eval.export.gguf_tokenizer import tokenizer_metadata
from tjx_eval.main import main
from tjx_nn import GPTConfig, bind, hf
from tjx_nn.sub_configs import ExpertsConfig, LatentConfig, RopeConfig

GOLDEN = np.load(Path(__file__).parent / "golden" / "gguf.npz", allow_pickle=False)
# Root mean square difference of log probabilities, whose standard deviation is 2.4. llama.cpp
# rounds activations to the dtype of the weights, and GELU to float16.
BOUNDS = {"f32": 1e-5, "f16": 0.01, "q8_0": 0.2}


def log_probabilities(config: GPTConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(bind(config, params)(tokens))[0]

    with jax.transfer_guard("allow"):
        return np.asarray(jax.jit(forward)(params, tokens[None]))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    model, file = export(name, tmp_path)
    golden = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.split("/")[0] == name}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == golden["sha256"], "the file changed: run tools/golden/make_gguf_golden.py"
    for i, text in enumerate(TEXTS):
        assert model.tokenizer.encode_prompt(text) == golden[f"text_{i}"].tolist()
    if model.has_chat_template:
        chat = model.chat_template().render(MESSAGES, add_generation_prompt=True)
        ids = model.tokenizer.encode(chat, model.tokenizer.special_tokens)
        assert ids == golden["chat"].tolist()
    tokens, logprobs = golden["tokens"], golden["logprobs"]
    found = log_probabilities(model.gpt, model.params, tokens[:-1])[:, : logprobs.shape[1]]
    dtype, difference = CASES[name].dtype, found[golden["positions"]] - logprobs
    assert np.sqrt(np.mean(difference**2)) < BOUNDS[dtype]
    if dtype != "q8_0":  # each token is the most probable one after those before it
        greedy = np.arange(golden["positions"][0], len(tokens) - 1)
        np.testing.assert_array_equal(found.argmax(-1)[greedy], tokens[greedy + 1])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read metadata and tensors, by the description of the format."""
    formats = {0: "B", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}

    def unpack(file: BinaryIO, form: str) -> Any:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def value(file: BinaryIO, kind: int) -> Any:
        if kind == 8:
            return file.read(unpack(file, "Q")).decode()
        if kind == 9:
            kind, count = unpack(file, "I"), unpack(file, "Q")
            return [value(file, kind) for _ in range(count)]
        return unpack(file, formats[kind])

    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        assert unpack(file, "I") == 3
        n_tensors, n_keys = unpack(file, "Q"), unpack(file, "Q")
        metadata = {value(file, 8): value(file, unpack(file, "I")) for _ in range(n_keys)}
        about = []
        for _ in range(n_tensors):
            name, axes = value(file, 8), unpack(file, "I")
            shape = [unpack(file, "Q") for _ in range(axes)][::-1]
            about.append((name, shape, unpack(file, "I"), unpack(file, "Q")))
        start = -(-file.tell() // 32) * 32
        content = path.read_bytes()
    assert len(content) % 32 == 0
    tensors = {}
    for name, shape, kind, offset in about:
        assert offset % 32 == 0
        count = math.prod(shape)
        if kind == 8:  # blocks of a float16 and 32 int8
            stored = np.frombuffer(content, np.uint8, count // 32 * 34, start + offset)
            blocks = stored.reshape(-1, 34)
            scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            flat = scales * blocks[:, 2:].copy().view(np.int8)
        else:
            dtype = {0: np.float32, 1: np.float16}[kind]
            flat = np.frombuffer(content, dtype, count, start + offset)
        tensors[name] = flat.reshape(shape)
    return metadata, tensors


def test_stored_values_are_the_parameters(tmp_path: Path) -> None:
    model, file = export("llama_q8_0", tmp_path)
    metadata, tensors = read_gguf(file)
    blocks = model.params["blocks"]
    assert len(tensors) == 3 + 2 * 9
    # A row of queries and keys is a feature of a head; its pair is 8 features apart in tjx.
    rows = [head * 16 + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
    expected = {
        "token_embd.weight": model.params["wte"]["embedding"],
        "output.weight": model.params["head"]["embedding"],
        "output_norm.weight": model.params["ln_f"]["scale"],
        "blk.1.attn_q.weight": blocks["attention"]["query"]["kernel"][1].T[rows],
        "blk.0.attn_k.weight": blocks["attention"]["key"]["kernel"][0].T[rows[:32]],
        "blk.1.attn_v.weight": blocks["attention"]["value"]["kernel"][1].T,
        "blk.0.ffn_gate.weight": blocks["mlp"]["gate"]["kernel"][0].T,
        "blk.1.ffn_down.weight": blocks["mlp"]["down"]["kernel"][1].T,
        "blk.1.ffn_norm.weight": blocks["ln_2"]["scale"][1],
    }
    for name, values in expected.items():
        found = tensors[name]
        if values.shape[-1] == 80:  # rows that are no multiple of 32
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, values.astype(np.float16))
            continue
        # Half a step of the largest magnitude / 127, and the rounding of the step to float16.
        atol = np.abs(values).max() * (0.51 / 127 + 2**-11) if values.ndim == 2 else 0
        np.testing.assert_allclose(found, values, 0, atol, err_msg=name)
    assert metadata["general.file_type"] == 7
    assert metadata["llama.rope.dimension_count"] == 16
    names = ["<|endoftext|>", *CHAT_TOKENS, "[PAD455]"]
    assert metadata["tokenizer.ggml.tokens"][449:456] == names
    assert metadata["tokenizer.ggml.token_type"][448:456] == [1, *[3] * 6, 5]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    ends = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")]
    assert ends == [449, 449]


def test_gpt2_has_fused_kernels_and_biases(tmp_path: Path) -> None:
    model, file = export("gpt2", tmp_path)
    _, tensors = read_gguf(file)
    attention = model.params["blocks"]["attention"]
    kernels = [attention[name]["kernel"][1] for name in ("query", "key", "value")]
    expected = np.concatenate(kernels, 1).T.astype(np.float16)
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"], expected)
    np.testing.assert_array_equal(tensors["position_embd.weight"], model.params["wpe"]["embedding"])
    assert "output.weight" not in tensors  # tied


def test_the_command_writes_a_new_file_of_sharded_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, expected = export("llama_bias", tmp_path)
    hf.save(model.path, model.gpt, model.params)
    model.tokenizer.save(model.path / "tokenizer.json")
    out, left = tmp_path / "new" / "model.gguf", tmp_path / "new" / "model.gguf.4194305.tmp"
    words = ["export", str(model.path), str(out), "--format", "gguf"]
    left.parent.mkdir()
    left.write_bytes(b"GG")

    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "write_gguf", fail)
        assert main(words) == 5
    assert list(out.parent.iterdir()) == []
    assert main([*words, "--dtype", "f32"]) == 0
    assert out.read_bytes() == expected.read_bytes()
    assert "architecture llama" in capsys.readouterr().out
    assert main(words) == 2
    assert "model.gguf, which exists; expected a new .gguf file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/new", "--format", "gguf"], "expected a new .gguf file"),
        (["{tmp}/new.gguf", "--format", "gguf", "--dtype", "float16"], "one of f16, q8_0, f32"),
        (["{tmp}/new", "--dtype", "q8_0"], "one of float32, bfloat16, float16"),
        (["{tmp}/new.gguf", "--format", "gguf", "--batch", "2"], "--batch: not used with"),
        (["{tmp}/new.gguf", "--format", "gguf"], "got a BPE model that is not byte-level"),
    ],
)
def test_invalid_options_are_reported_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_run()), *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_values_that_overflow_are_an_error(tmp_path: Path) -> None:
    model = make_model(CASES["gpt2"], tmp_path)
    model.params["blocks"]["mlp"]["up"]["kernel"][1, 3, 5] = 1e7
    dtypes: tuple[Dtype, ...] = ("f16", "q8_0")
    for dtype in dtypes:
        with pytest.raises(EvalError, match=r"blk.1.ffn_up.weight: got values up to 1e\+07"):
            gguf.export_gguf(model, io.BytesIO(), dtype=dtype)
    model.params["blocks"]["mlp"]["up"]["kernel"][1, 3, 5] = np.nan
    with pytest.raises(EvalError, match=r"ffn_up\.weight: got 1 values"):
        gguf.export_gguf(model, io.BytesIO(), dtype="f32")


LLAMA = CASES["qwen3"].fields | {"qk_norm": False}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"window": 8, "attention_soft_cap": 30.0}, ["windows", "attention_soft_cap"]),
        ({"logit_soft_cap": 30.0, "logit_scale": 0.5}, ["logit_soft_cap", "logit_scale"]),
        ({"latent": LatentConfig(kv_dim=16), "n_kv_head": None}, ["latent.kv_dim"]),
        ({"norm": "layernorm"}, ["norm"]),
        ({"activation": "geglu"}, ["activation"]),
        ({"norm_position": "sandwich", "parallel_block": False}, ["norm_position"]),
        ({"experts": ExpertsConfig(count=4)}, ["experts.count"]),
        ({"rope": RopeConfig(scaling="yarn", factor=2.0, original_seq_len=64)}, ["rope.scaling"]),
        ({"rope": RopeConfig(dim=16)}, ["rope.dim"]),
        ({"nope_every": 2}, ["windows", "nope_every"]),
        ({"qk_norm": True, "window": 8}, ["windows"]),
    ],
)
def test_models_that_llama_cpp_lacks_are_refused(
    changes: dict[str, Any], fields: list[str]
) -> None:
    with pytest.raises(EvalError) as raised:
        gguf.find_architecture(GPTConfig(**LLAMA | changes))
    for field in fields:
        assert f" {field}: got " in str(raised.value)


def test_gpt2_with_the_exact_gelu_or_a_window_is_refused() -> None:
    config = GPTConfig(n_layer=2, n_head=2, d_model=16)
    assert gguf.find_architecture(config)[0].model_type == "gpt2"
    for changes in ({"activation": "gelu_erf"}, {"activation": "relu"}, {"window": 4}):
        with pytest.raises(EvalError, match=r"nearest architecture is gpt2: (activation|windows)"):
            gguf.find_architecture(dataclasses.replace(config, **changes))


def changed(path: tuple[str, ...], value: Any) -> Tokenizer:
    """Return a tokenizer with another entry of tokenizer.json."""
    description = json.loads(make_tokenizer("llama-bpe").to_json())
    *parents, last = path
    part = description
    for name in parents:
        part = part[name]
    part[last] = value
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (char_tokenizer(["abc"]), "got a BPE model that is not byte-level"),
        (byte_tokenizer([]), "got no end-of-text token"),
        (changed(("model", "ignore_merges"), False), "with ignore_merges False; expected that of"),
        (changed(("pre_tokenizer",), {"type": "Whitespace"}), "got pre_tokenizer .*Whitespace"),
        (changed(("normalizer",), {"type": "Lowercase"}), "got normalizer .*Lowercase"),
        (changed(("model", "dropout"), 0.1), "got dropout 0.1"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        tokenizer_metadata(tokenizer, 480, None)


def test_every_splitting_has_its_own_ids() -> None:
    names = ("gpt-2", "smollm", "qwen2", "llama-bpe")
    ids = {tuple(i for text in TEXTS for i in make_tokenizer(n).encode(text)) for n in names}
    assert len(ids) == len(names)
