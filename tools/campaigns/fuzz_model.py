"""Fuzzing of transformers folders: config.json, the index, and headers of safetensors files."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from campaigns.fuzz_kind import Kind
from campaigns.fuzz_mutations import (
    is_small_file,
    mutate_bytes,
    mutate_tree,
    render,
    spoil_file,
)
from flax.traverse_util import unflatten_dict

from tjx_nn import (
    BertConfig,
    EncoderDecoderConfig,
    GPTConfig,
    RopeConfig,
    TransformerConfig,
    ViTConfig,
    hf,
)
from tjx_nn.binding import param_shapes

_SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 16}
_LLAMA: dict[str, Any] = {
    "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
    "tied_head": False, "n_kv_head": 1,
}  # fmt: skip
_CONFIGS = {
    "gpt2": GPTConfig(vocab_size=11, max_seq_len=8, **_SIZES),
    "llama": GPTConfig(
        vocab_size=11, max_seq_len=8, **_SIZES, **_LLAMA,
        rope=RopeConfig(scaling="llama3", factor=8.0, original_seq_len=8),
    ),
    "mistral": GPTConfig(vocab_size=11, max_seq_len=8, window=4, **_SIZES, **_LLAMA),
    "qwen3": GPTConfig(
        vocab_size=11, max_seq_len=8, qk_norm=True, window=4, global_every=2, **_SIZES, **_LLAMA
    ),
    "bert": BertConfig(
        vocab_size=11, max_seq_len=8, activation="gelu_erf", n_token_types=2, **_SIZES
    ),
    "vit": ViTConfig(
        image_size=8, patch_size=4, n_classes=3, activation="gelu_erf", pool="class", **_SIZES
    ),
    "bart": EncoderDecoderConfig(
        vocab_size=11, max_seq_len=8, n_encoder_layer=2, positions="learned", logit_bias=True,
        embedding_norm=True, norm_position="post", activation="gelu_erf", **_SIZES,
    ),
}  # fmt: skip
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def split(data: bytes) -> tuple[Any, bytes]:
    """Return the header of a safetensors file and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: bytes, body: bytes) -> bytes:
    """Put a file together again."""
    return len(header).to_bytes(8, "little") + header + body


def _params(config: TransformerConfig) -> Any:
    draws = np.random.default_rng(0)
    flat = {
        tuple(path.split(".")): draws.standard_normal(shape).astype("bfloat16").astype(np.float32)
        for path, shape in param_shapes(config).items()
    }
    return unflatten_dict(flat)  # type: ignore[no-untyped-call]  # as flax is


class ModelFolder(Kind):
    """Fuzz kind: a folder for `tjx_nn.hf.load`."""

    name = "model_folder"

    def prepare(self, scratch: Path) -> None:
        """Write a small model of each family, as one file and as several."""
        self._folders = []
        for name, config in _CONFIGS.items():
            params = _params(config)
            for whole in (True, False):
                folder = scratch / "models" / f"{name}-{whole}"
                limit = 10**9 if whole else 2000
                hf.save(folder, config, params, max_shard_bytes=limit, dtype="bfloat16")
                self._folders.append(folder)

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Copy a model and mutate its JSON, a header, or bytes."""
        chosen = steps[0].choice(self._folders) if steps else self._folders[0]
        shutil.copytree(chosen, folder / "model")
        for step in steps:
            files = [path for path in sorted((folder / "model").iterdir()) if is_small_file(path)]
            tables = [file for file in files if file.suffix == ".json"]
            if not files or step.random() < 0.03:
                spoil_file(step.choice(files or [folder / "model" / "config.json"]), step)
            elif tables and step.random() < 0.5:
                self._change_table(step.choice(tables), step)
            else:
                self._change_tensors(step.choice(files), step)

    def _change_table(self, file: Path, random: Random) -> None:
        try:
            tree = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            tree = {}
        file.write_bytes(render(mutate_tree(tree, random), random))

    def _change_tensors(self, file: Path, random: Random) -> None:
        data = file.read_bytes()
        try:
            header, body = split(data)
        except (ValueError, RecursionError):
            header, body = None, b""
        if header is not None and random.random() < 0.6:
            data = join(render(mutate_tree(header, random), random), body)
        else:
            data = mutate_bytes(data, random)
        file.write_bytes(data)

    def check(self, folder: Path) -> None:
        """Load the model; an accepted one, saved again, must have the tensors of the files."""
        config, params = hf.load(folder / "model")
        theirs = json.loads((folder / "model" / "config.json").read_bytes())
        hf.save(folder / "again", config, params, model_type=theirs["model_type"])
        header, body = split((folder / "again" / "model.safetensors").read_bytes())
        written = _tensors(header, body)
        read: dict[str, Any] = {}
        for file in sorted((folder / "model").glob("*.safetensors")):
            if is_small_file(file):
                read |= _tensors(*split(file.read_bytes()))
        common = written.keys() & read.keys()
        assert len(common) > len(written) / 2, "the tensors of the files are not those read"
        for name in common:
            assert written[name].shape == read[name].shape, name
            assert np.array_equal(written[name], read[name], equal_nan=True), name
        ours = json.loads((folder / "again" / "config.json").read_bytes())
        pads = isinstance(config, BertConfig | EncoderDecoderConfig)
        unused = _NOT_COMPUTED | (set() if pads else {"pad_token_id"})
        for key in theirs.keys() & ours.keys() - unused:
            is_same = theirs[key] == ours[key] or (theirs[key] is None and ours[key] is False)
            assert is_same, f"{key}: {theirs[key]!r} was read as {ours[key]!r}"


# Fields that change no result, or have another location in older folders.
_NOT_COMPUTED = {
    "architectures", "dtype", "bos_token_id", "eos_token_id", "id2label", "label2id", "head_dim",
    "num_key_value_heads", "sliding_window", "use_sliding_window", "layer_types", "n_inner",
    "rope_parameters", "type_vocab_size", "image_size", "patch_size", "hidden_act",
    "activation_function", "quantization_config",
}  # fmt: skip


def _tensors(header: Any, body: bytes) -> dict[str, np.ndarray]:
    """Read safetensors by the specification, independent of any library."""
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            first, last = entry["data_offsets"]
            flat = np.frombuffer(body[first:last], _DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"]).astype(np.float32)
    return found
