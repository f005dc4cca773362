"""Accumulation over microbatches equals one large batch for any counts of real tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import accumulate_gradients, split_microbatches

ROWS, LENGTH, WIDTH, VOCAB = 24, 8, 6, 11


def loss_sum(params: Any, batch: Any) -> Any:
    """A token model: embed, mix, drop out by a key per row, and score the labels >= 0."""
    x_BTD = params["embedding"][batch["tokens"]]
    x_BTD = jnp.tanh(x_BTD @ params["kernel"] + params["bias"][None, None, :])
    # As data: the same batch is computed several times, and each key may be used once.
    keys = jax.random.wrap_key_data(batch["key"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, x_BTD.shape[1:]))(keys)
    logits_BTV = jnp.where(keep, x_BTD / 0.8, 0.0) @ params["embedding"].T
    real_BT = batch["labels"] >= 0
    labels_BT = jnp.where(real_BT, batch["labels"], 0)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    nll_BT = -jnp.take_along_axis(logp_BTV, labels_BT[..., None], axis=-1)[..., 0]
    hits_BT = real_BT & (logp_BTV.argmax(-1) == labels_BT)
    return jnp.where(real_BT, nll_BT, 0.0).sum(), (real_BT.sum(), {"accuracy": hits_BT.sum()})


@jax.jit
def accumulated(params: Any, microbatches: Any) -> Any:
    return accumulate_gradients(loss_sum, params, microbatches)


@jax.jit
def scaled(params: Any, microbatches: Any, loss_scale: Any) -> Any:
    return accumulate_gradients(loss_sum, params, microbatches, loss_scale=loss_scale)


@jax.jit
def in_one_piece(params: Any, batch: Any) -> Any:
    def mean(params: Any) -> Any:
        total, (count, sums) = loss_sum(params, batch)
        return total / count, sums["accuracy"] / count

    return jax.value_and_grad(mean, has_aux=True)(params)


def make_problem(seed: int, real_tokens: Any) -> Any:
    """Make parameters and a batch whose row r has ``real_tokens[r]`` labels; the rest is -100."""
    rng = np.random.default_rng(seed)
    params = {
        "embedding": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "bias": rng.normal(size=WIDTH).astype(np.float32),
    }
    labels = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    labels[np.arange(LENGTH)[None, :] >= np.asarray(real_tokens)[:, None]] = -100
    batch = {"tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32), "labels": labels}
    params, batch = jax.device_put((params, batch))
    with jax.transfer_guard("allow"):
        batch["key"] = jax.random.key_data(jax.random.split(jax.random.key(seed), ROWS))
    return params, batch


def relative_difference(got: Any, want: Any) -> Any:
    """Norm of the difference of two trees over the norm of the second, in float64."""
    got, want = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (got, want)
    )
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def split(batch: Any, k: int) -> Any:
    with jax.transfer_guard("allow"):
        return split_microbatches(batch, k)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_microbatches_with_unequal_counts_equal_one_large_batch(
    k: int, seed: int, data: Any
) -> None:
    counts = st.lists(st.sampled_from([0, 0, 1, LENGTH]), min_size=ROWS, max_size=ROWS)
    real_tokens = data.draw(counts.filter(any))
    params, batch = make_problem(seed, real_tokens)

    out = accumulated(params, split(batch, k))

    (loss, accuracy), gradients = in_one_piece(params, batch)
    assert int(out.token_count) == sum(real_tokens)
    np.testing.assert_allclose(np.asarray(out.loss), np.asarray(loss), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out.means["accuracy"]), np.asarray(accuracy), rtol=1e-6)
    assert relative_difference(out.gradients, gradients) < 1e-6


def test_every_real_token_has_the_same_weight() -> None:
    # One microbatch of 96 real tokens and one of a single real token: the mean of means would
    # give that token half of the gradient.
    params, batch = make_problem(1, [LENGTH, 0] * 12)
    labels = np.array(batch["labels"])
    labels[1, 0] = 3
    batch["labels"] = jax.device_put(labels)

    out = accumulated(params, split(batch, 2))

    (loss, _), gradients = in_one_piece(params, batch)
    np.testing.assert_allclose(np.asarray(out.loss), np.asarray(loss), rtol=1e-6)
    assert relative_difference(out.gradients, gradients) < 1e-6
    counts = (np.asarray(split(batch, 2)["labels"]) >= 0).sum(axis=(1, 2))
    assert counts.tolist() == [96, 1]


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-9])
def test_a_loss_scale_changes_no_bit_of_the_result(scale: float) -> None:
    params, batch = make_problem(2, [LENGTH, 1, 0] * 8)
    microbatches = split(batch, 3)

    out = scaled(params, microbatches, jax.device_put(np.float32(scale)))

    plain = accumulated(params, microbatches)
    jax.tree.map(
        lambda got, want: np.testing.assert_array_equal(np.asarray(got), np.asarray(want)),
        out,
        plain,
    )


def test_a_loss_scale_prevents_underflow_in_float16() -> None:
    # 2^-26 is below half of float16's smallest number, 2^-24.
    def loss(scale: Any, batch: Any) -> Any:
        narrow = scale.astype(jnp.float16) * batch["x"]
        return narrow.astype(jnp.float32).sum() * 2.0**-26, (jnp.int32(1), {})

    step = jax.jit(lambda p, m, s: accumulate_gradients(loss, p, m, loss_scale=s).gradients)
    one = jax.device_put(np.float32(1.0))
    microbatches = {"x": jax.device_put(np.ones((2, 1), np.float16))}

    gradients = [
        float(step(one, microbatches, jax.device_put(np.float32(factor))))
        for factor in (1.0, 2.0**10, 2.0**43)
    ]

    assert gradients[0] == 0.0
    assert gradients[1] == 2.0**-26
    assert gradients[2] == np.inf


def test_a_batch_of_padding_has_zero_loss_and_zero_gradients() -> None:
    params, batch = make_problem(0, [0] * ROWS)

    out = accumulated(params, split(batch, 2))

    assert float(out.loss) == 0.0
    assert int(out.token_count) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(out.gradients))


def test_new_values_do_not_recompile_accumulation() -> None:
    compilations = []

    @jax.jit
    def step(params: Any, microbatches: Any) -> Any:
        compilations.append(1)
        return accumulate_gradients(loss_sum, params, microbatches)

    for seed, real in ((0, [LENGTH] * ROWS), (1, [1] * ROWS), (2, [0] * ROWS)):
        params, batch = make_problem(seed, real)
        step(params, split(batch, 3))

    assert len(compilations) == 1


def test_one_microbatch_has_no_loop_and_many_have_one() -> None:
    def loops(k: int) -> Any:
        params, batch = make_problem(0, [LENGTH] * ROWS)
        microbatches = split({name: batch[name] for name in ("tokens", "labels")}, k)

        def without_dropout(params: Any, batch: Any) -> Any:
            x_BTD = params["embedding"][batch["tokens"]] @ params["kernel"]
            return (x_BTD**2).sum(), ((batch["labels"] >= 0).sum(), {})

        jaxpr = jax.make_jaxpr(lambda p, m: accumulate_gradients(without_dropout, p, m))(
            params, microbatches
        )
        return str(jaxpr).count("scan[")

    assert loops(1) == 0
    assert loops(4) == 1


def test_sums_of_bfloat16_gradients_are_kept_in_float32() -> None:
    # 1 + 256 * 2^-8: in bfloat16 every term after the first would be lost.
    def loss(scale: Any, batch: Any) -> Any:
        return (scale * batch["x"]).sum(), (batch["x"].size * jnp.int32(1), {})

    x = np.full((257, 1), 2.0**-8, np.float32)
    x[0] = 1.0
    with jax.transfer_guard("allow"):
        scale = jnp.ones((), jnp.bfloat16)
        microbatches = {"x": jnp.asarray(x, jnp.bfloat16)}
    out = jax.jit(lambda s, m: accumulate_gradients(loss, s, m))(scale, microbatches)

    assert out.gradients.dtype == jnp.float32
    np.testing.assert_allclose(float(out.gradients), 2.0 / 257, rtol=1e-6)


def test_microbatches_partition_the_rows() -> None:
    rows = np.arange(24)
    parts = split_microbatches({"tokens": rows}, 8)["tokens"]

    assert parts.shape == (8, 3)
    assert sorted(parts.ravel()) == list(rows)
    # A device that holds rows 0..11 or 12..23 has some of each microbatch.
    assert all((part < 12).any() and (part >= 12).any() for part in parts)


@pytest.mark.parametrize("k", [0, -1, 5, 48])
def test_a_count_that_does_not_divide_the_batch_raises(k: int) -> None:
    with pytest.raises(
        ValueError, match=f"accumulation: got {k}; expected a divisor of the batch of 24"
    ):
        split_microbatches({"tokens": np.zeros(24)}, k)


def test_microbatches_of_unequal_number_raise() -> None:
    params, batch = make_problem(0, [LENGTH] * ROWS)
    microbatches = {**split(batch, 2), "labels": split(batch, 3)["labels"]}
    with pytest.raises(ValueError, match="expected a common first axis"):
        accumulate_gradients(loss_sum, params, microbatches)
