"""Write the golden folders of tjx_nn.lora: PEFT adapters with random weights, and their logits.

The base models are the golden folders of `make_hf_golden.py`. Each folder has adapter_config.json,
adapter_model.safetensors, and golden.npz with inputs and logits (float32).

Run it in a separate environment (see README.md), with `pip install peft==0.21.2`:

    python make_peft_golden.py ../../packages/tjx-nn/tests/golden

With `--check FOLDER` it reads the adapters of that folder's subfolders instead, as saved by
`write_peft.py`, and compares their logits with the golden ones.
"""

import argparse
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers

# Name -> base model and arguments of LoraConfig.
CASES = {
    "peft_llama": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "peft_llama_dora": (
        "llama",
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ),
    "peft_gpt2": (
        "gpt2",
        {
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "rank_pattern": {"c_fc": 3},
            "alpha_pattern": {"c_fc": 6},
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Randomize all adapters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_magnitude" in name:
            factor = 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            parameter.data = parameter.data * factor
        elif "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Return the logits of a model."""
    with torch.no_grad():
        return model.eval()(tokens).logits.numpy()


def check(golden: pathlib.Path, saved: pathlib.Path) -> float:
    """Return the largest difference of the logits of adapters that tjx saved."""
    worst = 0.0
    for name, (base, _) in CASES.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(golden / base)
        model = peft.PeftModel.from_pretrained(model, saved / name)
        arrays = np.load(golden / name / "golden.npz", allow_pickle=False)
        found = logits(model, torch.from_numpy(arrays["tokens"]))
        difference = float(np.abs(found - arrays["logits"]).max())
        print(f"{name}: largest difference {difference:.2g}")
        worst = max(worst, difference)
    return worst


def main() -> None:
    """Write or check the adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.check is not None:
        sys.exit(check(arguments.folder, arguments.check) > 1e-5)
    for name, (base, options) in CASES.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.folder / base)
        tokens = torch.randint(
            model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(2)
        )
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        randomize(adapted)
        folder = arguments.folder / name
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        np.savez(folder / "golden.npz", tokens=tokens.numpy(), logits=logits(adapted, tokens))


if __name__ == "__main__":
    main()
