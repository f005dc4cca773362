"""BERT: padding, packing, token order, losses, classification and training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    Bert,
    BertConfig,
    GPTConfig,
    RopeConfig,
    bind,
    count_params,
    init,
    logical_axes,
)
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]
Descend = Callable[..., list[float]]

TINY = BertConfig(
    vocab_size=23, max_seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=24, n_classes=3
)
MODERN = dataclasses.replace(
    TINY, positions="rope", norm="rmsnorm", norm_position="pre", activation="swiglu", bias=False,
    n_token_types=0, n_classes=None,
)  # fmt: skip
LOCAL = dataclasses.replace(
    MODERN, n_layer=4, norm="layernorm", first_norm=False, activation="geglu_erf", logit_bias=True,
    rope=RopeConfig(base=1000.0, local_base=10.0), window=3, symmetric_window=True,
    global_every=3, global_first=True,
)  # fmt: skip
LENGTHS = np.array([[11], [16]])
# Parameters of BertForMaskedLM and ModernBertForMaskedLM of transformers.
HUGGING_FACE = {
    "bert_base": 109_514_298, "modernbert_base": 149_655_232, "modernbert_large": 395_881_664,
}  # fmt: skip
MASK = np.arange(16)[None] < LENGTHS


@pytest.fixture(scope="module")
def params(make: Callable[..., Params]) -> Params:
    return make(TINY)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 23, (2, 16), np.int32)


def test_padding_changes_nothing(params: Params, tokens: np.ndarray, run: Run) -> None:
    expected = run(TINY, params, tokens, mask=MASK)
    other = np.where(MASK, tokens, (tokens + 7) % 23)
    np.testing.assert_allclose(run(TINY, params, other, mask=MASK)[MASK], expected[MASK], atol=1e-5)
    # A padded row equals the shorter row; a full row equals one without a mask.
    short = run(TINY, params, tokens[:1, :11])
    np.testing.assert_allclose(expected[:1, :11], short, atol=1e-5)
    plain = run(TINY, params, tokens)
    np.testing.assert_allclose(plain[1], expected[1], atol=1e-5)
    assert np.abs(plain[0, :11] - short).max() > 1e-2  # without a mask padding matters


def test_a_row_of_padding_alone_is_finite(params: Params, tokens: np.ndarray, run: Run) -> None:
    mask = np.array([[False], [True]]).repeat(16, 1)
    found = run(TINY, params, tokens, mask=mask)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], run(TINY, params, tokens)[1], atol=1e-5)


def test_without_positions_order_does_not_matter(
    make: Callable[..., Params], tokens: np.ndarray, run: Run
) -> None:
    config = dataclasses.replace(TINY, positions="none")
    params = make(config)
    order = np.random.default_rng(1).permutation(16)
    straight, mixed = run(config, params, tokens), run(config, params, tokens[:, order])
    np.testing.assert_allclose(mixed, straight[:, order], atol=1e-5)


def test_losses_are_log_softmax_of_logits(params: Params, tokens: np.ndarray, run: Run) -> None:
    labels = np.where(np.arange(16) % 3 == 0, np.roll(tokens, 3, 1), -100)
    losses = jax.jit(lambda p, t, y: bind(TINY, p).losses(t, y).tokens)(
        params, *jax.device_put((tokens, labels))
    )
    logits = run(TINY, params, tokens).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.device_get(losses), expected * (labels != -100), atol=1e-5)


def test_class_logits_depend_on_the_first_token_and_the_tokens_that_it_attends_to(
    params: Params, tokens: np.ndarray
) -> None:
    @jax.jit
    def classify(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return bind(TINY, params).classify(tokens, mask=mask)

    found = jax.device_get(classify(*jax.device_put((tokens, MASK))))
    assert found.shape == (2, 3)
    last = tokens.copy()
    last[:, -1] = (last[:, -1] + 1) % 23  # padding in the first row
    changed = jax.device_get(classify(*jax.device_put((last, MASK))))
    np.testing.assert_allclose(changed[0], found[0], atol=1e-6)
    assert np.abs(changed[1] - found[1]).max() > 1e-4

    with pytest.raises(ValueError, match="n_classes: got None"):
        abstract(dataclasses.replace(TINY, n_classes=None), lambda m: m.classify(tokens))
    with pytest.raises(ValueError, match="got an empty sequence"):
        abstract(TINY, lambda m: m.classify(tokens[:, :0]))


@pytest.mark.parametrize("config", [TINY, LOCAL], ids=["bert", "local"])
def test_scanned_layers_equal_unrolled_layers(
    config: BertConfig, make: Callable[..., Params], tokens: np.ndarray, run: Run
) -> None:
    params = make(config)
    unrolled = run(dataclasses.replace(config, scan_layers=False), params, tokens)
    np.testing.assert_allclose(unrolled, run(config, params, tokens), atol=1e-5)


def test_a_symmetric_window_ends_on_both_sides(
    make: Callable[..., Params], tokens: np.ndarray, run: Run
) -> None:
    other = tokens.copy()
    other[:, 8] = (other[:, 8] + 1) % 23

    def changed(**fields: Any) -> list[int]:
        config = dataclasses.replace(LOCAL, n_layer=2, **fields)
        params = make(config)
        difference = np.abs(run(config, params, other) - run(config, params, tokens))
        return [int(i) for i in np.flatnonzero(difference.max((0, 2)) > 1e-6)]

    # Two blocks of two tokens to each side; a window alone bounds the tokens before.
    local: dict[str, Any] = {"global_every": None, "global_first": False}
    assert changed(**local) == list(range(4, 13))
    assert changed(**local, symmetric_window=False) == list(range(13))
    assert changed() == list(range(16))  # the first block is global
    assert LOCAL.windows == (None, 3, 3, None)
    with pytest.raises(ValueError, match="symmetric_window: got True with window None"):
        dataclasses.replace(LOCAL, window=None)
    with pytest.raises(ValueError, match="symmetric_window: got True; expected False"):
        GPTConfig(window=4, symmetric_window=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"norm_position": "post"}, "first_norm: got False with norm_position 'post'"),
        ({"n_layer": 1}, "first_norm: got False with n_layer 1"),
    ],
)
def test_models_without_a_first_norm_are_checked(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(LOCAL, **fields)
    (problem,) = LOCAL.pipeline_problems(2)
    assert problem.startswith("first_norm: got False")


@pytest.mark.parametrize("config", [TINY, MODERN, LOCAL], ids=["bert", "modern", "local"])
def test_learns_a_fixed_batch(
    config: BertConfig, make: Callable[..., Params], tokens: np.ndarray, descend: Descend
) -> None:
    labels = np.where(np.arange(16) % 3 == 0, tokens, -100)
    hidden = np.where(labels < 0, tokens, 3)
    # A row of padding fills the batch and has no loss.
    hidden, labels = (np.pad(x, ((0, 1), (0, 0)), constant_values=-100) for x in (hidden, labels))
    mask = np.pad(MASK, ((0, 1), (0, 0)))

    def loss(params: Params) -> jax.Array:
        return bind(config, params).losses(np.maximum(hidden, 0), labels, mask=mask).tokens.mean()

    losses = descend(loss, make(config))
    assert losses[0] > losses[10] > losses[-1]
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_a_function_of_its_key(params: Params, tokens: np.ndarray, run: Run) -> None:
    config = dataclasses.replace(TINY, dropout=0.5, attention_dropout=0.1)
    with jax.transfer_guard("allow"):
        one, two = jax.random.key(1), jax.random.key(2)
    first = run(config, params, tokens, dropout_key=one)
    np.testing.assert_array_equal(first, run(config, params, tokens, dropout_key=one))
    assert np.abs(first - run(config, params, tokens, dropout_key=two)).max() > 1e-2


def abstract(config: BertConfig, call: Callable[[Bert], Any]) -> Any:
    """Shapes and dtypes of a call; nothing is compiled."""

    def build() -> Any:
        return call(bind(config, init(config, jax.random.key(0))))

    with jax.transfer_guard("allow"):
        return jax.eval_shape(build)


def test_invalid_inputs_raise(tokens: np.ndarray) -> None:
    long, types = np.zeros((1, 17), np.int32), np.full((2, 16), 2, np.int32)
    with pytest.raises(ValueError, match="17 tokens; expected at most max_seq_len 16"):
        abstract(TINY, lambda m: m(long))
    with pytest.raises(
        ValueError, match=r"token types: got values from 2 to 2;.*n_token_types is 2"
    ):
        abstract(TINY, lambda m: m(tokens, token_types=types))
    with pytest.raises(ValueError, match="n_token_types is 0"):
        abstract(MODERN, lambda m: m(tokens, token_types=types))
    with pytest.raises(ValueError, match="token ids: got values from 23 to 23"):
        abstract(TINY, lambda m: m(np.full((1, 3), 23, np.int32)))
    with pytest.raises(ValueError, match=r"pad_id: got 30;.*vocab_size is 23"):
        dataclasses.replace(TINY, pad_id=30)


def test_half_precision_gives_float32_logits(tokens: np.ndarray) -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    shapes = abstract(config, lambda m: (m(tokens), m.hidden(tokens), m.classify(tokens)))
    assert [s.dtype for s in shapes] == [jnp.float32, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    "config",
    [TINY, MODERN, LOCAL, *map(BertConfig.preset, HUGGING_FACE)],
    ids=["tiny", "modern", "local", *HUGGING_FACE],
)
def test_parameters_are_counted_by_formula_and_have_named_axes(config: BertConfig) -> None:
    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for name, count in HUGGING_FACE.items():
        if config == BertConfig.preset(name):
            assert count_params(config) == count
    axes = logical_axes(config)
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
        axes, shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    assert axes["encoder"]["blocks"]["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")
