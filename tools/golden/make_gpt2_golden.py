"""Write the golden file of tjx-nn's GPT: a tiny GPT-2 as Hugging Face transformers computes it.

The file holds the weights under transformers' names, the token ids, and for both forms of GELU the
logits, the mean loss of predicting each next token and the norm of that loss's gradient.

Run it in an environment of its own (see README.md):

    python make_gpt2_golden.py ../../packages/tjx-nn/tests/golden/gpt2_tiny.npz
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

SIZES = {"vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
BATCH = 2
# transformers' names of the two forms of GELU, under ours.
ACTIVATIONS = {"tanh": "gelu_new", "erf": "gelu"}


def make_model(activation: str) -> transformers.GPT2LMHeadModel:
    """Return a GPT-2 without dropout, in which no parameter is zero or one."""
    config = transformers.GPT2Config(
        **SIZES,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        is_scale = ".ln_" in name and name.endswith(".weight")
        values = torch.randn(parameter.shape, generator=generator) * 0.3 + float(is_scale)
        # Multiples of 1/64 compress to a small file and are exact in float32.
        parameter.data = torch.round(values * 64) / 64
    return model


def measure(model: transformers.GPT2LMHeadModel, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Return logits, mean loss and gradient norm."""
    output = model(tokens, labels=tokens)
    output.loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters()]
    return {
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
        "gradient_norm": torch.stack(squares).sum().sqrt().numpy(),
    }


def main() -> None:
    """Make the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    path = parser.parse_args().output
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, SIZES["n_positions"])
    tokens = torch.randint(SIZES["vocab_size"], shape, generator=generator)
    arrays = {"tokens": tokens.numpy().astype(np.int32)}
    for form, activation in ACTIVATIONS.items():
        model = make_model(activation)
        arrays |= {f"{form}/{name}": value for name, value in measure(model, tokens).items()}
    for name, parameter in model.named_parameters():  # a tied head is not listed again
        arrays[f"weights/{name}"] = parameter.detach().numpy()
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
