"""Write the golden folders of tjx_nn.hf: tiny models with logits of Hugging Face transformers.

Each folder has config.json and model.safetensors, saved by transformers, and golden.npz with
inputs, logits (float32), the loss of the training task and the norm of its gradient, and the logits
of the model loaded in bfloat16, as the uint16 of their bits; of models that generate also the
tokens of greedy generation; for GPT-2 both forms of GELU; for T5 the buckets of distances;
for LongRoPE results up to and beyond the original length; of vision encoders without a head the
features of all tokens and pooled ones in place of logits, also of images of another size.
`golden_table.py` prints how tjx deviates from them.

Run it in a separate environment (see README.md):

    python make_hf_golden.py ../../packages/tjx-nn/tests/golden
"""

import argparse
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import torch
import transformers

VOCAB, LENGTH, BATCH = 61, 16, 2
# Greedy generation: longer than the windows and the RoPE lengths of the models.
PROMPT, NEW = 4, 32
WIDTH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8,
    "beta_fast": 16.0, "beta_slow": 2.0,
}  # fmt: skip
# Queries and keys are scaled in place of their rotary parts.
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK: dict[str, object] = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "moe_intermediate_size": 20, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
DUAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Input arguments of transformers.
INPUTS = {
    "tokens": "input_ids", "token_types": "token_type_ids", "mask": "attention_mask",
    "images": "pixel_values",
}  # fmt: skip
SEQ2SEQ_INPUTS = {
    "source": "input_ids", "source_mask": "attention_mask", "tokens": "decoder_input_ids",
}  # fmt: skip

Arrays = dict[str, np.ndarray]


def fill(model: transformers.PreTrainedModel, scale: float = 1.0) -> transformers.PreTrainedModel:
    """Randomize all parameters, so that no bias is zero; the scales of norms are around `scale`."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # otherwise the row has no gradient
    tensors = dict(model.named_parameters())
    buffers = ("final_logits_bias", "e_score_correction_bias")
    tensors |= {name: x for name, x in model.named_buffers() if name.endswith(buffers)}
    for name, parameter in sorted(tensors.items()):
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        values = torch.randn(parameter.shape, generator=generator) * 0.3 + scale * is_scale
        # Multiples of 1/64 up to 4 are exact in bfloat16 and float16 too.
        parameter.data = torch.round(values * 64) / 64
    return model.eval()


def ids(seed: int, vocab: int = VOCAB, length: int = LENGTH) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(vocab, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padded(length: int = LENGTH) -> torch.Tensor:
    """Return the padding mask of one full row and one row padded at the end."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length // 2 + 1 :] = 0
    return mask


def arrays(**tensors: torch.Tensor) -> Arrays:
    """Return tensors as NumPy arrays, ids as int32."""
    found = {name: x.detach().numpy() for name, x in tensors.items()}
    return {k: x.astype(np.int32) if x.dtype == np.int64 else x for k, x in found.items()}


def masked_labels(mask: torch.Tensor) -> torch.Tensor:
    """Return random labels of two thirds of the unpadded tokens, -100 elsewhere."""
    labels = ids(2)
    labels[mask * (torch.arange(LENGTH) % 3) == 0] = -100
    return labels


def results(
    model: transformers.PreTrainedModel, output: transformers.utils.ModelOutput
) -> dict[str, torch.Tensor]:
    """Return the logits and the loss of a model, and the norm of the gradient of the loss."""
    output.loss.backward()
    tensors = [*model.parameters(), *model.buffers()]
    squares = [x.grad.double().square().sum() for x in tensors if x.grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    return {"logits": output.logits, "loss": output.loss, "gradient_norm": norm}


def gpt2() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a GPT-2 and its golden arrays."""
    tokens = ids(1)
    found = {"tokens": tokens}
    for form, activation in {"erf": "gelu", "tanh": "gelu_new"}.items():
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, n_positions=LENGTH, n_inner=24,
            activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = fill(transformers.GPT2LMHeadModel(config))
        of_form = results(model, model(tokens, labels=tokens))
        found |= {f"{form}/{name}": x for name, x in of_form.items()}
    found["greedy"] = greedy(model, tokens[:, :PROMPT], LENGTH - PROMPT)[:, PROMPT:]
    return model, arrays(**found)


def causal(kind: str, **fields: object) -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a Llama-style decoder and its golden arrays; the weights are stored as bfloat16."""
    sizes = {"num_key_value_heads": 2, "max_position_embeddings": PROMPT + NEW, **WIDTH}
    if kind == "gpt_neox":  # only multi-head attention
        del sizes["num_key_value_heads"]
    ids_of_tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(
        kind, **{"vocab_size": VOCAB, **sizes, **ids_of_tokens, **fields}
    )
    # The eager implementation supports sliding windows and soft caps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    fill(model, scale=0.0 if kind.startswith("gemma") else 1.0)  # norms of Gemma add 1
    tokens = ids(1)
    found = arrays(
        tokens=tokens,
        **results(model, model(tokens, labels=tokens)),
        greedy=greedy(model, tokens[:, :PROMPT], NEW)[:, PROMPT:],
    )
    return model.to(torch.bfloat16), found


def greedy(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, new: int, **inputs: object
) -> torch.Tensor:
    """Return the tokens of greedy generation, without an end of text."""
    return model.generate(
        tokens, max_new_tokens=new, do_sample=False, num_beams=1, eos_token_id=None,
        forced_eos_token_id=None, pad_token_id=0, **inputs,
    )  # fmt: skip


def longrope() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a Phi-3 with LongRoPE, and results up to and beyond its original length."""
    original = LENGTH // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5,
        "short_factor": [1.25, 1.5], "long_factor": [3.5, 4.5],
    }  # fmt: skip
    sizes = {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": PROMPT + NEW}
    sizes |= {"num_attention_heads": 2, "original_max_position_embeddings": original}
    config = transformers.Phi3Config(
        vocab_size=VOCAB, **sizes, rope_parameters=rope, bos_token_id=0, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    fill(model)
    tokens, found = ids(1), {}
    for name, prompt, new in (
        ("short", PROMPT, original - PROMPT),
        ("long", original + 1, NEW // 2),
    ):
        found[f"{name}/greedy"] = greedy(model, tokens[:, :prompt], new)[:, prompt:]
    found |= {"short/logits": model(tokens[:, :original]).logits, "logits": model(tokens).logits}
    return model.to(torch.bfloat16), arrays(tokens=tokens, **found)


def bfloat16_logits(
    kind: type[transformers.PreTrainedModel], folder: pathlib.Path, found: Arrays
) -> np.ndarray:
    """Return the bits of the logits of a saved model that computes in bfloat16."""
    # Loaded, not cast: `to` would round the frequencies of rotary embeddings too.
    model = kind.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    names = SEQ2SEQ_INPUTS if "source" in found else INPUTS
    given = {name: torch.from_numpy(found[own]) for own, name in names.items() if own in found}
    given = {k: x if x.is_floating_point() else x.long() for k, x in given.items()}
    if "images" in found:
        given["pixel_values"] = given["pixel_values"].permute(0, 3, 1, 2).to(torch.bfloat16)
    with torch.no_grad():
        logits = model.eval()(**given).logits
    return logits.to(torch.bfloat16).view(torch.uint16).numpy()


def bert() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a BERT with its masked-LM head and its golden arrays, one row padded."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, **WIDTH, **NO_DROPOUT
    )
    model = fill(transformers.BertForMaskedLM(config))
    tokens, types, mask = ids(1), ids(2, 2), padded()
    labels = masked_labels(mask)
    output = model(tokens, attention_mask=mask, token_type_ids=types, labels=labels)
    found = {"tokens": tokens, "token_types": types, "mask": mask, "labels": labels}
    return model, arrays(**found, **results(model, output))


def roberta() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a RoBERTa with its masked-LM head and its golden arrays, one row padded."""
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH + 2, type_vocab_size=1, pad_token_id=1,
        **WIDTH, **NO_DROPOUT,
    )  # fmt: skip
    model = fill(transformers.RobertaForMaskedLM(config))
    mask = padded()
    # No token is the padding id, as RoBERTa derives positions from it.
    tokens = torch.where(mask > 0, ids(1).clamp(min=2), 1)
    labels = masked_labels(mask)
    output = model(tokens, attention_mask=mask, labels=labels)
    found = arrays(tokens=tokens, mask=mask, labels=labels, **results(model, output))
    return model.to(torch.bfloat16), found


def modernbert() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a ModernBERT with its masked-LM head and its golden arrays, one row padded."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, local_attention=6, pad_token_id=0,
        rope_parameters={**DUAL, "full_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        **{**WIDTH, "num_hidden_layers": 5},
        **dict.fromkeys(["bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"]),
    )  # fmt: skip
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    fill(model)
    mask, tokens = padded(), ids(1).clamp(min=1)
    labels = masked_labels(mask)
    output = model(tokens, attention_mask=mask, labels=labels)
    found = arrays(tokens=tokens, mask=mask, labels=labels, **results(model, output))
    return model.to(torch.bfloat16), found


def vit() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a ViT with its classification head and its golden arrays; images are not square."""
    config = transformers.ViTConfig(
        image_size=[8, 12], patch_size=4, num_channels=2, num_labels=5, **WIDTH
    )
    model = fill(transformers.ViTForImageClassification(config))
    shape = (BATCH, 2, 8, 12)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 1])
    found = arrays(
        images=images.permute(0, 2, 3, 1),
        labels=labels,
        **results(model, model(images, labels=labels)),
    )
    return model.to(torch.float16), found


def vision(kind: str, **fields: object) -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a vision encoder, with its head or without one, and its golden arrays."""
    # Enough images that the error of bfloat16 is no accident.
    count, side = 8, 12
    sizes = {"image_size": side, "patch_size": 4, "num_channels": 2, **WIDTH, **fields}
    if "Dinov2" in kind:  # the width of its MLP is a multiple of hidden_size
        del sizes["intermediate_size"]
    config_class = kind.removesuffix("ForImageClassification").removesuffix("Model") + "Config"
    config: dict[str, object] = sizes
    if config_class == "SiglipConfig":
        config = {"vision_config": sizes, "num_labels": 5}
    elif kind.endswith("Classification"):
        config["num_labels"] = 5
    made = getattr(transformers, config_class)(**config)
    model = fill(getattr(transformers, kind)._from_config(made, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(1)
    images = torch.round(torch.randn((count, 2, side, side), generator=generator) * 16) / 16
    found = {"images": images.permute(0, 2, 3, 1)}
    given: dict[str, torch.Tensor] = {}
    if kind.endswith("Classification"):
        labels = torch.arange(count) % 5
        output = model(images, labels=labels)
        output.loss.backward()
        squares = [x.grad.double().square().sum() for x in model.parameters() if x.grad is not None]
        found |= {"labels": labels, "loss": output.loss}
        found["gradient_norm"] = torch.stack(squares).sum().sqrt()
        names = {"logits": "logits"}
    else:
        if "Dinov2" in kind:
            given = {"bool_masked_pos": torch.rand((count, 9), generator=generator) < 0.4}
            found["mask"] = given["bool_masked_pos"]
        names = {"features": "last_hidden_state", "pooled": "pooler_output"}
        # Other sizes, of which one side shrinks and the other grows.
        wide = torch.round(torch.randn((2, 2, 8, 20), generator=generator) * 16) / 16
        option = {"interpolate_pos_encoding": True} if "Siglip" in kind else {}
        found["wide_images"] = wide.permute(0, 2, 3, 1)
        found["wide_features"] = model(wide, **option).last_hidden_state
    output = model(images, **given)
    half = model.to(torch.bfloat16)(images, **given)
    for name, attribute in names.items():
        found[name] = getattr(output, attribute)
        found[f"bfloat16_{name}"] = getattr(half, attribute).view(torch.uint16)
    return model, arrays(**found)


def bart() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a BART and its golden arrays, one source padded; the decoder has fewer layers."""
    config = transformers.BartConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, d_model=16, dropout=0.0,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=24, scale_embedding=True,
    )  # fmt: skip
    model = fill(transformers.BartForConditionalGeneration(config))
    source, mask, tokens = ids(1), padded(), ids(2, length=LENGTH // 2)
    labels = ids(3, length=LENGTH // 2)
    labels[1, -3:] = -100
    model.final_logits_bias.requires_grad_()  # a buffer in transformers, a parameter in tjx
    output = model(source, attention_mask=mask, decoder_input_ids=tokens, labels=labels)
    found = arrays(
        source=source,
        source_mask=mask,
        tokens=tokens,
        labels=labels,
        **results(model, output),
        # The first token is decoder_start_token_id.
        greedy=greedy(model, source, LENGTH - 1, attention_mask=mask)[:, 1:],
    )
    model.final_logits_bias.requires_grad_(False)
    return model.to(torch.bfloat16), found


def t5(kind: str, **fields: object) -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a T5 or mT5 and its golden arrays, one source padded, longer than the last bucket."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_decoder_layers=2,
        num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        dropout_rate=0.0, decoder_start_token_id=0, **fields,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if kind == "mt5" or "tie_word_embeddings" in fields:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 16))
    fill(model)
    # A larger bias, so that greedy tokens change with the position; smaller logits, whose rounding
    # error in transformers is then far below 1e-5.
    for name, parameter in model.named_parameters():
        parameter.data *= 2 if "relative" in name else 0.25 if "lm_head" in name else 1
    source, mask, labels = ids(1), padded(), ids(2)
    labels[:, ::5] = -100
    given = {"input_ids": source, "attention_mask": mask}
    found = arrays(
        source=source,
        source_mask=mask,
        tokens=model.prepare_decoder_input_ids_from_labels(labels),
        labels=labels,
        **results(model, model(**given, labels=labels)),
        greedy=greedy(model, source, NEW, attention_mask=mask)[:, 1:],
    )
    if kind == "t5" and not fields:  # sizes of the releases, and others
        attention = model.encoder.block[0].layer[0].SelfAttention
        for sizes in [(32, 128), (8, 12), (10, 33)]:
            for both in (False, True):
                distances = torch.arange(-150, 151)
                buckets = attention._relative_position_bucket(distances, both, *sizes)
                found["/".join(map(str, ("buckets", *sizes, int(both))))] = buckets.numpy()
    return model.to(torch.bfloat16), found


MODELS: dict[str, Callable[[], tuple[transformers.PreTrainedModel, Arrays]]] = {
    "gpt2": gpt2,
    "llama": lambda: causal("llama"),
    "llama3_rope": lambda: causal("llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": lambda: causal("mistral", sliding_window=5, tie_word_embeddings=True),
    "qwen3": lambda: causal("qwen3", head_dim=6, tie_word_embeddings=True),
    "qwen2": lambda: causal("qwen2", rope_parameters=YARN, tie_word_embeddings=True),
    "gemma": lambda: causal("gemma", head_dim=6),
    "gemma2": lambda: causal(
        "gemma2",
        head_dim=6,
        query_pre_attn_scalar=9,
        sliding_window=5,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: causal(
        "gemma3_text",
        head_dim=6,
        query_pre_attn_scalar=9,
        sliding_window=5,
        sliding_window_pattern=2,
        rope_parameters=DUAL,
    ),
    "olmo2": lambda: causal("olmo2"),
    "phi3": lambda: causal(
        "phi3",
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "phi3_longrope": longrope,
    "mixtral": lambda: causal("mixtral", num_local_experts=4, sliding_window=5),
    "qwen3_moe": lambda: causal(
        "qwen3_moe", head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "gpt_neox": lambda: causal(
        "gpt_neox",
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "starcoder2": lambda: causal("starcoder2", sliding_window=5),
    "deepseek_v2": lambda: causal(
        "deepseek_v2",
        **{**DEEPSEEK, "q_lora_rank": None},
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
        rope_parameters={**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": lambda: causal("deepseek_v3", **DEEPSEEK, rope_parameters=DEEPSEEK_YARN),
    "smollm3": lambda: causal("smollm3", no_rope_layer_interval=2, rope_parameters=YARN),
    "granite": lambda: causal(
        "granite",
        embedding_multiplier=1.5,
        attention_multiplier=0.25,
        residual_multiplier=0.75,
        logits_scaling=3.0,
    ),
    "cohere": lambda: causal("cohere", logit_scale=0.5),
    "cohere2": lambda: causal(
        "cohere2", logit_scale=0.5, sliding_window=5, sliding_window_pattern=2
    ),
    "olmo3": lambda: causal(
        "olmo3",
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={**DUAL, "full_attention": YARN},
    ),
    "gpt_oss": lambda: causal(
        "gpt_oss",
        head_dim=6,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        swiglu_limit=1.5,  # bounds many of the inputs
        rope_parameters={**YARN, "beta_fast": 1.0, "beta_slow": 0.1, "truncate": False},
    ),
    # Blocks with and without experts and rotary embeddings, in all four combinations.
    "llama4": lambda: causal(
        "llama4_text",
        num_hidden_layers=6,
        head_dim=6,
        intermediate_size_mlp=20,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=3,
        attention_chunk_size=5,
        floor_scale=4,
        attn_scale=0.5,
        rope_parameters=LLAMA3,
    ),
    "bert": bert,
    "roberta": roberta,
    "modernbert": modernbert,
    "vit": vit,
    "dinov2": lambda: vision("Dinov2ForImageClassification", use_swiglu_ffn=True, mlp_ratio=3),
    "dinov2_backbone": lambda: vision("Dinov2Model", qkv_bias=False, mlp_ratio=2),
    "dinov2_registers": lambda: vision("Dinov2WithRegistersForImageClassification"),
    "dinov2_registers_backbone": lambda: vision(
        "Dinov2WithRegistersModel", num_register_tokens=2, use_swiglu_ffn=True
    ),
    "siglip": lambda: vision("SiglipForImageClassification", vision_use_head=False),
    "siglip_vision": lambda: vision("SiglipVisionModel"),
    "bart": bart,
    "t5": lambda: t5("t5"),
    "t5_v1_1": lambda: t5("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: t5("mt5"),
}


def main() -> None:
    """Write the model folders to the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("names", nargs="*", help="models to write; default all")
    arguments = parser.parse_args()
    output = arguments.output
    for name in arguments.names or MODELS:
        make = MODELS[name]
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        model, found = make()
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "model.safetensors").chmod(0o644)
        if not any(array.startswith("bfloat16_") for array in found):  # as vision encoders have
            found["bfloat16_logits"] = bfloat16_logits(type(model), folder, found)
        np.savez_compressed(folder / "golden.npz", **found)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size} bytes, {sorted(found)}")


if __name__ == "__main__":
    main()
