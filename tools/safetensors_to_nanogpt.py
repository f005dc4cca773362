"""Convert a GPT-2 folder, as `eval export --format hf` writes it, to a nanoGPT ckpt.pt.

It needs PyTorch and safetensors only:

    python safetensors_to_nanogpt.py my_model out/ckpt.pt

nanoGPT's sample.py reads the checkpoint, and train.py continues from it (--init_from=resume), with
the moments of AdamW at 0. nanoGPT has the exact GELU: models with the tanh formula, the default of
GPT-2, are refused without --exact-gelu.
"""

import argparse
import json
import pathlib
from typing import Any

import safetensors.torch  # pants: no-infer-dep
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep
from nanogpt_to_safetensors import LINEAR, Tensors

# Fields of config.json that nanoGPT has in one form only.
FIXED = {
    "model_type": "gpt2", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def sizes(config: dict[str, Any], *, exact_gelu: bool) -> dict[str, Any]:
    """Return nanoGPT's model_args of a config.json; SystemExit names what nanoGPT lacks."""
    wanted = dict(FIXED)
    if not exact_gelu:
        wanted["activation_function"] = "gelu"
    problems = [
        f"{name}: got {config[name]!r}; expected {value!r}"
        for name, value in wanted.items()
        if name in config and config[name] != value
    ]
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        problems.append(f"n_inner: got {config['n_inner']}; expected {4 * config['n_embd']}")
    if problems:
        raise SystemExit("nanoGPT has no such model: " + "; ".join(problems))
    names = {"block_size": "n_positions", "dropout": "resid_pdrop"}
    names |= {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return {"bias": True, **{own: config[name] for own, name in names.items()}}


def convert(tensors: Tensors) -> Tensors:
    """Return the weights under nanoGPT's names, linear layers as [out, in]."""
    found = {
        name: (x.T if name.endswith(tuple(f"{layer}.weight" for layer in LINEAR)) else x)
        for name, x in tensors.items()
        if name != HEAD
    }
    found = {name: x.float().contiguous() for name, x in found.items()}
    return found | {HEAD: found[TABLE]}


def optimizer_state(weights: Tensors) -> dict[str, Any]:
    """Return the state of nanoGPT's AdamW before the first step."""
    trained = [x for name, x in weights.items() if name != HEAD]
    groups = [
        {"params": [x for x in trained if x.dim() >= 2], "weight_decay": 0.1},
        {"params": [x for x in trained if x.dim() < 2], "weight_decay": 0.0},
    ]
    state: dict[str, Any] = torch.optim.AdamW(groups, betas=(0.9, 0.95)).state_dict()
    return state


def main() -> None:
    """Convert the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="config.json and model.safetensors")
    parser.add_argument("checkpoint", type=pathlib.Path, help="the ckpt.pt to write")
    parser.add_argument("--iteration", type=int, default=0, help="steps made so far (iter_num)")
    parser.add_argument(
        "--exact-gelu",
        action="store_true",
        help="accept another activation; nanoGPT computes the exact GELU",
    )
    arguments = parser.parse_args()
    if arguments.checkpoint.exists():
        raise SystemExit(f"{arguments.checkpoint} exists: give another file")
    config = json.loads((arguments.folder / "config.json").read_text())
    model_args = sizes(config, exact_gelu=arguments.exact_gelu)
    weights = convert(safetensors.torch.load_file(arguments.folder / "model.safetensors"))
    checkpoint = {
        "model": weights, "optimizer": optimizer_state(weights), "model_args": model_args,
        "iter_num": arguments.iteration, "best_val_loss": 1e9, "config": {},
    }  # fmt: skip
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, arguments.checkpoint)
    print(f"{arguments.checkpoint}: {len(weights)} tensors, {model_args}")


if __name__ == "__main__":
    main()
