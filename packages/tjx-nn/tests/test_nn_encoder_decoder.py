"""Encoder-decoder: masks, decoding with a cache, packing, losses and training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    EncoderDecoder,
    EncoderDecoderConfig,
    LatentConfig,
    bind,
    count_params,
    flops_per_token,
    init,
    logical_axes,
)
from tjx_nn.attention.kv_cache import prefill_cache
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]
Descend = Callable[..., list[float]]

# Every option that adds a parameter; no two sizes alike.
TINY = EncoderDecoderConfig(
    vocab_size=23, source_vocab_size=19, max_seq_len=16, n_layer=2, n_encoder_layer=1, n_head=4,
    n_kv_head=2, d_model=24, positions="learned", embedding_norm=True, logit_bias=True,
    logit_scale=1.5, relative_buckets=6, relative_max_distance=9, tied_head=False,
)  # fmt: skip
MODERN = EncoderDecoderConfig(
    vocab_size=23, max_seq_len=16, n_layer=1, n_encoder_layer=2, n_head=4, d_model=24,
    positions="rope", norm="rmsnorm", norm_position="pre", activation="swiglu", bias=False,
    qk_norm=True, layer_scale=0.5,
)  # fmt: skip
PLAIN = EncoderDecoderConfig(
    vocab_size=19, max_seq_len=16, n_layer=1, n_encoder_layer=1, n_head=4, d_model=24
)
SOURCE_MASK = np.arange(16)[None] < np.array([[9], [16]])
MASK = np.arange(12)[None] < np.array([[7], [12]])


@pytest.fixture(scope="module")
def params(make: Callable[..., Params]) -> Params:
    return make(TINY)


@pytest.fixture
def source() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 19, (2, 16), np.int32)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 19, (2, 12), np.int32)


def test_padding_on_both_sides_changes_nothing(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    masks = {"source_mask": SOURCE_MASK, "mask": MASK}
    expected = run(TINY, params, source, tokens, **masks)
    other_source = np.where(SOURCE_MASK, source, (source + 7) % 19)
    other = np.where(MASK, tokens, (tokens + 7) % 19)
    found = run(TINY, params, other_source, other, **masks)
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=1e-5)
    # Without masks the first row attends to its padding.
    seen = run(TINY, params, other_source, other) - run(TINY, params, source, tokens)
    assert np.abs(seen[0, :7]).max() > 1e-2
    plain = run(TINY, params, source, tokens)
    np.testing.assert_allclose(plain[1], expected[1], atol=1e-5)


def test_a_source_of_padding_is_ignored(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    nothing = np.array([[False], [True]]).repeat(16, 1)
    masks = {"source_mask": nothing, "mask": np.ones((2, 12), bool)}
    found = run(TINY, params, source, tokens, **masks)
    assert np.isfinite(found).all()
    other = run(TINY, params, (source + 7) % 19, tokens, **masks)
    np.testing.assert_array_equal(other[0], found[0])
    assert np.abs(other[1] - found[1]).max() > 1e-2


def test_targets_attend_to_the_past_and_the_whole_source(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    expected = run(TINY, params, source, tokens)
    later = tokens.copy()
    later[:, 5] = (later[:, 5] + 1) % 19
    change = np.abs(run(TINY, params, source, later) - expected).max((0, 2))
    assert change[:5].max() < 1e-5
    assert change[5:].min() > 1e-4
    last = source.copy()
    last[:, -1] = (last[:, -1] + 1) % 19
    assert np.abs(run(TINY, params, last, tokens) - expected).max((0, 2)).min() > 1e-4


def test_segments_of_one_side_raise(source: np.ndarray, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected both or neither"):
        abstract(TINY, lambda m: m(source, tokens, segment_ids=tokens))


@pytest.mark.parametrize("config", [TINY, MODERN], ids=["tiny", "modern"])
def test_decoding_with_a_cache_equals_the_forward_pass(
    config: EncoderDecoderConfig,
    make: Callable[..., Params],
    source: np.ndarray,
    tokens: np.ndarray,
    run: Run,
) -> None:
    params = make(config)

    @jax.jit
    def step_by_step(params: Params, source: Any, mask: Any, tokens: Any) -> tuple[jax.Array, ...]:
        model = bind(config, params)
        memory = model.encode(source, source_mask=mask)
        blocks = model.unstacked_blocks()

        def read(beginning: jax.Array, slots: int) -> Any:
            x, cache = model.prefill(blocks, beginning, memory, mask)
            lengths = jnp.full(2, beginning.shape[1])
            return x, [prefill_cache(entries, lengths, slots) for entries in cache]

        def step(cache: Any, at: tuple[jax.Array, jax.Array]) -> Any:
            token, position = at
            logits, cache = model.decode(blocks, token[:, None], position[:, None], cache)
            return cache, logits[:, 0]

        positions = jnp.broadcast_to(jnp.arange(12)[:, None], (12, 2))
        start = read(tokens[:, :0], 13)[1]
        _, slow = jax.lax.scan(step, start, (tokens.T, positions))
        x, cache = read(tokens[:, :5], 12)
        first = model.logits(x)
        rest, _ = model.decode(blocks, tokens[:, 5:], positions[5:].T, cache)
        return slow.swapaxes(0, 1), jnp.concatenate([first, rest], 1)

    slow, fast = jax.device_get(
        step_by_step(params, *jax.device_put((source, SOURCE_MASK, tokens)))
    )
    inputs = {"source_mask": SOURCE_MASK, "mask": np.ones((2, 12), bool)}
    expected = run(config, params, source, tokens, **inputs)
    np.testing.assert_allclose(slow, expected, atol=1e-5)
    np.testing.assert_allclose(fast, expected, atol=1e-5)


def test_losses_are_log_softmax_of_logits(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    labels = np.where(np.arange(12) % 4 == 0, -100, np.roll(tokens, -1, 1))
    losses = jax.jit(lambda p, *ids: bind(TINY, p).losses(*ids).tokens)(
        params, *jax.device_put((source, tokens, labels))
    )
    found = run(TINY, params, source, tokens).astype(np.float64)
    log_probs = found - np.log(np.exp(found).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.device_get(losses), expected * (labels != -100), atol=1e-5)


def test_scaled_embeddings_equal_a_scaled_table(source: np.ndarray) -> None:
    @jax.jit
    def both(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = init(PLAIN, key)
        large = {**params, "wte": {"embedding": params["wte"]["embedding"] * np.sqrt(24.0)}}
        unscaled = dataclasses.replace(PLAIN, scale_embeddings=False)
        return bind(PLAIN, params).encode(source), bind(unscaled, large).encode(source)

    with jax.transfer_guard("allow"):
        scaled, larger = jax.device_get(both(jax.random.key(0)))
    np.testing.assert_allclose(scaled, larger, atol=1e-5)


def test_scanned_layers_equal_unrolled_layers(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    unrolled = run(dataclasses.replace(TINY, scan_layers=False), params, source, tokens)
    np.testing.assert_allclose(unrolled, run(TINY, params, source, tokens), atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, MODERN], ids=["plain", "modern"])
def test_learns_a_fixed_batch(
    config: EncoderDecoderConfig,
    make: Callable[..., Params],
    source: np.ndarray,
    tokens: np.ndarray,
    descend: Descend,
) -> None:
    # The source of the last row is only padding.
    source, tokens = (np.concatenate([x, x[:1]]) for x in (source, tokens))
    labels = np.where(np.concatenate([MASK, MASK[:1]]), np.roll(tokens, -1, 1), -100)
    source_mask = np.pad(SOURCE_MASK, ((0, 1), (0, 0)))

    def loss(params: Params) -> jax.Array:
        model = bind(config, params)
        return model.losses(source, tokens, labels, source_mask=source_mask).tokens.mean()

    losses = descend(loss, make(config))
    assert losses[0] > losses[10] > losses[-1]
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_a_function_of_its_key(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    config = dataclasses.replace(TINY, dropout=0.5, attention_dropout=0.1)
    with jax.transfer_guard("allow"):
        one, two = jax.random.key(1), jax.random.key(2)
    first = run(config, params, source, tokens, dropout_key=one)
    np.testing.assert_array_equal(first, run(config, params, source, tokens, dropout_key=one))
    assert np.abs(first - run(config, params, source, tokens, dropout_key=two)).max() > 1e-2


def test_empty_sequences_give_finite_or_empty_results(
    params: Params, source: np.ndarray, tokens: np.ndarray, run: Run
) -> None:
    assert run(TINY, params, source, tokens[:, :0]).shape == (2, 0, 23)
    assert np.isfinite(run(TINY, params, source[:, :0], tokens)).all()


def abstract(config: EncoderDecoderConfig, call: Callable[[EncoderDecoder], Any]) -> Any:
    """Shapes and dtypes of a call; nothing is compiled."""

    def build() -> Any:
        return call(bind(config, init(config, jax.random.key(0))))

    with jax.transfer_guard("allow"):
        return jax.eval_shape(build)


def test_invalid_inputs_raise(tokens: np.ndarray) -> None:
    long, outside = np.zeros((1, 17), np.int32), np.full((2, 3), 20, np.int32)
    with pytest.raises(ValueError, match="17 tokens; expected at most max_seq_len 16"):
        abstract(TINY, lambda m: m(long, tokens[:1]))
    with pytest.raises(ValueError, match="17 tokens; expected at most max_seq_len 16"):
        abstract(TINY, lambda m: m(tokens[:1], long))
    with pytest.raises(ValueError, match=r"token ids: got values from 20 to 20;.*vocab_size is 19"):
        abstract(TINY, lambda m: m(outside, tokens))  # valid ids of the target only
    assert abstract(TINY, lambda m: m(tokens, outside)).shape == (2, 3, 23)
    with pytest.raises(ValueError, match=r"stop_id: got 40;.*vocab_size is 23\nparallel_block"):
        dataclasses.replace(TINY, stop_id=40, parallel_block=True)
    with pytest.raises(
        ValueError, match=r"even number.*\nrelative_max_distance: got 2.*\n.*latent"
    ):
        dataclasses.replace(
            TINY, n_kv_head=None, relative_buckets=5, relative_max_distance=2,
            latent=LatentConfig(kv_dim=8, rope_dim=2),
        )  # fmt: skip


def test_half_precision_gives_float32_logits(source: np.ndarray, tokens: np.ndarray) -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    shapes = abstract(config, lambda m: (m(source, tokens), m.encode(source)))
    assert [s.dtype for s in shapes] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("config", [TINY, MODERN, PLAIN], ids=["tiny", "modern", "plain"])
def test_parameters_are_counted_by_formula_and_have_named_axes(
    config: EncoderDecoderConfig,
) -> None:
    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    axes = logical_axes(config)
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
        axes, shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    assert axes["decoder"]["blocks"]["cross"]["key"]["kernel"] == ("layers", "embed", "kv_heads")


def test_flops_counted_by_hand() -> None:
    config = EncoderDecoderConfig(
        vocab_size=3, max_seq_len=4, n_layer=1, n_encoder_layer=2, n_head=1, d_model=2, bias=False,
        stop_id=1,
    )  # fmt: skip
    block = 4 * 2 * 2 + 2 * 2 * 8 + 2 * 2  # attention, MLP, norms
    met = 3 * block + (4 * 2 * 2 + 2) + 3 * 2  # cross attention and its norm, and the head
    assert flops_per_token(config, 4) == 6 * met + 4 * 12 * 4 * 2
