"""Vision encoders of transformers, DINOv2 and SigLIP, loaded by `tjx_nn.hf`: features and files.

The folders are made by `tools/golden/make_hf_golden.py`.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tjx_nn import ViTConfig, bind, count_params, hf, resize_positions
from tjx_nn.binding import Params
from tjx_nn.hf.convert_config import functional_fields, read_config
from tjx_nn.hf.families.encoders.dinov2 import DINOV2_BACKBONE
from tjx_nn.hf.families.encoders.siglip import SIGLIP_VISION

Record = Callable[[str, object], None]

GOLDEN = pathlib.Path(__file__).parent / "golden"
BACKBONES = ["dinov2_backbone", "dinov2_registers_backbone", "siglip_vision"]
HALF: Literal["bfloat16"] = "bfloat16"
# Largest root mean square error of bfloat16 outputs, as a multiple of that of transformers.
MOST_BFLOAT16_ERROR = 1.5


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def outputs(config: Any, params: Params, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    model = bind(config, params)
    given = {"images": arrays["images"], "mask": arrays.get("mask")}
    return {"features": model.features(**given), "pooled": model.pooled(**given)}


@pytest.mark.parametrize("name", BACKBONES)
def test_features_agree_with_transformers(name: str, record: Record) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    half = dataclasses.replace(config, dtype=HALF)
    given = jax.device_put((params, arrays))
    found, halves = jax.device_get((outputs(config, *given), outputs(half, *given)))
    largest = max(np.abs(value - arrays[key]).max() for key, value in found.items())
    record(f"{name}: logits", f"{largest:.1e}")
    for key, value in found.items():
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=1e-5)
        theirs = arrays[f"bfloat16_{key}"].view(HALF).astype(np.float32)
        ours = halves[key].astype(np.float32)
        error, allowed = (np.square(x - arrays[key]).mean() ** 0.5 for x in (ours, theirs))
        record(f"{name}: bfloat16", f"{error / allowed:.2f}")
        assert 1e-4 < error <= MOST_BFLOAT16_ERROR * allowed, (key, error, allowed)


@pytest.mark.parametrize("name", BACKBONES)
def test_features_of_images_of_another_size_agree_with_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    assert isinstance(config, ViTConfig)
    arrays = golden(name)
    antialias = config.n_registers > 0
    resized, wide = resize_positions(config, params, (8, 20), antialias=antialias)

    @jax.jit
    def features(params: Params, images: jax.Array) -> jax.Array:
        return bind(resized, params).features(images)

    found = jax.device_get(features(*jax.device_put((wide, arrays["wide_images"]))))
    np.testing.assert_allclose(found, arrays["wide_features"], rtol=0, atol=1e-5)
    _, same = resize_positions(config, params, 12, antialias=antialias)
    chex.assert_trees_all_close(same, params, atol=1e-6)


def test_only_learned_positions_are_resized() -> None:
    with pytest.raises(ValueError, match=r"config\.positions: got 'none'; expected 'learned'"):
        resize_positions(ViTConfig(positions="none"), {}, 32)


def test_names_of_the_hub_load(tmp_path: pathlib.Path) -> None:
    """Checkpoints of SigLIP before transformers 5 have a prefix."""
    folder = shutil.copytree(GOLDEN / "siglip_vision", tmp_path / "prefix")
    tensors = load_file(folder / "model.safetensors")
    named = {f"vision_model.{name}": x for name, x in tensors.items()}
    save_file(named, folder / "model.safetensors")
    config, params = hf.load(folder)
    expected_config, expected = hf.load(GOLDEN / "siglip_vision")
    assert config == expected_config
    chex.assert_trees_all_equal(params, expected)


def test_the_classifier_of_siglip_omits_the_unused_pooling_head(tmp_path: pathlib.Path) -> None:
    """transformers saves the head of the encoder with a classifier that averages patches."""
    folder = shutil.copytree(GOLDEN / "siglip", tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    pool = load_file(GOLDEN / "siglip_vision" / "model.safetensors")
    head = {f"vision_model.{name}": x for name, x in pool.items() if name.startswith("head.")}
    save_file(tensors | head, folder / "model.safetensors")
    path = folder / "config.json"
    entries = json.loads(path.read_text())
    entries["vision_config"]["vision_use_head"] = True
    path.write_text(json.dumps(entries))
    config, params = hf.load(folder)
    expected_config, expected = hf.load(GOLDEN / "siglip")
    assert config == expected_config
    chex.assert_trees_all_equal(params, expected)


# Entries of config.json of the releases, and the parameters that transformers counts.
RELEASES: dict[str, Any] = {
    "dinov2_base": (DINOV2_BACKBONE, {"image_size": 518}, 86_580_480),
    "dinov2_giant": (
        DINOV2_BACKBONE,
        {"image_size": 518, "hidden_size": 1536, "num_hidden_layers": 40,
         "num_attention_heads": 24, "use_swiglu_ffn": True},
        1_136_480_768,
    ),
    "siglip_base": (SIGLIP_VISION, {}, 92_884_224),
    "siglip_so400m": (
        SIGLIP_VISION,
        {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27,
         "num_attention_heads": 16, "intermediate_size": 4304},
        428_225_600,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
def test_presets_are_the_models_of_transformers(name: str) -> None:
    family, entries, count = RELEASES[name]
    config = ViTConfig.preset(name)
    read = read_config(family, {"model_type": family.model_type, **entries})
    assert functional_fields(read) == functional_fields(config)
    assert count_params(config) == count
