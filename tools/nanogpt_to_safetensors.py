"""Convert a nanoGPT checkpoint (ckpt.pt) to a folder that tjx_nn.hf and transformers read.

It needs PyTorch and safetensors only:

    python nanogpt_to_safetensors.py out/ckpt.pt my_model

nanoGPT is GPT-2 with the exact GELU. Its linear layers are [out, in], those of transformers' GPT-2
[in, out]; missing biases (bias=False) are zeros.
"""

import argparse
import json
import pathlib
import re
from typing import Any

import safetensors.torch  # pants: no-infer-dep
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep

# Prefix of names in checkpoints of torch.compile'd models.
COMPILED = "_orig_mod."
# Causal masks of older versions, and the head, which is tied to the token embedding.
LEFT_OUT = re.compile(r"\.attn\.(masked_)?bias$|^lm_head\.weight$")
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")

Tensors = dict[str, torch.Tensor]


def read(path: pathlib.Path) -> tuple[Tensors, dict[str, Any]]:
    """Return weights and sizes of a checkpoint, without executing code in it."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if missing := {"model", "model_args"} - set(checkpoint):
        raise SystemExit(f"{path} has no {' and no '.join(sorted(missing))}: is it nanoGPT's?")
    weights = {name.removeprefix(COMPILED): x for name, x in checkpoint["model"].items()}
    head, table = weights.get("lm_head.weight"), weights["transformer.wte.weight"]
    if head is not None and not torch.equal(head, table):
        raise SystemExit("lm_head.weight differs from transformer.wte.weight: nanoGPT ties them")
    kept = {name: x.float() for name, x in weights.items() if not LEFT_OUT.search(name)}
    return kept, checkpoint["model_args"]


def convert(weights: Tensors, n_layer: int) -> Tensors:
    """Return the tensors of transformers' GPT-2; SystemExit names missing or unknown ones."""
    kernels = {f"transformer.h.{i}.{name}.weight" for i in range(n_layer) for name in LINEAR}
    scales = {f"transformer.h.{i}.{name}.weight" for i in range(n_layer) for name in NORMS}
    scales.add("transformer.ln_f.weight")
    expected = kernels | scales | {"transformer.wte.weight", "transformer.wpe.weight"}
    biases = {name.removesuffix("weight") + "bias": name for name in kernels | scales}
    if missing := expected - weights.keys():
        raise SystemExit(f"missing: {', '.join(sorted(missing))}")
    if left_over := weights.keys() - expected - biases.keys():
        raise SystemExit(f"not a part of nanoGPT's model: {', '.join(sorted(left_over))}")
    found = {name: x.T if name in kernels else x for name, x in weights.items()}
    for bias, weight in biases.items():
        found.setdefault(bias, torch.zeros(weights[weight].shape[0]))
    return {name: x.contiguous() for name, x in sorted(found.items())}


def config(sizes: dict[str, Any], activation: str) -> dict[str, Any]:
    """Return config.json of transformers' GPT-2."""
    dropout = float(sizes.get("dropout", 0.0))
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"],
        **{name: sizes[name] for name in ("n_layer", "n_head", "n_embd")},
        "activation_function": activation,
        **{f"{where}_pdrop": dropout for where in ("attn", "embd", "resid")},
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def main() -> None:
    """Convert the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="nanoGPT's ckpt.pt")
    parser.add_argument("folder", type=pathlib.Path, help="output folder, without a model")
    parser.add_argument(
        "--tanh-gelu",
        action="store_true",
        help="the model was trained with GPT-2's tanh formula, or began from GPT-2's weights",
    )
    arguments = parser.parse_args()
    target = arguments.folder / "model.safetensors"
    if target.exists():
        raise SystemExit(f"{target} exists: give another folder")
    weights, sizes = read(arguments.checkpoint)
    tensors = convert(weights, sizes["n_layer"])
    entries = config(sizes, "gelu_new" if arguments.tanh_gelu else "gelu")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, target, metadata={"format": "pt"})
    (arguments.folder / "config.json").write_text(json.dumps(entries, indent=2) + "\n")
    count = sum(x.numel() for x in tensors.values())
    print(f"{arguments.folder}: {len(tensors)} tensors, {count} parameters")


if __name__ == "__main__":
    main()
