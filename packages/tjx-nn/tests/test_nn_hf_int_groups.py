"""GPTQ and AWQ checkpoints: against AutoGPTQ and AutoAWQ, and packed by their definition."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tjx_nn import GPTConfig, Int4Kernel, bind, dequantize, hf, init
from tjx_nn.hf.int_groups import IntGroups, unpack

GOLDEN = pathlib.Path(__file__).parent / "golden"
GROUP = 16
CONFIG = GPTConfig(
    vocab_size=11, max_seq_len=8, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48,
    positions="rope", norm="rmsnorm", activation="swiglu", bias=False, tied_head=False,
)  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
Tensors = dict[str, np.ndarray]


@pytest.mark.parametrize("name", ["gptq", "gptq_order", "gptq_8bit", "awq"])
def test_layers_of_autogptq_and_autoawq_are_unpacked(name: str) -> None:
    with np.load(GOLDEN / "int4_groups.npz") as golden:
        parts = {
            key.removeprefix(name): golden[key] for key in golden if key.startswith(f"{name}.")
        }
    expected = parts.pop(".weight")
    method, bits = name.partition("_")[0], 8 if name == "gptq_8bit" else 4
    quantization = IntGroups(method, bits, GROUP, int(method == "gptq"))
    np.testing.assert_array_equal(unpack(quantization, parts).dequantized(), expected)


def pack_bits(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack the integers of the last axis into int32, the first ones into the lowest bits."""
    per_int = 32 // bits
    packed = np.zeros((*integers.shape[:-1], integers.shape[-1] // per_int), np.uint32)
    for place in range(per_int):
        packed |= integers[..., place::per_int].astype(np.uint32) << np.uint32(bits * place)
    return packed.view(np.int32)


def gptq_parts(
    values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray, bits: int = 4
) -> Tensors:
    """Parts of a matrix of integers [inputs, outputs], of format "gptq_v2"."""
    return {
        "qweight": np.ascontiguousarray(pack_bits(values.T, bits).T),
        "qzeros": pack_bits(zeros, bits), "scales": scales, "g_idx": groups.astype(np.int32),
    }  # fmt: skip


def gptq_v1_parts(*given: Any, bits: int = 4) -> Tensors:
    values, scales, zeros, groups = given
    return gptq_parts(values, scales, (zeros - 1) % 2**bits, groups, bits)


def awq_parts(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, _: np.ndarray) -> Tensors:
    order = np.arange(values.shape[1]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    return {
        "qweight": pack_bits(values[:, order], 4), "qzeros": pack_bits(zeros[:, order], 4),
        "scales": scales,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    hf.save(folder, CONFIG, jax.device_get(jax.jit(lambda: init(CONFIG, jax.random.key(0)))()))
    return folder


def quantized(
    plain: pathlib.Path, folder: pathlib.Path, entry: Any, parts_of: Callable[..., Tensors],
    *, bits: int = 4, order: bool = False,
) -> pathlib.Path:  # fmt: skip
    """Write a quantized copy of a model to `folder`, and dequantized to its folder "dense"."""
    dense = folder / "dense"
    shutil.copytree(plain, folder)
    shutil.copytree(plain, dense)
    weights, rng = load_file(plain / "model.safetensors"), np.random.default_rng(0)
    stored = dict(weights)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        outputs, inputs = stored.pop(name).shape
        groups = np.arange(inputs) // GROUP
        groups = rng.permutation(groups) if order else groups
        values = rng.integers(0, 2**bits, (inputs, outputs))
        zeros = rng.integers(0, 2**bits, (inputs // GROUP, outputs))
        scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
        of_inputs = values - zeros[groups], scales[groups].astype(np.float32)
        weights[name] = np.ascontiguousarray(np.prod(of_inputs, 0).T.astype(np.float32))
        for part, x in parts_of(values, scales, zeros, groups).items():
            stored[name.replace("weight", part)] = np.ascontiguousarray(x)
    save_file(weights, dense / "model.safetensors")
    save_file(stored, folder / "model.safetensors")
    write_entry(folder, entry)
    return folder


def write_entry(folder: pathlib.Path, entry: Any) -> None:
    config_json = json.loads((folder / "dense" / "config.json").read_text())
    config_json["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(config_json))


def gptq_8bit_parts(*given: Any) -> Tensors:
    return gptq_v1_parts(*given, bits=8)


@pytest.mark.parametrize(
    ("entry", "parts_of", "kept"),
    [
        (GPTQ, gptq_v1_parts, True),
        ({**GPTQ, "desc_act": True}, gptq_v1_parts, False),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq_parts, True),
        ({**GPTQ, "bits": 8}, gptq_8bit_parts, False),
        (AWQ, awq_parts, True),
    ],
)
def test_checkpoints_have_the_dequantized_weights(
    entry: dict[str, Any], parts_of: Callable[..., Tensors], kept: bool,
    plain: pathlib.Path, tmp_path: pathlib.Path,
) -> None:  # fmt: skip
    order = bool(entry.get("desc_act"))
    folder = quantized(
        plain, tmp_path / "q", entry, parts_of, bits=entry["bits"], order=order
    )  # fmt: skip
    expected = hf.load(folder / "dense")
    found = hf.load(folder)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    assert hf.inspect(folder).problems == ()
    if not kept:
        with pytest.raises(ValueError, match="dequantize: got False for"):
            hf.load(folder, dequantize=False)
        return
    config, params = hf.load(folder, dequantize=False)
    kernel = params["blocks"]["mlp"]["down"]["kernel"]
    assert isinstance(kernel, Int4Kernel)
    assert kernel.shape == (2, 48, 32)
    assert sum(isinstance(x, Int4Kernel) for x in leaves(params)) == 7
    dense = jax.device_get(jax.jit(dequantize)(jax.device_put(params)))
    jax.tree.map(np.testing.assert_array_equal, dense, expected[1])
    if entry is AWQ:
        tokens = jax.device_put(np.array([[1, 2, 3]], np.int32))
        logits = jax.jit(lambda params: bind(config, params)(tokens))
        close, exact = jax.device_get([logits(jax.device_put(x)) for x in (params, dense)])
        np.testing.assert_allclose(close, exact, atol=1e-4 * np.abs(exact).max())


def leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Int4Kernel))


def test_unknown_options_and_parts_raise(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = quantized(plain, tmp_path / "q", GPTQ, gptq_v1_parts)
    wrong = {
        "bits: got 3; expected one of [4, 8]": {**GPTQ, "bits": 3},
        "dynamic: got {'-:lm_head': {}}": {**GPTQ, "dynamic": {"-:lm_head": {}}},
        "rotation: got hadamard; expected no such key": {**GPTQ, "rotation": "hadamard"},
        "checkpoint_format: got 'marlin'": {**GPTQ, "checkpoint_format": "marlin"},
        "format: got ['gptq', 'gptq_v2']": {
            **GPTQ, "format": "gptq", "checkpoint_format": "gptq_v2",
        },
        "version: got 'gemv'": {**AWQ, "version": "gemv"},
        "group_size: got 0": {**AWQ, "group_size": 0},
        "tensor model.layers.0.mlp.down_proj.qweight: got shapes": {**GPTQ, "group_size": 24},
    }  # fmt: skip
    for message, entry in wrong.items():
        write_entry(folder, entry)
        with pytest.raises(ValueError, match=r".") as caught:
            hf.load(folder)
        assert message in str(caught.value), message
    write_entry(folder, GPTQ)
    stored = load_file(folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj"
    # AutoGPTQ saves a bias of 0 for layers without one.
    save_file({**stored, f"{down}.bias": np.zeros(32, np.float16)}, folder / "model.safetensors")
    hf.load(folder)
    cases: list[tuple[str, Tensors]] = [
        (f"tensor {down}.bias: got shape", {f"{down}.bias": np.ones(32, np.float16)}),
        (f"tensor {down}.qweight: got shapes", {f"{down}.weight": np.ones((32, 48), np.float16)}),
        ("tensor other.qzeros: got I32", {"other.qzeros": np.ones((2, 4), np.int32)}),
        ("g_idx: got groups from 0 to 3", {f"{down}.g_idx": np.arange(48, dtype=np.int32) // 15}),
    ]
    for message, more in cases:
        save_file({**stored, **more}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r".") as caught:
            hf.load(folder)
        assert message in str(caught.value), message
    with pytest.raises(ValueError, match="dequantize: got False for a checkpoint without GPTQ"):
        hf.load(plain, dequantize=False)
