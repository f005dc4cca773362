"""Multi-token prediction: losses of the token after next by formula in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import tjx_nn.layers.block as block_module
import tjx_nn.layers.embedding as embedding_module
from tjx_nn import GPTConfig, bind, init
from tjx_nn.binding import Params
from tjx_nn.layers.dropout import dropout

# A window of the last block alone, and rows of the table that no token has.
CONFIG = GPTConfig(
    vocab_size=19, max_seq_len=64, n_layer=2, n_head=2, d_model=8, d_ff=12, positions="rope",
    norm="rmsnorm", activation="relu2", bias=False, tied_head=False, vocab_multiple=8, window=3,
    global_every=2, global_first=True, logit_scale=1.5, logit_soft_cap=4.0, z_loss=0.1,
    multi_token_loss=0.3,
)  # fmt: skip
ROWS, LENGTH, IGNORED = 3, 12, -100


def batch() -> dict[str, np.ndarray]:
    """Packed documents with positions of their own; rows with 12, 8 and 2 labels."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 19, (ROWS, LENGTH + 1), np.int32)
    labels = tokens[:, 1:].copy()
    labels[1, [0, 4, 5, 9]] = labels[2, 2:] = IGNORED
    segment_ids = np.repeat(np.array([[5, 2], [0, 1], [3, 3]], np.int32), [5, 7], axis=1)
    return {
        "tokens": tokens[:, :-1], "labels": labels, "segment_ids": segment_ids,
        "positions": np.cumsum(rng.integers(1, 4, (ROWS, LENGTH)), 1).astype(np.int32),
    }  # fmt: skip


@partial(jax.jit, static_argnums=0)
def compute(config: GPTConfig, params: Params, inputs: dict[str, Any]) -> Any:
    return bind(config, params).losses(**inputs)


def norm(x: np.ndarray, p: Any) -> Any:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def rotate(x_THC: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embeddings of heads of 4 features."""
    angles = positions[:, None] * 10000.0 ** np.array([0.0, -0.5])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x_THC[..., :2], x_THC[..., 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def block(x: np.ndarray, p: Any, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
    h = norm(x, p["ln_1"])
    q, k, v = (
        (h @ p["attention"][name]["kernel"]).reshape(LENGTH, 2, 4)
        for name in ("query", "key", "value")
    )
    scores = np.einsum("tnh,snh->nts", rotate(q, positions), rotate(k, positions)) / 2
    weights = np.exp(np.where(visible, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("nts,snh->tnh", weights, v).reshape(LENGTH, 8)
    x = x + out @ p["attention"]["out"]["kernel"]
    h = np.maximum(norm(x, p["ln_2"]) @ p["mlp"]["up"]["kernel"], 0) ** 2
    found: np.ndarray = x + h @ p["mlp"]["down"]["kernel"]
    return found


def cross_entropies(params: Any, hidden: np.ndarray) -> Any:
    """Negative log-probabilities of the ids of the vocabulary, [tokens, ids]."""
    table = params.get("head", params["wte"])["embedding"][:19]
    logits = 4 * np.tanh(1.5 * hidden @ table.T / 4)
    return np.log(np.exp(logits).sum(-1, keepdims=True)) - logits


def reference_row(params: Any, row: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Cross-entropies of the labels of a row, and the sum of those of the token after next."""
    index, segment_ids, positions = np.arange(LENGTH), row["segment_ids"], row["positions"]
    causal = (segment_ids[:, None] == segment_ids) & (index[:, None] >= index)
    local = causal & (index[:, None] - index < 3)
    blocks = [jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(2)]
    table, labels, own = params["wte"]["embedding"], row["labels"], params["multi_token"]
    x = block(table[row["tokens"]], blocks[0], positions, causal)
    x = block(x, blocks[1], positions, local)
    first = cross_entropies(params, norm(x, params["ln_f"]))
    losses = np.array([
        0 if label == IGNORED else first[t, label] for t, label in enumerate(labels)
    ])  # fmt: skip
    # The token after the last one does not matter, as no label and no later token depends on it.
    next_tokens = np.append(row["tokens"][1:], 7)
    both = np.hstack([norm(x, own["ln_hidden"]), norm(table[next_tokens], own["ln_token"])])
    only = jax.tree.map(lambda p: p[0], own["blocks"])
    x = block(both @ own["projection"]["kernel"], only, positions, local)
    second = cross_entropies(params, norm(x, own["ln_f"]))
    total = 0.0
    for t in range(LENGTH - 1):
        if segment_ids[t] == segment_ids[t + 1] and labels[t + 1] != IGNORED:
            total += second[t, labels[t + 1]]
    return losses, total


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_the_token_after_next(tied: bool, make: Callable[..., Params]) -> None:
    config, inputs = replace(CONFIG, tied_head=tied), batch()
    params = make(config)
    found = jax.device_get(compute(config, *jax.device_put((params, inputs))))
    host = jax.tree.map(lambda p: np.asarray(p, np.float64), jax.device_get(params))
    rows = [reference_row(host, {n: x[i] for n, x in inputs.items()}) for i in range(ROWS)]
    losses, sums = (np.array(each) for each in zip(*rows, strict=True))
    np.testing.assert_allclose(found.tokens, losses, rtol=1e-5, atol=1e-5)
    counts = (inputs["labels"] != IGNORED).sum(1)
    aux_losses = found.aux_losses
    np.testing.assert_allclose(aux_losses["multi_token_loss"], sums.sum() / counts.sum(), rtol=1e-5)
    penalty = 0.1 * aux_losses["z_loss"] + 0.3 * aux_losses["multi_token_loss"]
    np.testing.assert_allclose(found.penalty, penalty, rtol=1e-6)
    if tied:
        return
    # Rows of other numbers of labels add up, as microbatches do; the z-loss is that of the labels.
    total = 0.0
    for i in range(ROWS):
        row = jax.device_put({name: x[i : i + 1] for name, x in inputs.items()})
        alone = jax.device_get(compute(config, params, row).aux_losses)
        np.testing.assert_allclose(alone["multi_token_loss"], sums[i] / counts[i], rtol=1e-5)
        total += counts[i] * alone["multi_token_loss"]
    np.testing.assert_allclose(total, sums.sum(), rtol=1e-5)


def test_everything_else_is_that_of_the_model_without_it() -> None:
    config = replace(CONFIG, dropout=0.3)
    without = replace(config, multi_token_loss=0.0)
    with jax.transfer_guard("allow"):
        key = jax.random.key(0)
        params, plain = (jax.jit(init, static_argnums=0)(each, key) for each in (config, without))
        inputs = batch() | {"dropout_key": jax.random.key(1)}
        found, expected = compute(config, params, inputs), compute(without, plain, inputs)
        other = compute(config, params, inputs | {"dropout_key": jax.random.key(2)})
        assert params.keys() - plain.keys() == {"multi_token"}
        shared = {name: params[name] for name in plain}
        jax.tree.map(np.testing.assert_array_equal, shared, plain)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert expected.aux_losses.keys() == {"z_loss"}
        assert found.aux_losses["multi_token_loss"] != other.aux_losses["multi_token_loss"]


def test_dropout_of_the_module_has_keys_of_its_own(
    make: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def record(x: jax.Array, rate: float, key: jax.Array, layout: Any) -> jax.Array:
        used.append(jax.random.key_data(key).tolist())
        return dropout(x, rate, key, layout)

    monkeypatch.setattr(block_module, "dropout", record)
    monkeypatch.setattr(embedding_module, "dropout", record)
    config = replace(CONFIG, dropout=0.3, scan_layers=False)
    with jax.transfer_guard("allow"):  # outside of `jax.jit`, where keys have values
        bind(config, make(config)).losses(**batch(), dropout_key=jax.random.key(1))
    assert len(used) == 1 + 3 * 2  # of the embedding and of three blocks
    assert len({tuple(key) for key in used}) == len(used)


def test_without_labels_it_is_0(make: Callable[..., Params]) -> None:
    inputs = {**batch(), "labels": np.full((ROWS, LENGTH), IGNORED, np.int32)}
    found = jax.device_get(compute(CONFIG, *jax.device_put((make(CONFIG), inputs))))
    assert found.aux_losses["multi_token_loss"] == 0
    assert "multi_token_loss: got 0.3; expected 0" in CONFIG.pipeline_problems(2)[0]
