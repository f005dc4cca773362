"""Adapters in the format of Hugging Face PEFT."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tjx_nn.binding import param_shapes
from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import TensorMapping
from tjx_nn.hf.load_save import family_for
from tjx_nn.hf.safetensors_folder import Tensors, read_json, save_tensors
from tjx_nn.lora.adapters import Adapters, check_adapters
from tjx_nn.lora_config import LoRAConfig
from tjx_nn.problems import raise_problems
from tjx_nn.quantization.linear_layers import linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"[\w.]+")
# Features of PEFT that tjx lacks, with the values that mean none.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
}


class _Module(NamedTuple):
    """A module of transformers: its name, the tjx layers that it fuses, and its layer's number."""

    name: str
    paths: tuple[str, ...]
    layer: int | None


def save(path: str | Path, config: TransformerConfig, lora: LoRAConfig, adapters: Adapters) -> None:
    """Save adapters in the format of PEFT, for ``PeftModel.from_pretrained``.

    The adapters of layers that transformers fuses (query, key and value of GPT-2) become one with
    the sum of their ranks. Those of the module of `multi_token_loss`, which only training reads,
    are omitted.

    Parameters
    ----------
    path
        Folder, created if necessary; existing adapters are replaced.
    config
        Configuration of the model, which a family of `tjx_nn.hf` must represent.
    lora, adapters
        As of `tjx_nn.lora.bind`.

    Raises
    ------
    ValueError
        If the adapters do not fit, or no family can represent the model.
    """
    check_adapters(config, lora, adapters)
    flat = {name: np.asarray(jax.device_get(x)) for name, x in _flatten(adapters).items()}
    shapes = param_shapes(config)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in _modules(config):
        if not any(f"{path}.a" in flat for path in module.paths):
            continue
        parts = [_part(flat, module, path, shapes[f"{path}.kernel"]) for path in module.paths]
        if lora.dora and any(part.magnitude is None for part in parts):
            raise ValueError(
                f"lora.targets: got part of {', '.join(module.paths)}; expected all of them with "
                f"DoRA, as transformers fuses them ({module.name}); give all"
            )
        name = f"{_PREFIX}{module.name}"
        tensors[f"{name}.lora_A.weight"] = np.concatenate([part.a.T for part in parts])
        tensors[f"{name}.lora_B.weight"] = _block_diagonal([part.b.T for part in parts])
        ranks[module.name] = sum(part.a.shape[1] for part in parts)
        if lora.dora:
            magnitude = [part.magnitude for part in parts if part.magnitude is not None]
            tensors[f"{name}.lora_magnitude_vector"] = np.concatenate(magnitude)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_tensors(folder / WEIGHTS, arrays)
    content = json.dumps(_config_json(config, lora, ranks), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(content + "\n", encoding="utf-8")


def load(path: str | Path, config: TransformerConfig) -> tuple[LoRAConfig, Adapters]:
    """Load adapters in the format of PEFT.

    Layers of a stack without an adapter get one of zeros. The ranks and scales of PEFT's patterns
    are supported: the scale of each module is folded into "b".

    Parameters
    ----------
    path
        Folder with adapter_config.json and adapter_model.safetensors.
    config
        Configuration of the model.

    Returns
    -------
    lora : LoRAConfig
        Rank, alpha, target layers and kind of the adapters.
    adapters : dict
        NumPy arrays of float32, as from `tjx_nn.lora.init`; ranks can exceed `lora.rank`.

    Raises
    ------
    ValueError
        If the files are missing or damaged, use a feature that tjx lacks, or do not fit the model.
    """
    folder = Path(path)
    given = read_json(folder / CONFIG)
    lora, dora = _read_config(folder, given), bool(given.get("use_dora", False))
    found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    with Tensors(folder, WEIGHTS) as tensors:
        left = set(tensors.shapes)
        for module in _modules(config):
            name = f"{_PREFIX}{module.name}"
            names = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
            names += [f"{name}.lora_magnitude_vector"] if dora else []
            if not left & set(names):
                continue
            if missing := [each for each in names if each not in left]:
                raise ValueError(f"{folder}: tensor {missing[0]} is missing; copy the file again")
            left -= set(names)
            scale = _scale_of(given, module.name, tensors.shapes[names[0]][0]) / lora.scale
            for layer_path, part in _split(module, [tensors[each] for each in names], config):
                part["b"] = part["b"] * np.float32(scale)
                found.setdefault(layer_path, {})[module.layer] = part
    raise_problems(
        [
            f"{folder}: got the tensor {name}; expected adapters of linear layers"
            for name in sorted(left)
        ]
    )
    if not found:
        raise ValueError(f"{folder}: holds no adapter of a linear layer of this model")
    lora = LoRAConfig(rank=lora.rank, alpha=lora.alpha, targets=",".join(found), dora=dora)
    flat = {
        f"{layer_path}.{name}": x
        for layer_path, layers in found.items()
        for name, x in _stack(folder, layer_path, layers, config).items()
    }
    adapters: Adapters = unflatten_dict(flat, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    check_adapters(config, lora, adapters)
    return lora, adapters


def _modules(config: TransformerConfig) -> Iterator[_Module]:
    """Yield the modules of transformers that hold linear layers."""
    family, family_config, _ = family_for(config)
    layers = linear_layers(config)
    for mapping in family.tensors(family_config):
        paths = _layer_paths(mapping)
        if not all(path in layers for path in paths):
            continue
        name = mapping.tensor.removesuffix(".weight")
        stacked = "{layer}" in name
        for layer in range(layers[paths[0]].shape[0]) if stacked else [None]:
            yield _Module(name.format(layer=layer), paths, layer)


def _layer_paths(mapping: TensorMapping) -> tuple[str, ...]:
    return tuple(path.removesuffix(".kernel") for path in mapping.params)


class _Part(NamedTuple):
    """Adapter of one layer: a [I, R], b [R, O] and magnitude [O] or None."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def _part(
    flat: Mapping[str, np.ndarray], module: _Module, path: str, shape: tuple[int, ...]
) -> _Part:
    """Return the adapter of a layer; of rank 0 if it has none."""
    if f"{path}.a" not in flat:
        n_in, n_out = shape[-2:]
        return _Part(np.zeros((n_in, 0), np.float32), np.zeros((0, n_out), np.float32), None)
    arrays = [flat.get(f"{path}.{name}") for name in ("a", "b", "magnitude")]
    if module.layer is not None:
        arrays = [None if x is None else x[module.layer] for x in arrays]
    a, b, magnitude = arrays
    assert a is not None
    assert b is not None
    return _Part(a, b, magnitude)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    found = np.zeros((rows, columns), np.float32)
    row = column = 0
    for block in blocks:
        found[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return found


def _split(
    module: _Module, tensors: list[np.ndarray], config: TransformerConfig
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the adapter of each layer that a module fuses; they share "a"."""
    a, b, *magnitude = tensors
    layers = linear_layers(config)
    start = 0
    for path in module.paths:
        end = start + layers[path].shape[-1]
        part = {"a": a.T, "b": b[start:end].T}
        if magnitude:
            part["magnitude"] = magnitude[0].reshape(-1)[start:end]
        yield path, part
        start = end


def _stack(
    folder: Path,
    path: str,
    by_layer: Mapping[int | None, dict[str, np.ndarray]],
    config: TransformerConfig,
) -> dict[str, np.ndarray]:
    """Stack the adapters of all layers; those of smaller rank are padded with zeros."""
    if None in by_layer:
        return by_layer[None]
    n_layers, n_in, n_out = linear_layers(config)[path].shape
    rank = max(part["a"].shape[1] for part in by_layer.values())
    stacked = {
        "a": np.zeros((n_layers, n_in, rank), np.float32),
        "b": np.zeros((n_layers, rank, n_out), np.float32),
    }
    if any("magnitude" in part for part in by_layer.values()):
        if len(by_layer) < n_layers:
            raise ValueError(
                f"{folder}: got DoRA of {path} in {len(by_layer)} of {n_layers} layers; expected "
                "all of them, as tjx stacks the layers"
            )
        stacked["magnitude"] = np.zeros((n_layers, n_out), np.float32)
    for layer, part in by_layer.items():
        if part["a"].shape[0] != n_in or part["b"].shape[1] != n_out:
            raise ValueError(
                f"{folder}: got an adapter of {path} from {part['a'].shape[0]} to "
                f"{part['b'].shape[1]} features; expected {n_in} to {n_out}"
            )
        own = part["a"].shape[1]
        stacked["a"][layer, :, :own], stacked["b"][layer, :own] = part["a"], part["b"]
        if "magnitude" in part:
            stacked["magnitude"][layer] = part["magnitude"]
    return stacked


def _config_json(
    config: TransformerConfig, lora: LoRAConfig, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the content of adapter_config.json; modules of another rank are in patterns."""
    assert lora.rank is not None
    others = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    family, _, _ = family_for(config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM"
        if family.architecture.endswith(("LMHeadModel", "CausalLM"))
        else None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": lora.dora,
        "use_rslora": False,
        "fan_in_fan_out": family.model_type == "gpt2",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: lora.scale * rank for name, rank in others.items()},
        "inference_mode": True,
    }


def _read_config(folder: Path, given: Mapping[str, Any]) -> LoRAConfig:
    if given.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: got peft_type {given.get('peft_type')!r}; expected 'LORA'")
    raise_problems(
        [
            f"{folder}: {name}: got {given[name]!r}; expected {allowed[0]!r}; tjx supports no other"
            for name, allowed in _UNSUPPORTED.items()
            if name in given and given[name] not in allowed
        ]
    )
    rank: Any = given.get("r")
    alpha: Any = given.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or rank < 1:
        raise ValueError(f"{folder}: got r {rank!r} and lora_alpha {alpha!r}; expected numbers")
    factor = rank**0.5 if given.get("use_rslora") else 1.0
    return LoRAConfig(rank=rank, alpha=float(alpha) * factor)


def _scale_of(given: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a module's adapter, with PEFT's patterns of alpha."""
    patterns: Any = given.get("alpha_pattern") or {}
    alpha: Any = given["lora_alpha"]
    entries: list[Any] = list(patterns.items()) if isinstance(patterns, dict) else [(patterns, "")]
    for pattern, value in entries:
        if not _NAME.fullmatch(str(pattern)) or type(value) not in (int, float):
            raise ValueError(
                f"alpha_pattern: got {str(pattern)[:60]!r}: {value!r}; expected names of modules, "
                "not regular expressions, with numbers"
            )
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = float(value)
    return float(alpha) / (rank**0.5 if given.get("use_rslora") else rank)


def _flatten(tree: Any) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(tree, sep=".")  # type: ignore[no-untyped-call]  # as flax is
    return flat
