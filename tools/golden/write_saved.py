"""Save tjx models in Hugging Face format with inputs and logits, for check_saved.py.

Run it with this repository's Python (JAX, no PyTorch):

    python write_saved.py /tmp/saved
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from tjx_nn import (
    BertConfig,
    EncoderDecoderConfig,
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    RopeConfig,
    TransformerConfig,
    ViTConfig,
    bind,
    hf,
    init,
)
from tjx_nn.hf.rope import yarn_scale

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 16, "d_ff": 24}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 61, "max_seq_len": 16}
LLAMA: dict[str, Any] = {
    **TEXT, "n_kv_head": 2, "positions": "rope", "norm": "rmsnorm", "activation": "swiglu",
    "bias": False, "tied_head": False,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **LLAMA, "activation": "geglu", "tied_head": True, "embedding_scale": 4.0, "d_head": 6,
}  # fmt: skip
COHERE: dict[str, Any] = {
    **LLAMA, "norm": "layernorm", "parallel_block": True, "logit_scale": 0.25,
    "rope": RopeConfig(interleaved=True),
}  # fmt: skip
OFFSET: dict[str, Any] = {"norm_unit_offset": True}
SANDWICH: dict[str, Any] = {**OFFSET, "norm_position": "sandwich"}
MODERNBERT: dict[str, Any] = {
    **TEXT, "positions": "rope", "rope": RopeConfig(base=500.0, local_base=50.0),
    "norm_position": "pre", "first_norm": False, "activation": "geglu_erf", "bias": False,
    "logit_bias": True, "n_token_types": 0, "norm_eps": 1e-5,
}  # fmt: skip
SIGLIP: dict[str, Any] = {**SIZES, "image_size": 12, "patch_size": 4, "channels": 2}
DINOV2: dict[str, Any] = {**SIGLIP, "d_ff": 48, "layer_scale": 0.5}
T5: dict[str, Any] = {
    **TEXT, "n_encoder_layer": 2, "d_head": 6, "positions": "none", "norm": "rmsnorm",
    "norm_position": "pre", "bias": False, "attention_scale": 1.0, "scale_embeddings": False,
    "relative_buckets": 8, "relative_max_distance": 12,
}  # fmt: skip
EXPERTS = ExpertsConfig(count=4, per_token=2, capacity_factor=None)
# The latent attention and the routers of DeepSeek-V2 and V3.
LATENT: dict[str, Any] = {
    **LLAMA, "n_kv_head": None, "norm_eps": 1e-6, "d_head": 6,
    "latent": LatentConfig(kv_dim=8, rope_dim=4, v_dim=5),
}  # fmt: skip
V2 = ExpertsConfig(
    count=4, per_token=2, capacity_factor=None, shared=2, d_ff=12, first_layer=1, normalize=False,
    weight_scale=1.5,
)  # fmt: skip
V3 = dataclasses.replace(
    V2, count=8, per_token=3, shared=1, scores="sigmoid", choice_bias=True, groups=4,
    groups_per_token=2, normalize=True,
)  # fmt: skip
LLAMA4: dict[str, Any] = {
    **LLAMA, "n_layer": 4, "d_head": 6, "rope": RopeConfig(interleaved=True), "nope_every": 4,
}  # fmt: skip
LLAMA4_EXPERTS = ExpertsConfig(
    count=4, per_token=1, shared=1, d_ff=12, capacity_factor=None, scores="sigmoid",
    normalize=False, scale_inputs=True,
)  # fmt: skip
LONGER: dict[str, Any] = {"base": 500.0, "factor": 4.0, "original_seq_len": 8}

# Few models that cover all options of each family.
MODELS: dict[str, TransformerConfig] = {
    "gpt2": GPTConfig(**TEXT),
    "gpt2_without_bias": GPTConfig(**TEXT, bias=False, activation="gelu_erf", vocab_multiple=16),
    "gpt2_untied": GPTConfig(**TEXT, activation="relu2", tied_head=False),
    "llama": GPTConfig(**LLAMA),
    "llama_bias_geglu": GPTConfig(**{**LLAMA, "bias": True, "activation": "geglu"}),
    "llama_linear": GPTConfig(**LLAMA, rope=RopeConfig(factor=2.0, scaling="linear"), d_head=6),
    "llama_llama3": GPTConfig(**LLAMA, rope=RopeConfig(scaling="llama3", **LONGER)),
    "llama_yarn": GPTConfig(**LLAMA, rope=RopeConfig(scaling="yarn", **LONGER)),
    "mistral": GPTConfig(**{**LLAMA, "tied_head": True}, window=5),
    "qwen3": GPTConfig(**LLAMA, qk_norm=True, d_head=8),
    "qwen3_windows": GPTConfig(**LLAMA, qk_norm=True, window=5, global_every=2),
    "qwen2": GPTConfig(**LLAMA, qkv_bias=True, d_head=8),
    "gemma": GPTConfig(**GEMMA, **OFFSET),
    "gemma2": GPTConfig(
        **GEMMA, **SANDWICH, window=5, global_every=2, logit_soft_cap=30.0,
        attention_soft_cap=5.0, attention_scale=0.5,
    ),
    "gemma3": GPTConfig(
        **GEMMA, **SANDWICH, qk_norm=True, window=5, global_every=2,
        rope=RopeConfig(base=500.0, local_base=50.0, scaling="linear", factor=2.0),
    ),
    "olmo2": GPTConfig(**LLAMA, norm_position="output", qk_norm=True, qk_norm_features="all"),
    "olmo3": GPTConfig(
        **LLAMA, norm_position="output", qk_norm=True, qk_norm_features="all", window=5,
        global_every=2, rope=RopeConfig(scaling="yarn", local_base=500.0, **LONGER),
    ),
    "phi3": GPTConfig(**LLAMA, window=5, rope=RopeConfig(dim=2)),
    "phi3_longrope": GPTConfig(
        **LLAMA, rope=RopeConfig(
            scaling="longrope", short_factors=(1.0, 1.5), long_factors=(2.0, 3.0), **LONGER
        ),
    ),
    "mixtral": GPTConfig(**LLAMA, experts=EXPERTS),
    "qwen3_moe": GPTConfig(
        **LLAMA, qk_norm=True, experts=dataclasses.replace(EXPERTS, d_ff=12, normalize=False)
    ),
    "gpt_neox": GPTConfig(
        **TEXT, positions="rope", rope=RopeConfig(dim=2), activation="gelu_erf", tied_head=False,
        parallel_block=True, parallel_norm="separate",
    ),
    "gpt_neox_sequential": GPTConfig(**TEXT, positions="rope", tied_head=False),
    "deepseek_v2": GPTConfig(**LATENT, experts=V2, rope=RopeConfig(interleaved=True)),
    "deepseek_v2_groups": GPTConfig(
        **LATENT, rope=RopeConfig(interleaved=True),
        experts=dataclasses.replace(V2, groups=2, group_top_k=1),
    ),
    "deepseek_v3": GPTConfig(
        **{**LATENT, "latent": LatentConfig(kv_dim=8, q_dim=12, rope_dim=4)}, experts=V3
    ),
    "deepseek_v3_yarn": GPTConfig(
        **LATENT, experts=V3, attention_scale=yarn_scale(4.0) ** 2 / 10**0.5,
        rope=RopeConfig(scaling="yarn", attention_factor=1.0, interleaved=True, **LONGER),
    ),
    "smollm3": GPTConfig(**LLAMA, nope_every=2),
    "granite": GPTConfig(
        **LLAMA, embedding_scale=12.0, residual_scale=0.22, logit_scale=1 / 13, attention_scale=0.1
    ),
    "cohere": GPTConfig(**COHERE),
    "cohere2": GPTConfig(**COHERE, nope_every=2, window=5),
    "gpt_oss": GPTConfig(
        **{**LLAMA, "bias": True, "activation": "clamped_swiglu"}, attention_sinks=True, window=5,
        global_every=2, d_head=6, swiglu_limit=1.5,
        experts=dataclasses.replace(EXPERTS, use_bias=True),
        rope=RopeConfig(scaling="yarn", truncate=False, beta_fast=1.0, beta_slow=0.1, **LONGER),
    ),
    "llama4": GPTConfig(
        **LLAMA4, experts=LLAMA4_EXPERTS, window=5, chunked_window=True, nope_temperature=0.5,
        nope_temperature_length=4, qk_norm=True, qk_norm_position="after_rope",
    ),
    "llama4_dense_blocks": GPTConfig(
        **LLAMA4, experts=dataclasses.replace(LLAMA4_EXPERTS, every=2, per_token=2)
    ),
    "llama_attention_factor": GPTConfig(
        **LLAMA, rope=RopeConfig(scaling="yarn", attention_factor=1.1, **LONGER)
    ),
    "starcoder2": GPTConfig(**TEXT, n_kv_head=2, positions="rope", window=5),
    "bert": BertConfig(**TEXT),
    "bert_without_bias": BertConfig(**TEXT, bias=False, activation="gelu_tanh"),
    "modernbert": BertConfig(**MODERNBERT, window=4, symmetric_window=True, global_every=2),
    "modernbert_biases": BertConfig(
        **MODERNBERT | {"bias": True, "logit_bias": False, "activation": "swiglu"},
        window=3, symmetric_window=True, global_every=2, global_first=True,
    ),
    "vit": ViTConfig(**SIZES, image_size=(8, 12), patch_size=4, channels=2, n_classes=5),
    "vit_square": ViTConfig(**SIZES, image_size=8, patch_size=4, channels=1, n_classes=2),
    "dinov2": ViTConfig(**DINOV2, pool="class_mean", n_classes=5, mask_token=True),
    "dinov2_swiglu": ViTConfig(
        **{**DINOV2, "d_ff": 48, "activation": "swiglu"}, pool="class_mean", n_classes=5, bias=False
    ),
    "dinov2_backbone": ViTConfig(**DINOV2, n_classes=None, activation="relu", qkv_bias=False),
    "dinov2_registers": ViTConfig(
        **DINOV2, pool="class_mean", n_classes=5, mask_token=True, n_registers=3
    ),
    "dinov2_registers_backbone": ViTConfig(
        **DINOV2, n_classes=None, mask_token=True, n_registers=1, activation="gelu_tanh"
    ),
    "siglip": ViTConfig(**SIGLIP, pool="mean", n_classes=5),
    "siglip_vision": ViTConfig(**SIGLIP, pool="map", n_classes=None, activation="gelu_tanh"),
    "siglip_vision_cropped": ViTConfig(
        **{**SIGLIP, "image_size": 11}, pool="map", n_classes=None, crop=True, bias=False
    ),
    "siglip_vision_without_head": ViTConfig(**SIGLIP, pool="mean", n_classes=None),
    "bart": EncoderDecoderConfig(
        **TEXT, n_encoder_layer=2, positions="learned", embedding_norm=True, logit_bias=True
    ),
    "bart_without_bias": EncoderDecoderConfig(
        **TEXT, n_encoder_layer=2, positions="learned", embedding_norm=True, bias=False,
        scale_embeddings=False, activation="gelu_erf",
    ),
    "t5": EncoderDecoderConfig(**T5, activation="relu", logit_scale=0.25),
    "t5_swiglu": EncoderDecoderConfig(**T5, activation="swiglu", tied_head=False),
    "t5_scaled_head": EncoderDecoderConfig(
        **T5, activation="gelu_erf", tied_head=False, logit_scale=0.25
    ),
}  # fmt: skip


def inputs(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Return model inputs; one row is padded if the model supports padding."""
    rng = np.random.default_rng(1)
    if isinstance(config, ViTConfig):
        shape = (2, *config.height_width, config.channels)
        return {"images": rng.standard_normal(shape).astype(np.float32)}
    tokens = rng.integers(0, 61, (2, 16), dtype=np.int32)
    mask = np.ones((2, 16), np.int32)
    mask[1, 9:] = 0
    if isinstance(config, BertConfig):
        types = rng.integers(0, 2, (2, 16), dtype=np.int32)
        given = {"token_types": types} if config.n_token_types else {}
        return {"tokens": tokens, **given, "mask": mask}
    if isinstance(config, EncoderDecoderConfig):
        return {"source": tokens, "source_mask": mask, "tokens": tokens[:, ::2]}
    return {"tokens": tokens}


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Any, params: Any, given: Any) -> jax.Array:
    """Compute the logits of a model, or the features of one without a head."""
    model = bind(config, params)
    if isinstance(config, ViTConfig) and config.n_classes is None:
        features: jax.Array = model.features(**given)
        return features
    found: jax.Array = model(**given)
    return found


def main() -> None:
    """Write the model folders to the folder given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    output = parser.parse_args().output
    for name, config in MODELS.items():
        rng = np.random.default_rng(0)
        start = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
        noise = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), start)  # noqa: B023  called here
        params = jax.tree.map(lambda x, y: np.asarray(x) + y, start, noise)
        # A small shard size, so that there are several files.
        hf.save(output / name, config, params, max_shard_bytes=20_000)
        given = inputs(config)
        given["logits"] = np.asarray(logits(config, params, given))
        np.savez(output / name / "ours.npz", allow_pickle=False, **given)
        print(output / name)


if __name__ == "__main__":
    main()
