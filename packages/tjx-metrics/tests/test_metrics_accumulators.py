"""Evaluation sums on the device equal NumPy's float64 sums for any split of the corpus."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_core import ConfigError
from tjx_metrics import (
    DocumentSums,
    Evaluation,
    EvaluationSums,
    FloatSum,
    IntSum,
    LogConfig,
    cross_entropy,
    register_metric,
)
from tjx_metrics.metrics import registration

TOKENS, LENGTH, VOCAB, KS = 700, 16, 23, (1, 5, 10)


def on(mesh: Mesh, *axes: str) -> NamedSharding:
    """Shard the leading dimensions over these mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]  # as jax is


def test_a_long_sum_has_the_accuracy_of_float64() -> None:
    rng = np.random.default_rng(0)
    plus = jax.jit(FloatSum.plus)
    batches = [(rng.exponential(3, 4096) ** 2).astype(np.float32) for _ in range(300)]
    total, plain = jax.jit(FloatSum.zero)(), np.float32(0)
    for batch in batches:
        total, plain = plus(total, jax.device_put(batch)), plain + batch.sum()
    want = math.fsum(x for batch in batches for x in batch.tolist())
    assert abs(total.on_host() / want - 1) < 1e-11
    assert abs(float(plain) / want - 1) > 1e-7  # float32 alone is not


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_the_sum_of_an_array_does_not_depend_on_the_order(size: int) -> None:
    x = np.random.default_rng(1).normal(size=(8, size)).astype(np.float32) * 1e4
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found = []
    for sharding in (on(mesh), on(mesh, "data")):
        for rows in (x, x[::-1]):
            placed = jax.device_put(rows, sharding)
            found.append(jax.jit(lambda x: FloatSum.zero().plus(x))(placed).on_host())
    assert np.ptp(found) <= 1e-12 * np.abs(x).sum()
    np.testing.assert_allclose(found[0], math.fsum(x.ravel()), atol=1e-12 * np.abs(x).sum())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_non_finite_values_propagate(bad: float) -> None:
    batch = np.ones(100, np.float32)
    batch[3] = bad
    plus = jax.jit(FloatSum.plus)
    total = plus(plus(jax.jit(FloatSum.zero)(), jax.device_put(batch)), jax.device_put(batch**0))
    np.testing.assert_equal(np.float32(total.on_host()), np.float32(bad))


def test_counts_exceed_32_bits() -> None:
    counts = jax.device_put(np.array([2**31 - 1, 0, 7], np.int32))
    sums = jax.jit(lambda: IntSum.zero((3,)))()
    for _ in range(5):
        sums = jax.jit(IntSum.plus)(sums, counts)
    assert sums.on_host() == [5 * (2**31 - 1), 0, 35]


class Corpus:
    """Logits, labels and byte lengths of a text, and their metrics by NumPy."""

    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        self.logits = rng.normal(size=(TOKENS, VOCAB)).astype(np.float32) * 3
        self.labels = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
        # Some rows are completely correct, including the last, partial one.
        for part in (slice(2 * LENGTH), slice(-(TOKENS % LENGTH), None)):
            self.labels[part] = self.logits[part].argmax(-1)
        self.lengths = rng.integers(0, 9, VOCAB).astype(np.int32)
        x = self.logits.astype(np.float64)
        own = x[np.arange(TOKENS), self.labels]
        self.losses = np.log(np.exp(x).sum(-1)) - own
        self.ranks = (x > own[:, None]).sum(-1)

    def batches(self, rows: int) -> list[Any]:
        """Split into batches of `rows` rows; the last one is padded."""
        size = rows * LENGTH
        found = []
        for begin in range(0, TOKENS, size):
            logits = np.full((size, VOCAB), 9.0, np.float32)
            labels = np.full(size, -100, np.int32)
            logits[: TOKENS - begin] = self.logits[begin : begin + size]
            labels[: TOKENS - begin] = self.labels[begin : begin + size]
            found.append((logits.reshape(rows, LENGTH, VOCAB), labels.reshape(rows, LENGTH)))
        return found


@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (8, 1), (8, 8), (48, 8)])
def test_metrics_do_not_depend_on_batches_and_devices(rows: int, devices: int) -> None:
    corpus = Corpus()
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    whole, divided = on(mesh), on(mesh, "data")
    lengths = jax.device_put(corpus.lengths, whole)

    @jax.jit
    def eval_step(sums: EvaluationSums, logits: Any, labels: Any, lengths: Any) -> EvaluationSums:
        losses = cross_entropy(logits, labels)
        return sums.plus(losses, labels, logits=logits, token_byte_lengths=lengths)

    sums = jax.jit(lambda: EvaluationSums.zero(ks=KS, of_text=True), out_shardings=whole)()
    for batch in corpus.batches(rows):
        sums = eval_step(sums, *jax.device_put(batch, divided), lengths)
    found = sums.on_host()

    jitted: Any = eval_step
    assert jitted._cache_size() == 1  # sums come back as they went in
    assert (found.tokens, found.text_bytes) == (TOKENS, corpus.lengths[corpus.labels].sum())
    assert found.correct == {k: (corpus.ranks < k).sum() for k in KS}
    right = [(corpus.ranks[i : i + LENGTH] == 0).all() for i in range(0, TOKENS, LENGTH)]
    assert (found.exact_rows, found.rows) == (sum(right), len(right))
    assert found.exact_rows >= 3

    metrics, loss = found.metrics(), corpus.losses.mean()
    want = {
        "loss": loss,
        "perplexity": np.exp(loss),
        "bits_per_token": loss / np.log(2),
        "bits_per_byte": corpus.losses.sum() / np.log(2) / found.text_bytes,
        **{f"top{k}_accuracy": (corpus.ranks < k).mean() for k in KS},
        "exact_match": np.mean(right),
    }
    assert metrics == pytest.approx(want, rel=2e-7)


def test_missing_inputs_are_errors() -> None:
    def count(**asked: Any) -> None:
        zero = EvaluationSums.zero(**asked)
        zero.plus(*jax.device_put((np.zeros(2, np.float32), np.zeros(2, np.int32))))

    with jax.transfer_guard("allow"):
        with pytest.raises(ValueError, match=r"accuracies with k of \[1, 5\]"):
            count(ks=(1, 5))
        with pytest.raises(ValueError, match="token_byte_lengths: got None"):
            count(of_text=True)
    with pytest.raises(ValueError, match="labels: got none to evaluate"):
        Evaluation(0.0, 0, None).metrics()
    with pytest.raises(ValueError, match="without its last axis"):
        cross_entropy(*jax.device_put((np.zeros((2, 3), "f"), np.zeros(3, np.int32))))


def test_documents_have_separate_sums() -> None:
    rng = np.random.default_rng(3)
    documents = np.sort(rng.integers(0, 5, 200))
    documents[documents == 3] = 4  # a document without a label
    documents[::17] = -1
    losses, lengths = rng.exponential(3, 200).astype(np.float32), rng.integers(0, 9, 200)
    sums = DocumentSums(5)
    for begin in range(0, 200, 40):
        cut = slice(begin, begin + 40)
        shape = (4, 10)
        lost, n_bytes = losses[cut].reshape(shape), lengths[cut].reshape(shape)
        sums.add(documents[cut].reshape(shape), lost, n_bytes)
    for document in range(5):
        mine = documents == document
        want = (math.fsum(losses[mine].tolist()), mine.sum(), lengths[mine].sum())
        found = sums.evaluation(document)
        assert (found.loss_sum, found.tokens, found.text_bytes) == pytest.approx(want, rel=1e-14)
    assert sums.total().tokens == (documents != -1).sum()
    assert sums.total().loss_sum == pytest.approx(sum(losses[documents >= 0].astype(np.float64)))

    with pytest.raises(ValueError, match="documents: got numbers from 2 to 5"):
        sums.add(np.array([2, 5]), np.zeros(2))
    with pytest.raises(ValueError, match=r"losses: got shape \(3,\)"):
        sums.add(np.array([2, 2]), np.zeros(3))


def test_registered_metrics_are_means_over_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own.gap", "own.mean"):
        monkeypatch.setitem(registration.registered_metrics, name, min)  # removed after
    # NaN where a label is ignored must not count.
    register_metric("own.gap", lambda logits, labels: logits.max(-1) + jnp.sqrt(1.0 + labels))
    register_metric("own.mean", lambda logits, _: logits.mean())
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4, VOCAB)).astype(np.float32)
    labels = np.where(rng.random((6, 4)) < 0.3, -100, rng.integers(0, VOCAB, (6, 4)))
    want = (logits.max(-1) + np.sqrt(1.0 + np.maximum(labels, 0)))[labels >= 0].mean()
    for rows in (6, 2):
        sums = jax.jit(lambda: EvaluationSums.zero(metrics=("own.gap",)))()
        for start in range(0, 6, rows):
            batch = jax.device_put((logits[start : start + rows], labels[start : start + rows]))
            sums = jax.jit(lambda s, x, y: s.plus(cross_entropy(x, y), y, logits=x))(sums, *batch)
        found = sums.on_host().metrics()
        assert found.keys() == {"loss", "own.gap"}
        np.testing.assert_allclose(found["own.gap"], want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected logits for own\.gap"):
        sums.plus(batch[1], batch[1])
    sums = jax.jit(lambda: EvaluationSums.zero(metrics=("own.mean",)))()
    with pytest.raises(ValueError, match=r"own.mean: got values of shape \(\); expected \(2, 4\)"):
        jax.jit(lambda s, x, y: s.plus(y, y, logits=x))(sums, *batch)

    assert LogConfig(metrics=("own.gap",)).metrics == ("own.gap",)
    with pytest.raises(ConfigError, match=r"did you mean own\.gap"):
        LogConfig(metrics=("own.gapp",))
    with pytest.raises(ConfigError, match=r"metrics: got .*; expected each name once"):
        LogConfig(metrics=("own.gap", "own.gap"))
    for name in ("loss", "top5_accuracy", "a,b", ""):
        with pytest.raises(ConfigError, match="not built in"):
            register_metric(name, lambda logits, _: logits)
