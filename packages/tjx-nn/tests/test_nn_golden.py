"""Agreement with Hugging Face transformers on checkpoints loaded by `tjx_nn.hf`.

The folders are made by `tools/golden/make_hf_golden.py`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, hf
from tjx_nn.binding import Params
from tjx_nn.config import Activation

Golden = dict[str, np.ndarray]

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Inputs of each model; the other arrays of golden.npz are expected outputs.
ARGUMENTS = {
    "bert": (("tokens",), ("token_types", "mask")),
    "vit": (("images",), ()),
    "bart": (("source", "tokens"), ("source_mask",)),
}


def golden(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize(
    "name", ["llama", "llama3_rope", "mistral", "qwen3", "bert", "vit", "bart"]
)
def test_logits_agree_with_transformers(name: str) -> None:
    config: Any  # the type of the model depends on the configuration
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    names, keywords = ARGUMENTS.get(name, (("tokens",), ()))
    arguments = tuple(arrays[name] for name in names), {name: arrays[name] for name in keywords}

    @jax.jit
    def logits(params: Params, positional: Any, keyword: Any) -> jax.Array:
        found: jax.Array = bind(config, params)(*positional, **keyword)
        return found

    found = jax.device_get(logits(*jax.device_put((params, *arguments))))
    # Outputs at padding are undefined.
    seen = arrays["mask"] > 0 if "mask" in arrays else ...
    np.testing.assert_allclose(found[seen], arrays["logits"][seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("form", "gelu"), [("tanh", "gelu_tanh"), ("erf", "gelu_erf")])
def test_logits_loss_and_gradient_of_gpt2_agree_with_transformers(
    form: str, gelu: Activation
) -> None:
    read, params = hf.load(GOLDEN / "gpt2")
    assert isinstance(read, GPTConfig)
    config = dataclasses.replace(read, activation=gelu)
    arrays = golden("gpt2")

    @jax.jit
    def compute(params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
        def loss(params: Params) -> jax.Array:
            return bind(config, params).losses(tokens[:, :-1], tokens[:, 1:]).tokens.mean()

        value, gradients = jax.value_and_grad(loss)(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return bind(config, params)(tokens), value, sum(jax.tree.leaves(squares)) ** 0.5

    logits, loss, norm = jax.device_get(compute(*jax.device_put((params, arrays["tokens"]))))
    np.testing.assert_allclose(logits, arrays[f"{form}/logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, arrays[f"{form}/loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, arrays[f"{form}/gradient_norm"], rtol=1e-5)


def test_the_golden_values_distinguish_both_forms_of_gelu() -> None:
    arrays = golden("gpt2")
    assert np.abs(arrays["tanh/logits"] - arrays["erf/logits"]).max() > 1e-4
