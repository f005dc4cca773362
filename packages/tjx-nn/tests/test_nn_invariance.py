"""All models and attention layers: independence of packed documents, padding and batch rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import (
    BertConfig,
    EncoderDecoderConfig,
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    TransformerConfig,
    ViTConfig,
    bind,
    init,
)
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]
Make = Callable[..., Params]

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "d_model": 16}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 19, "max_seq_len": 12}
# Calls without losses do not enforce the capacity of experts.
CROWDED = ExpertsConfig(count=3, d_ff=8, capacity_factor=0.1)
KINDS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned", "n_kv_head": 2},
    "sinusoids, experts": {
        "positions": "sinusoidal", "experts": dataclasses.replace(CROWDED, first_layer=1),
    },
    "rope, window": {
        "positions": "rope", "window": 3, "qk_norm": True, "rope": RopeConfig(interleaved=True),
    },
    "alibi, latent": {"positions": "alibi", "latent": LatentConfig(kv_dim=8, rope_dim=4)},
    "sparse": {"positions": "rope", "sparse": SparseConfig(top_k=2, n_head=2, head_dim=4)},
    "all of them": {
        "positions": "rope", "experts": CROWDED, "latent": LatentConfig(kv_dim=8, rope_dim=4),
        "sparse": SparseConfig(top_k=2, n_head=2, head_dim=4),
    },
}  # fmt: skip
FAMILIES: dict[str, Callable[..., TransformerConfig]] = {
    "gpt": lambda **kind: GPTConfig(**TEXT, **kind),
    "bert": lambda **kind: BertConfig(**TEXT, **kind),
    "encoder-decoder": lambda **kind: EncoderDecoderConfig(
        **TEXT, **kind, n_encoder_layer=2,
        relative_buckets=None if kind.keys() & {"latent", "sparse"} else 6,
    ),
}  # fmt: skip
A, B, T = 7, 5, 12  # tokens of two documents, and of a row


def rows(seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Two documents in one row, and each in its own row followed by other tokens."""
    packed, *others = np.random.default_rng(seed).integers(0, 19, (3, T), np.int32)
    alone = [packed[:first], packed[first:]]
    tokens = [packed] + [
        np.concatenate([x, y[len(x) :]]) for x, y in zip(alone, others, strict=True)
    ]
    mask = np.arange(T)[None] < np.array([[T], [first], [T - first]])
    return np.stack(tokens), mask


def with_segments(mask: np.ndarray, first: int, by_mask: bool) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids of the rows, with a padding mask or with padding as a segment."""
    segments = np.full((3, T), 4, np.int32)
    segments[0, first:] = 1
    if by_mask:
        return segments, mask
    segments[~mask] = 7
    return segments, np.ones((3, T), bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_other_documents_or_padding(
    family: str, kind: str, make: Make, run: Run
) -> None:
    config = FAMILIES[family](**KINDS[kind])
    params = make(config)
    tokens, mask = rows(0, A)
    segments, mask = with_segments(mask, A, family != "gpt")
    texts: tuple[np.ndarray, ...] = (tokens,)
    inputs = {"segment_ids": segments} | ({} if family == "gpt" else {"mask": mask})
    if family == "encoder-decoder":
        source, source_mask = rows(1, B)
        source_segments, source_mask = with_segments(source_mask, B, True)
        texts = (source, tokens)
        inputs |= {"source_segment_ids": source_segments, "source_mask": source_mask}
    packed, first, second = run(config, params, *texts, **inputs)
    np.testing.assert_allclose(packed[:A], first[:A], atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(packed[A:], second[:B], atol=2e-6, rtol=2e-6)
    # As a single document the logits differ.
    inputs |= {name: 0 * x for name, x in inputs.items() if name.endswith("segment_ids")}
    whole = run(config, params, *texts, **inputs)[0]
    assert np.abs(whole[A:] - packed[A:]).max() > 1e-3


IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
PICTURES = ViTConfig(**SIZES, image_size=8, patch_size=2, channels=1, n_classes=5, positions="none")


@pytest.mark.parametrize("kind", ["sinusoids, experts", "all of them"])
def test_images_of_a_batch_are_independent_and_an_empty_batch_works(
    kind: str, make: Make, run: Run
) -> None:
    config = dataclasses.replace(PICTURES, **KINDS[kind])
    params = make(config)
    together = run(config, params, IMAGES)
    other = run(config, params, np.stack([IMAGES[0], 3 - IMAGES[1]]))
    np.testing.assert_allclose(other[0], together[0], atol=1e-6)
    assert np.abs(other[1] - together[1]).max() > 1e-3
    assert shape_of(config, (0, 8, 8, 1)) == (0, 5)


def test_source_order_does_not_matter_without_positions(make: Make, run: Run) -> None:
    config = EncoderDecoderConfig(**TEXT, positions="none", n_encoder_layer=2)
    params = make(config)
    source, tokens = np.random.default_rng(0).integers(0, 19, (2, 2, T), np.int32)
    order = np.random.default_rng(1).permutation(T)
    straight = run(config, params, source, tokens)
    np.testing.assert_allclose(run(config, params, source[:, order], tokens), straight, atol=1e-5)
    # The order of the target matters.
    assert np.abs(run(config, params, source, tokens[:, order]) - straight).max() > 1e-3


@pytest.mark.parametrize("kind", ["alibi, latent", "rope, window", "all of them"])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_inputs_give_empty_outputs(family: str, kind: str) -> None:
    config = FAMILIES[family](**KINDS[kind])
    for batch, length in ((2, 0), (0, 3)):
        assert shape_of(config, (batch, length)) == (batch, length, 19)


def shape_of(config: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the logits; nothing is compiled."""
    data = np.zeros(shape, np.float32 if isinstance(config, ViTConfig) else np.int32)
    texts = (data, data) if isinstance(config, EncoderDecoderConfig) else (data,)
    with jax.transfer_guard("allow"):
        found = jax.eval_shape(lambda: bind(config, init(config, jax.random.key(0)))(*texts))
    return tuple(found.shape)


@pytest.mark.parametrize("family", [*FAMILIES, "vit"])
def test_only_losses_drop_tokens_and_empty_batches_are_finite(family: str, make: Make) -> None:
    kind = KINDS["all of them"]
    config: Any = (
        dataclasses.replace(PICTURES, **kind) if family == "vit" else FAMILIES[family](**kind)
    )
    text = np.random.default_rng(0).integers(0, 19, (2, T), np.int32)
    labels = np.array([1, 3], np.int32) if family == "vit" else text
    data: tuple[np.ndarray, ...] = (IMAGES, labels) if family == "vit" else (text, labels)
    if family == "encoder-decoder":
        data = (text, *data)

    @jax.jit
    def losses(params: Params, data: tuple[jax.Array, ...]) -> Any:
        return bind(config, params).losses(*data)

    params = make(config)
    found = jax.device_get(losses(params, jax.device_put(data)))
    assert found.aux_losses["dropped"] > 0.5
    assert found.aux_losses["indexer_loss"] > 0
    nothing = jax.device_get(losses(params, jax.device_put(tuple(x[:0] for x in data))))
    assert nothing.tokens.size == 0
    assert all(np.isfinite(x) for x in (nothing.penalty, *nothing.aux_losses.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_outside_the_vocabulary_are_clipped_to_it_when_compiled(
    family: str, make: Make, run: Run
) -> None:
    config = FAMILIES[family](**KINDS["learned"])
    params = make(config)
    tokens, mask = rows(0, A)
    segments, mask = with_segments(mask, A, family != "gpt")
    tokens[0, :3] = [-1, 19, 1000]
    inputs = {"segment_ids": segments} | ({} if family == "gpt" else {"mask": mask})
    texts = 1
    if family == "encoder-decoder":
        inputs |= {"source_segment_ids": segments, "source_mask": mask}
        texts = 2
    found = run(config, params, *[tokens] * texts, **inputs)
    clipped = run(config, params, *[np.clip(tokens, 0, 18)] * texts, **inputs)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, clipped)
