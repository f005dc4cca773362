"""Agreement with GPT-2 as Hugging Face transformers computes it.

The file is made by `tools/golden/make_gpt2_golden.py`.
"""

import pathlib
from typing import Literal

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind
from tjx_nn.functional import Params

Golden = dict[str, np.ndarray]

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gpt2_tiny.npz"
OURS_TO_THEIRS = {
    "ln_1": "ln_1", "ln_2": "ln_2", "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def to_params(golden: Golden, n_layer: int) -> Params:
    """Rename transformers' weights; its Conv1D kernels are [in, out], as ours."""

    def layer(name: str, kind: str) -> Params:
        def stacked(leaf: str) -> np.ndarray:
            keys = [f"weights/transformer.h.{i}.{name}.{leaf}" for i in range(n_layer)]
            return np.stack([golden[key] for key in keys])

        return {kind: stacked("weight"), "bias": stacked("bias")}

    blocks: Params = {"attention": {}, "mlp": {}}
    for ours, theirs in OURS_TO_THEIRS.items():
        *parents, leaf = ours.split(".")
        node = blocks[parents[0]] if parents else blocks
        node[leaf] = layer(theirs, "kernel" if parents else "scale")
    fused = layer("attn.c_attn", "kernel")
    for name, part in zip(("query", "key", "value"), range(3), strict=True):
        blocks["attention"][name] = {k: np.split(v, 3, axis=-1)[part] for k, v in fused.items()}
    top = {name: golden[f"weights/transformer.{name}"] for name in ("ln_f.weight", "ln_f.bias")}
    return {
        "wte": {"embedding": golden["weights/transformer.wte.weight"]},
        "wpe": {"embedding": golden["weights/transformer.wpe.weight"]},
        "blocks": blocks,
        "ln_f": {"scale": top["ln_f.weight"], "bias": top["ln_f.bias"]},
    }


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_logits_loss_and_gradient_agree_with_transformers(
    golden: Golden, gelu: Literal["tanh", "erf"]
) -> None:
    config = GPTConfig(
        vocab_size=61, max_seq_len=16, n_layer=2, n_head=2, d_model=16, gelu=gelu
    )  # fmt: skip

    @jax.jit
    def compute(params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
        def loss(params: Params) -> jax.Array:
            return bind(config, params).token_losses(tokens[:, :-1], tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return bind(config, params)(tokens), value, sum(jax.tree.leaves(squares)) ** 0.5

    arguments = jax.device_put((to_params(golden, config.n_layer), golden["tokens"]))
    logits, loss, norm = jax.device_get(compute(*arguments))
    np.testing.assert_allclose(logits, golden[f"{gelu}/logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden[f"{gelu}/loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, golden[f"{gelu}/gradient_norm"], rtol=1e-5)


def test_the_two_forms_of_gelu_can_be_told_apart(golden: Golden) -> None:
    assert np.abs(golden["tanh/logits"] - golden["erf/logits"]).max() > 1e-4
