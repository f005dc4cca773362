"""GPT: losses, dropout, precision, token ids and edge cases."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, init
from tjx_nn.binding import Params
from tjx_nn.layers.scan_layers import clone_key

Run = Callable[..., np.ndarray]


def test_token_losses_are_log_softmax_of_logits(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    labels = np.roll(jax.device_get(tokens), -1, axis=1)
    labels[0, 3] = -100
    losses = jax.jit(lambda p, t, y: bind(tiny, p).losses(t, y).tokens)(
        params, *jax.device_put((tokens, labels))
    )
    logits = run(tiny, params, tokens).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected[0, 3] = 0
    np.testing.assert_allclose(np.asarray(losses), expected, atol=1e-5)


def test_dropout_is_a_function_of_its_key(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    config = dataclasses.replace(tiny, dropout=0.5)
    with jax.transfer_guard("allow"):
        one, two = jax.random.key(1), jax.random.key(2)
    first = run(config, params, tokens, dropout_key=clone_key(one))
    np.testing.assert_array_equal(first, run(config, params, tokens, dropout_key=one))
    assert np.abs(first - run(config, params, tokens, dropout_key=two)).max() > 1e-2
    # Without a key there is no dropout.
    np.testing.assert_array_equal(run(config, params, tokens), run(tiny, params, tokens))


@pytest.mark.parametrize(("silent", "loud"), [("wte wpe", "blocks"), ("out down", "embeddings")])
def test_embeddings_and_sublayers_both_have_dropout(
    tiny: GPTConfig, params: Params, tokens: jax.Array, silent: str, loud: str
) -> None:
    config = dataclasses.replace(tiny, dropout=0.5)

    @jax.jit
    def hidden(key: jax.Array | None) -> jax.Array:
        def silence(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
            return p * (not {k.key for k in path} & set(silent.split()))

        model = bind(config, jax.tree.map_with_path(silence, params))
        return model.hidden(tokens, dropout_key=key)

    with jax.transfer_guard("allow"):
        key = jax.random.key(1)
    assert np.abs(jax.device_get(hidden(key)) - jax.device_get(hidden(None))).max() > 0.1, loud


def test_half_precision_computation_has_float32_parameters_and_logits(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    config = dataclasses.replace(tiny, dtype="bfloat16")

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        model = bind(config, params)
        assert model.hidden(tokens).dtype == jnp.bfloat16
        assert model(tokens).dtype == jnp.float32
        return model.losses(tokens, tokens).tokens.mean()

    gradients = jax.jit(jax.grad(loss))(params, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
    exact, half = run(tiny, params, tokens), run(config, params, tokens)
    assert 0 < np.abs(exact - half).max() < 0.1 * np.abs(exact).max()


def test_empty_sequence_gives_empty_results(tiny: GPTConfig, params: Params, run: Run) -> None:
    empty = np.zeros((2, 0), np.int32)
    assert run(tiny, params, empty).shape == (2, 0, tiny.vocab_size)
    losses = jax.jit(lambda p, t: bind(tiny, p).losses(t, t).tokens)(params, jax.device_put(empty))
    assert losses.shape == (2, 0)


def test_a_sequence_beyond_max_seq_len_raises(tiny: GPTConfig, params: Params) -> None:
    too_long = np.zeros((1, 17), np.int32)
    with pytest.raises(
        ValueError, match="a sequence of 17 tokens; expected at most max_seq_len 16"
    ):
        jax.jit(lambda p: bind(tiny, p)(too_long))(params)


def test_ids_outside_the_vocabulary(tiny: GPTConfig, params: Params, run: Run) -> None:
    outside = np.array([[0, -3, tiny.vocab_size + 5]], np.int32)
    with pytest.raises(ValueError, match="token ids: got values from -3 to 28; expected 0 to 22"):
        bind(tiny, params)(outside)
    # Compiled code clips ids to the vocabulary.
    clipped = np.clip(outside, 0, tiny.vocab_size - 1)
    np.testing.assert_array_equal(run(tiny, params, outside), run(tiny, params, clipped))


def test_labels_outside_the_vocabulary(tiny: GPTConfig, params: Params, tokens: jax.Array) -> None:
    labels = np.array(tokens)
    labels[0, :2] = tiny.vocab_size, -3

    def losses(params: Params, labels: jax.Array | np.ndarray) -> jax.Array:
        return bind(tiny, params).losses(tokens, labels).tokens

    with pytest.raises(ValueError, match="labels: got values from -3 to 23; expected 0 to 22"):
        jax.eval_shape(lambda params: losses(params, labels), params)
    compiled = jax.jit(losses)
    found = np.asarray(compiled(params, jax.device_put(labels)))
    assert np.isnan(found[0, :2]).all()  # invalid labels are visible in the loss
    ignored = np.where((labels < 0) | (labels >= tiny.vocab_size), np.int32(-100), labels)
    expected = np.where(np.isnan(found), np.float32(0), found)
    np.testing.assert_array_equal(compiled(params, jax.device_put(ignored)), expected)


def test_extreme_weights_stay_finite(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    attention = params["blocks"]["attention"]
    loud = jax.jit(lambda p: jax.tree.map(lambda x: 100 * x, p))(
        {"query": attention["query"], "key": attention["key"]}
    )
    blocks = {**params["blocks"], "attention": {**attention, **loud}}
    assert np.isfinite(run(tiny, {**params, "blocks": blocks}, tokens)).all()


def test_ids_from_tokenizer_size_on_have_probability_0(
    tiny: GPTConfig, params: Params, run: Callable[..., np.ndarray]
) -> None:
    masked = dataclasses.replace(tiny, tokenizer_size=9)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    logits = run(masked, params, tokens)
    np.testing.assert_array_equal(logits[..., :9], run(tiny, params, tokens)[..., :9])
    assert (logits[..., 9:] == -np.inf).all()

    @jax.jit
    def loss(params: Params, tokens: jax.Array) -> Any:
        def mean(params: Params) -> jax.Array:
            return bind(masked, params).losses(tokens, tokens).tokens.mean()

        return jax.value_and_grad(mean)(params)

    value, gradients = jax.device_get(loss(params, jax.device_put(tokens)))
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits[..., :9]).sum(-1)) - chosen
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    assert not gradients["wte"]["embedding"][9:].any()
    with pytest.raises(ValueError, match="tokenizer_size: got 24; expected 1 to vocab_size 23"):
        dataclasses.replace(tiny, tokenizer_size=24)


def test_embeddings_are_scaled_to_sinusoids(tiny: GPTConfig, params: Params) -> None:
    config = dataclasses.replace(tiny, positions="sinusoidal")
    without_table = {name: leaf for name, leaf in params.items() if name != "wpe"}

    @functools.partial(jax.jit, static_argnums=0)
    def stream(config: GPTConfig, params: Params, tokens: jax.Array) -> jax.Array:
        return bind(config, params).embed_tokens(tokens)

    tokens = jax.device_put(np.array([[3, 5, 3]], np.int32))
    unscaled = dataclasses.replace(config, scale_embeddings=False)
    found = [jax.device_get(stream(c, without_table, tokens)) for c in (config, unscaled)]
    rows = jax.device_get(params)["wte"]["embedding"][[3, 5, 3]][None]
    np.testing.assert_allclose(found[0] - found[1], rows * (np.sqrt(24) - 1), atol=1e-5)
    learned = dataclasses.replace(tiny, scale_embeddings=False)
    np.testing.assert_array_equal(*(stream(c, params, tokens) for c in (tiny, learned)))


def test_blocks_read_the_embeddings(tiny: GPTConfig, make: Callable[..., Params]) -> None:
    config = dataclasses.replace(tiny, n_layer=3, embedding_skip=True)
    params = make(config)
    blocks = params["blocks"]
    for sublayer, name in (("attention", "out"), ("mlp", "down")):  # their outputs are 0
        blocks[sublayer][name] = jax.device_put(
            jax.tree.map(np.zeros_like, jax.device_get(blocks[sublayer][name]))
        )

    @jax.jit
    def streams(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        first = model.embed_tokens(tokens)
        return first, model.run_blocks(first, tokens)[0]

    tokens = jax.device_put(np.array([[3, 5, 3]], np.int32))
    first, last = jax.device_get(streams(params, tokens))
    expected = first
    for a, b in jax.device_get(blocks["skip_scale"]):
        expected = a * expected + b * first
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    assert "embedding_skip: got True" in config.pipeline_problems(3)[0]


def reference_logits(
    config: GPTConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray
) -> np.ndarray:
    """Logits of one row by a GPT-2 with `value_mix`, in NumPy and float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    table, length, groups = params["wte"]["embedding"], len(tokens), config.n_head // 2

    def norm(x: np.ndarray, p: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(x: np.ndarray, p: Any) -> Any:
        return x @ p["kernel"] + p["bias"]

    index = np.arange(length)
    starts = np.r_[True, segment_ids[1:] != segment_ids[:-1]]
    x = table[tokens] + params["wpe"]["embedding"][index - index[starts][starts.cumsum() - 1]]
    hidden = (segment_ids[:, None] != segment_ids) | (index[:, None] < index)
    shared = params["value_embeddings"]["embedding"][tokens] if "value_embeddings" in params else 0
    for number in range(config.n_layer):
        block = jax.tree.map(lambda p, i=number: p[i], params["blocks"])
        heads = block["attention"]
        h = norm(x, block["ln_1"])
        v = linear(h, heads["value"])
        if config.value_mix == "first_block" and number == 0:
            shared = v
        a, b = block["value_scale"]
        q, k, v = linear(h, heads["query"]), linear(h, heads["key"]), a * v + b * shared
        q, k, v = (y.reshape(length, -1, config.head_dim).swapaxes(0, 1) for y in (q, k, v))
        scores = q @ k.repeat(groups, 0).swapaxes(1, 2) / np.sqrt(config.head_dim)
        weights = np.exp(np.where(hidden, -np.inf, scores))
        out = weights / weights.sum(-1, keepdims=True) @ v.repeat(groups, 0)
        x = x + linear(out.swapaxes(0, 1).reshape(length, -1), heads["out"])
        h = linear(norm(x, block["ln_2"]), block["mlp"]["up"])
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        x = x + linear(h, block["mlp"]["down"])
    logits: np.ndarray = norm(x, params["ln_f"]) @ table.T
    return logits


@pytest.mark.parametrize("source", ["first_block", "embedding"])
def test_values_are_mixed_with_shared_values(
    source: Any, tiny: GPTConfig, make: Callable[..., Params], run: Run
) -> None:
    config = dataclasses.replace(tiny, n_layer=3, value_mix=source)
    params = make(config)
    tokens = np.random.default_rng(0).integers(0, tiny.vocab_size, (1, 12), np.int32)
    segment_ids = np.repeat(np.array([[4, 2]], np.int32), [5, 7], axis=1)
    found = run(config, params, tokens, segment_ids=segment_ids)
    expected = reference_logits(config, jax.device_get(params), tokens[0], segment_ids[0])
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert f"value_mix: got '{source}'" in config.pipeline_problems(3)[0]


def test_value_embeddings_start_with_the_scale_of_values(tiny: GPTConfig) -> None:
    # Neither depends on the width with muP.
    config = dataclasses.replace(tiny, vocab_size=499, value_mix="embedding", mup_base=6)
    with jax.transfer_guard("allow"):
        params = jax.device_get(init(config, jax.random.key(0)))
    x = np.random.default_rng(0).standard_normal((499, 24))
    values = x @ params["blocks"]["attention"]["value"]["kernel"][0]
    rows = params["value_embeddings"]["embedding"]
    assert rows.shape == (499, 12)
    np.testing.assert_allclose(rows.std(), 0.02 * np.sqrt(6), rtol=0.05)
    np.testing.assert_allclose(rows.std(), values.std(), rtol=0.2)
    np.testing.assert_array_equal(params["blocks"]["value_scale"], np.full((2, 2), 0.5))


def test_check_ids_raises_inside_jit(
    tiny: GPTConfig, params: Params, run: Callable[..., np.ndarray]
) -> None:
    tokens = np.array([[1, 2, tiny.vocab_size]], np.int32)
    assert np.isfinite(run(tiny, params, tokens)).all()  # clipped, silently
    checked = dataclasses.replace(tiny, check_ids=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="token ids: got values from 1 to 23"):
        run(checked, params, tokens)
    with pytest.raises(jax.errors.JaxRuntimeError, match="positions: got values from 0 to 99"):
        run(checked, params, tokens - 1, positions=np.array([[0, 1, 99]], np.int32))
    np.testing.assert_array_equal(run(checked, params, tokens - 1), run(tiny, params, tokens - 1))
