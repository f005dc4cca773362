"""Write the golden folders of tjx_nn.hf: tiny models with logits of Hugging Face transformers.

Each folder has config.json and model.safetensors, saved by transformers, and golden.npz with inputs
and logits (float32); for GPT-2 also the mean next-token loss and its gradient norm, for both forms
of GELU.

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

Arrays = dict[str, np.ndarray]


def fill(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Randomize all parameters, so that no bias is zero and no scale is one."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(model.named_parameters())
    tensors |= {name: x for name, x in model.named_buffers() if name == "final_logits_bias"}
    for name, parameter in sorted(tensors.items()):
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        values = torch.randn(parameter.shape, generator=generator) * 0.3 + float(is_scale)
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
        output = model(tokens, labels=tokens)
        output.loss.backward()
        squares = [parameter.grad.double().square().sum() for parameter in model.parameters()]
        found[f"{form}/logits"], found[f"{form}/loss"] = output.logits, output.loss
        found[f"{form}/gradient_norm"] = torch.stack(squares).sum().sqrt()
    return model, arrays(**found)


def causal(kind: str, **fields: object) -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a Llama-style decoder and its golden arrays."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=LENGTH, **WIDTH,
        bos_token_id=0, eos_token_id=0, **fields,
    )  # fmt: skip
    # The eager implementation supports sliding windows.
    model = fill(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    tokens = ids(1)
    return model, arrays(tokens=tokens, logits=model(tokens).logits)


def bert() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a BERT with its masked-LM head and its golden arrays, one row padded."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, **WIDTH, **NO_DROPOUT
    )
    model = fill(transformers.BertForMaskedLM(config))
    tokens, types, mask = ids(1), ids(2, 2), padded()
    logits = model(tokens, attention_mask=mask, token_type_ids=types).logits
    return model, arrays(tokens=tokens, token_types=types, mask=mask, logits=logits)


def vit() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a ViT with its classification head and its golden arrays; images are not square."""
    config = transformers.ViTConfig(
        image_size=[8, 12], patch_size=4, num_channels=2, num_labels=5, **WIDTH
    )
    model = fill(transformers.ViTForImageClassification(config))
    shape = (BATCH, 2, 8, 12)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = arrays(images=images.permute(0, 2, 3, 1), logits=model(images).logits)
    return model.to(torch.float16), found


def bart() -> tuple[transformers.PreTrainedModel, Arrays]:
    """Return a BART and its golden arrays, one source padded; the decoder has fewer layers."""
    config = transformers.BartConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, d_model=16, dropout=0.0,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=24, scale_embedding=True,
    )  # fmt: skip
    model = fill(transformers.BartForConditionalGeneration(config))
    source, mask, tokens = ids(1), padded(), ids(2, length=LENGTH // 2)
    logits = model(source, attention_mask=mask, decoder_input_ids=tokens).logits
    found = arrays(source=source, source_mask=mask, tokens=tokens, logits=logits)
    return model.to(torch.bfloat16), found


MODELS: dict[str, Callable[[], tuple[transformers.PreTrainedModel, Arrays]]] = {
    "gpt2": gpt2,
    "llama": lambda: causal("llama"),
    "llama3_rope": lambda: causal("llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": lambda: causal("mistral", sliding_window=5, tie_word_embeddings=True),
    "qwen3": lambda: causal("qwen3", head_dim=6, tie_word_embeddings=True),
    "bert": bert,
    "vit": vit,
    "bart": bart,
}


def main() -> None:
    """Write the model folders to the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    output = parser.parse_args().output
    for name, make in MODELS.items():
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        model, found = make()
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "model.safetensors").chmod(0o644)
        np.savez_compressed(folder / "golden.npz", **found)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size} bytes, {sorted(found)}")


if __name__ == "__main__":
    main()
