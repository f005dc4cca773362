"""Malicious checkpoints: false claims in headers, indices and config.json."""

import json
import os
import pathlib
import shutil
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tjx_nn import hf
from tjx_nn.binding import param_shapes
from tjx_nn.hf.convert_params import MAX_PROBLEMS
from tjx_nn.hf.families import BUILT_IN
from tjx_nn.hf.family import LARGEST_SIZE, MOST_LAYERS
from tjx_nn.hf.safetensors_folder import INDEX, LARGEST_HEADER, LARGEST_JSON, WHOLE

GOLDEN = pathlib.Path(__file__).parent / "golden"
MOST_HELD = 50 << 20  # bytes; the golden models have a few thousand numbers


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """folder(name, **entries): a golden folder with other entries in config.json."""

    def copy(name: str, **entries: Any) -> pathlib.Path:
        made = tmp_path / name
        shutil.copytree(GOLDEN / name, made)
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | entries))
        return made

    return copy


def error_of(path: pathlib.Path) -> str:
    """Message and notes of the ValueError; also check that loading allocated little memory."""
    tracemalloc.start()
    try:
        hf.load(path)
    except ValueError as error:
        assert tracemalloc.get_traced_memory()[1] < MOST_HELD
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        assert str(path) in text
        return text
    finally:
        tracemalloc.stop()
    pytest.fail("no ValueError was raised")


@pytest.mark.parametrize("claimed", [2**60, 2**64 - 1, LARGEST_HEADER + 1, 10**5])
def test_headers_larger_than_the_file_raise(
    claimed: int, folder: Callable[..., pathlib.Path]
) -> None:
    path = folder("gpt2")
    content = (path / WHOLE).read_bytes()
    (path / WHOLE).write_bytes(claimed.to_bytes(8, "little") + content[8:])
    assert f"got a header of {claimed} bytes in a file of {len(content)}" in error_of(path)


def test_headers_above_the_limit_raise_in_large_files(
    folder: Callable[..., pathlib.Path],
) -> None:
    path = folder("gpt2")
    with (path / WHOLE).open("r+b") as file:
        file.write((2 * LARGEST_HEADER).to_bytes(8, "little"))
        file.truncate(4 * LARGEST_HEADER)
    assert f"expected at most {LARGEST_HEADER}" in error_of(path)


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**63, 2], [-1, 4], [2**64], ["a"], [0, 2**62]])
def test_shapes_that_do_not_match_the_data_raise(
    shape: list[Any], folder: Callable[..., pathlib.Path]
) -> None:
    path = folder("gpt2")
    content = (path / WHOLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["transformer.ln_f.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    (path / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert WHOLE in error_of(path)


@pytest.mark.parametrize(
    "names",
    [["../gpt2/model.safetensors"], [".."], ["/etc/passwd"], ["model.bin"], [5], [["a"]], [""]],
)
def test_index_paths_outside_of_the_folder_raise(
    names: list[Any], folder: Callable[..., pathlib.Path]
) -> None:
    path = folder("gpt2")
    (path / WHOLE).rename(path / "model-1.safetensors")
    table = dict.fromkeys(load_file(path / "model-1.safetensors"), "model-1.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": table}))
    assert hf.load(path)
    table |= {f"more{number}": name for number, name in enumerate(names)}
    (path / INDEX).write_text(json.dumps({"weight_map": table}))
    assert "expected safetensors files of its folder" in error_of(path)


def test_duplicate_tensors_raise(folder: Callable[..., pathlib.Path]) -> None:
    path = folder("gpt2")
    tensors = load_file(path / WHOLE)
    (path / WHOLE).unlink()
    twice = "transformer.ln_f.weight"
    save_file(tensors, path / "a.safetensors")
    save_file({twice: np.zeros_like(tensors[twice])}, path / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {twice: "b.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": where}))
    assert f"tensor {twice}, which another file also has" in error_of(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "recursion"),
        (b'{"model_type": "gpt2", "model_type": "bert"}', "duplicate key"),
        (b" " * (LARGEST_JSON + 1), f"at most {LARGEST_JSON}"),
        (b"[]", "expected an object"),
        (b"\xff\xfe", "invalid JSON"),
    ],
)
def test_malformed_config_json_raises(
    content: bytes, told: str, folder: Callable[..., pathlib.Path]
) -> None:
    path = folder("gpt2")
    (path / "config.json").write_bytes(content)
    assert told in error_of(path)


def test_error_messages_are_bounded(folder: Callable[..., pathlib.Path]) -> None:
    path = folder("llama", rope_parameters={f"rope_theta{n}": 1.0 for n in range(3000)})
    lines = error_of(path).splitlines()
    assert 20 < len(lines) < 100
    assert "more" in lines[-1] or "more" in lines[-2]


def test_named_pipes_raise_instead_of_blocking(folder: Callable[..., pathlib.Path]) -> None:
    path = folder("gpt2")
    for name, told in ((WHOLE, f"found neither {WHOLE}"), ("config.json", "config.json")):
        (path / name).unlink()
        os.mkfifo(path / name)
        assert told in error_of(path)


@pytest.mark.parametrize(
    ("name", "entries", "told"),
    [
        ("gpt2", {"n_layer": 10**9}, f"up to {MOST_LAYERS}"),
        ("gpt2", {"n_layer": True}, "n_layer: got True"),
        ("gpt2", {"n_layer": "2"}, "n_layer: got 2"),
        ("gpt2", {"n_embd": 10**12}, f"up to {LARGEST_SIZE}"),
        ("gpt2", {"n_head": -4}, "n_head: got -4"),
        ("gpt2", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ("gpt2", {"layer_norm_epsilon": 1e400}, "layer_norm_epsilon"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings: got no"),
        ("gpt2", {"activation_function": ["gelu"]}, "activation_function"),
        ("gpt2", {"architectures": 5}, "architectures 5"),
        ("gpt2", {"architectures": "GPT2LMHeadModel"}, "architectures"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": {}, "rope_theta": 1e4}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_theta": "much"}}, "rope_theta: got much"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "base: got 0.0"),
        ("llama3_rope", {"rope_parameters": {"rope_type": "llama3", "factor": [8]}}, "factor"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": 5}, "layer_types"),
        ("qwen3", {"use_sliding_window": "no", "sliding_window": 4}, "use_sliding_window"),
        ("vit", {"image_size": "8"}, "image_size"),
        ("vit", {"image_size": [8, 8, 8]}, "image_size"),
        ("vit", {"patch_size": 10**12}, "patch_size"),
        ("vit", {"id2label": 3}, "id2label"),
    ],
)
def test_entries_of_wrong_types_and_sizes_raise(
    name: str, entries: dict[str, Any], told: str, folder: Callable[..., pathlib.Path]
) -> None:
    assert told in error_of(folder(name, **entries))


def test_unknown_layer_types_raise(
    folder: Callable[..., pathlib.Path],
) -> None:
    layers = json.loads((GOLDEN / "qwen3" / "config.json").read_text())["num_hidden_layers"]
    every = ["chunked_attention", "full_attention"] * (layers // 2)
    path = folder("qwen3", layer_types=every, use_sliding_window=True, sliding_window=4)
    assert "layer_types" in error_of(path)


def test_configs_of_huge_models_allocate_little_memory(
    folder: Callable[..., pathlib.Path],
) -> None:
    text = error_of(folder("gpt2", n_embd=2**20, n_layer=MOST_LAYERS, n_inner=None))
    assert "missing; expected shape [1048576]" in text
    assert len(text.splitlines()) <= MAX_PROBLEMS + 2
    assert "more" in text


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "phi3", "mixtral", "gpt_neox", "bert", "modernbert", "vit", "bart"],
)
def test_transform_shapes_equal_written_shapes(name: str) -> None:
    config, _ = hf.load(GOLDEN / name)
    own = param_shapes(config)
    model_type = json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
    (family,) = [family for family in BUILT_IN if family.model_type == model_type]
    for mapping in family.tensors(config):
        if mapping.params[0] in own:
            first = ("{layer}" in mapping.tensor) + ("{expert}" in mapping.tensor)
            shapes = [own[path][first:] for path in mapping.params]
            written = mapping.transform.write([np.zeros(shape, np.float32) for shape in shapes])
            assert mapping.transform.shape(shapes) == written.shape, mapping.tensor
