"""z-loss of the output head: value and gradient by formula in float64, in every model."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_kernels import linear_cross_entropy
from tjx_nn import BertConfig, EncoderDecoderConfig, GPTConfig, TransformerConfig, ViTConfig, bind
from tjx_nn.losses import head_losses

P: Any = PartitionSpec
IGNORED = -100
ROWS, TOKENS, WIDTH, VOCAB, PADDED = 4, 6, 8, 29, 32
WEIGHT, CAP = 0.3, 3.0


def reference(x: Any, table: Any, bias: Any, labels: Any) -> Any:
    """Sum of cross-entropies, mean squared log-sum-exp, and gradients of x, table and bias of
    the sum plus WEIGHT x labels x mean, by formula in float64."""
    x, table, bias = (np.asarray(each, np.float64) for each in (x, table[:VOCAB], bias[:VOCAB]))
    bent = np.tanh((x @ table.T + bias) / CAP)
    logits, slope = CAP * bent, 1 - bent**2
    lse = np.log(np.exp(logits).sum(-1))
    counts = labels != IGNORED
    target = np.eye(VOCAB)[np.where(counts, labels, 0)]
    cross_entropy = np.where(counts, lse - (logits * target).sum(-1), 0)
    p = np.exp(logits - lse[..., None])
    dlogits = counts[..., None] * slope * ((1 + 2 * WEIGHT * lse[..., None]) * p - target)
    flat, padding = dlogits.reshape(-1, VOCAB), ((0, PADDED - VOCAB), (0, 0))
    dtable = np.pad(flat.T @ x.reshape(-1, WIDTH), padding)
    dbias = np.pad(flat.sum(0), padding[0])
    return cross_entropy, (lse[counts] ** 2).mean(), (dlogits @ table, dtable, dbias)


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_value_and_gradient_of_the_head(keep_logits: bool, sharded: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, TOKENS, WIDTH)).astype(np.float32)
    table = rng.standard_normal((PADDED, WIDTH)).astype(np.float32)
    bias = rng.standard_normal(PADDED).astype(np.float32)
    labels = rng.integers(0, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    labels[0, 1:] = labels[2, ::2] = IGNORED

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(x: Any, table: Any, bias: Any, labels: Any) -> Any:
        losses, aux_losses = head_losses(
            x, table, labels, bias=bias, soft_cap=CAP, vocab_size=VOCAB, z_loss=WEIGHT,
            keep_logits=keep_logits, token_shards=2 if sharded else 1,
        )  # fmt: skip
        (z_loss,) = aux_losses["z_loss"]
        return losses.sum() + WEIGHT * (labels != IGNORED).sum() * z_loss, (losses, z_loss)

    specs = (P("rows"), P("vocab"), P("vocab"), P("rows"))
    mesh = jax.make_mesh((2, 4), ("rows", "vocab"), axis_types=(AxisType.Auto,) * 2)
    places = [NamedSharding(mesh, spec) for spec in specs] if sharded else [None] * 4
    arrays = [jax.device_put(*each) for each in zip((x, table, bias, labels), places, strict=True)]
    (total, (losses, z_loss)), gradients = jax.device_get(loss(*arrays))
    expected, mean, expected_gradients = reference(x, table, bias, labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z_loss, mean, rtol=1e-5)
    count = (labels != IGNORED).sum()
    np.testing.assert_allclose(total, expected.sum() + WEIGHT * count * mean, rtol=1e-5)
    for found, each in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-5)


def test_weight_0_adds_nothing_to_the_program() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 3, 8), (9, 8))]  # type: ignore[no-untyped-call]
    labels = jax.ShapeDtypeStruct((2, 3), np.int32)  # type: ignore[no-untyped-call]

    def plain(x: Any, table: Any, labels: Any) -> Any:
        with jax.named_scope("loss"):
            return linear_cross_entropy(x, table, labels)

    def with_weight(x: Any, table: Any, labels: Any, weight: float) -> Any:
        return head_losses(x, table, labels, z_loss=weight)[0]

    def program(function: Any) -> str:
        def gradients(x: Any, table: Any, labels: Any) -> Any:
            return jax.grad(lambda *heads: function(*heads, labels).sum(), (0, 1))(x, table)

        return jax.jit(gradients).lower(*shapes, labels).as_text()

    assert program(partial(with_weight, weight=0.0)) == program(plain)


def test_labels_that_are_all_ignored_have_none() -> None:
    x, table = jax.device_put((np.ones((1, 2, 8), np.float32), np.ones((5, 8), np.float32)))
    labels = jax.device_put(np.full((1, 2), IGNORED, np.int32))
    compute = jax.jit(
        jax.value_and_grad(lambda x: head_losses(x, table, labels, z_loss=0.1)[1]["z_loss"][0])
    )
    value, gradient = jax.device_get(compute(x))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


SIZES: dict[str, Any] = {"n_layer": 1, "n_head": 2, "d_model": 16, "z_loss": WEIGHT}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 29, "max_seq_len": 8}
MODELS: dict[str, tuple[TransformerConfig, tuple[str, ...]]] = {
    "GPT, untied and padded": (
        GPTConfig(**TEXT, tied_head=False, vocab_multiple=8, logit_soft_cap=2.0), ("tokens",)
    ),
    "BERT": (BertConfig(**TEXT), ("tokens",)),
    "encoder and decoder": (EncoderDecoderConfig(**TEXT, n_encoder_layer=1), ("tokens", "tokens")),
    "ViT": (
        ViTConfig(**SIZES, image_size=8, patch_size=4, channels=1, n_classes=5), ("images",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_of_a_model_is_that_of_its_logits(name: str, make: Any) -> None:
    config, names = MODELS[name]
    rng = np.random.default_rng(1)
    inputs = {
        "tokens": rng.integers(0, 29, (2, 8)).astype(np.int32),
        "images": rng.standard_normal((2, 8, 8, 1)).astype(np.float32),
    }
    labels = rng.integers(0, 5, (2,) if "images" in names else (2, 8)).astype(np.int32)
    labels[0] = np.where(rng.random(labels[0].shape) < 0.5, IGNORED, labels[0])

    @jax.jit
    def compute(params: Any, inputs: Any, labels: Any) -> Any:
        model: Any = bind(config, params)
        given = [inputs[name] for name in names]
        return model.losses(*given, labels), model(*given)

    found, logits = jax.device_get(compute(make(config), *jax.device_put((inputs, labels))))
    logits, counts = logits.astype(np.float64), labels != IGNORED
    lse = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.where(counts, labels, 0)[..., None], -1)[..., 0]
    # The losses of labels, which evaluations read, have no part of it.
    np.testing.assert_allclose(found.tokens, np.where(counts, lse - target, 0), atol=1e-5)
    np.testing.assert_allclose(found.aux_losses["z_loss"], (lse[counts] ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.penalty, WEIGHT * (lse[counts] ** 2).mean(), rtol=1e-5)
