"""Losses and advantages equal float64 NumPy oracles, in value and gradient."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_oracles as oracles

import tjx_rl

RNG = np.random.default_rng(0)
ROWS, TOKENS = 4, 5
MASK: Any = np.arange(TOKENS) < np.array([5, 2, 4, 1])[:, None]
LOG_P: Any
OLD: Any
REF: Any
SAMPLER: Any
LOG_P, OLD, REF, SAMPLER = (-RNG.gamma(2.0, 0.5, (ROWS, TOKENS)) for _ in range(4))
ADVANTAGES: Any = np.array([1.5, -0.7, 0.4, -2.0])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True), jax.transfer_guard("allow"):
        yield


def assert_equals_oracle(
    loss: Callable[[Any], Any], oracle: Callable[[Any], Any], x: np.ndarray
) -> None:
    """Compare the value, and the gradient of the sum with central differences of the oracle."""
    on_device = jax.device_put(x)
    np.testing.assert_allclose(jax.jit(loss)(on_device), oracle(x), rtol=1e-7, atol=1e-12)
    differences = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        differences[index] = (np.sum(oracle(x + step)) - np.sum(oracle(x - step))) / 2e-5
    gradient = jax.jit(jax.grad(lambda x: loss(x).sum()))(on_device)
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)


PAIRS: Any = (LOG_P.sum(1), OLD.sum(1), REF.sum(1), SAMPLER.sum(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_the_paper(smoothing: float) -> None:
    _, rejected, ref_c, ref_r = PAIRS
    assert_equals_oracle(
        lambda x: tjx_rl.dpo_loss(x, rejected, ref_c, ref_r, beta=0.3, label_smoothing=smoothing),
        lambda x: oracles.dpo(x, rejected, ref_c, ref_r, 0.3, smoothing),
        PAIRS[0],
    )
    assert_equals_oracle(
        lambda x: tjx_rl.dpo_loss(rejected, x, ref_c, ref_r, beta=0.3, label_smoothing=smoothing),
        lambda x: oracles.dpo(rejected, x, ref_c, ref_r, 0.3, smoothing),
        PAIRS[0],
    )


def test_ipo_equals_the_paper() -> None:
    _, rejected, ref_c, ref_r = PAIRS
    assert_equals_oracle(
        lambda x: tjx_rl.ipo_loss(x, rejected, ref_c, ref_r, beta=0.3),
        lambda x: oracles.ipo(x, rejected, ref_c, ref_r, 0.3),
        PAIRS[0],
    )


def test_kto_equals_the_paper() -> None:
    y, unrelated, ref, unrelated_ref = PAIRS
    good: Any = np.array([True, False, False, True])
    z0 = max(0.0, float(np.mean(unrelated - unrelated_ref)))
    point = tjx_rl.kto_reference_point(jnp.asarray(unrelated), jnp.asarray(unrelated_ref))
    np.testing.assert_allclose(point, z0)
    assert tjx_rl.kto_reference_point(jnp.array([-1.0]), jnp.array([0.0])) == 0
    assert_equals_oracle(
        lambda x: tjx_rl.kto_loss(
            x, ref, good, jnp.float64(0.4), beta=0.3, desirable_weight=1.2, undesirable_weight=0.8
        ),
        lambda x: oracles.kto(x, ref, good, 0.4, 0.3, 1.2, 0.8),
        y,
    )
    slope = jax.grad(lambda x: tjx_rl.kto_reference_point(x, jnp.zeros(2)))(jnp.ones(2))
    assert not slope.any()  # the paper does not differentiate the reference point


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_their_definition(estimator: str) -> None:
    assert_equals_oracle(
        lambda x: getattr(tjx_rl, f"kl_{estimator}")(x, REF),
        lambda x: np.vectorize(lambda a, b: oracles.kl(estimator, a, b))(x, REF),
        LOG_P,
    )


@pytest.mark.parametrize(
    ("algorithm", "reference"),
    [("grpo", "k3"), ("dr_grpo", None), ("dapo", "k1"), ("reinforce_pp", None), ("rloo", None)],
)
def test_policy_losses_equal_the_papers(algorithm: str, reference: str | None) -> None:
    weights = np.minimum(np.exp(OLD - SAMPLER), 1.5)
    penalty: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if reference is not None:
        penalty = {"reference_log_probs": REF, "kl_coefficient": 0.1, "kl_estimator": reference}
        expected = {"ref": REF, "coefficient": 0.1, "estimator": reference}
    assert_equals_oracle(
        lambda x: tjx_rl.policy_loss(
            algorithm, x, OLD, ADVANTAGES[:, None], MASK, max_length=7,
            importance_weights=tjx_rl.truncated_importance_weights(OLD, SAMPLER, cap=1.5),
            **penalty,
        ),
        lambda x: oracles.policy_loss(
            algorithm, x, OLD, ADVANTAGES, MASK, max_length=7, weights=weights,
            high=0.28 if algorithm == "dapo" else 0.2, **expected,
        ),
        LOG_P,
    )  # fmt: skip
    ratios = np.exp(LOG_P - OLD)[MASK]
    assert (ratios > 1.28).any()
    assert (ratios < 0.8).any()  # both limits matter


def test_one_update_per_rollout_gives_the_gradient_of_reinforce() -> None:
    def loss(x: Any) -> Any:
        return tjx_rl.policy_loss("rloo", x, x, ADVANTAGES[:, None], MASK)

    gradient = jax.grad(loss)(jnp.asarray(LOG_P))
    np.testing.assert_allclose(gradient, -ADVANTAGES[:, None] * MASK / ROWS, rtol=1e-12)


def test_clipped_tokens_are_those_without_gradient() -> None:
    losses, clipped, _ = tjx_rl.policy_losses(
        jnp.asarray(LOG_P), OLD, ADVANTAGES[:, None], clip_high=0.28
    )
    gradient = jax.grad(
        lambda x: tjx_rl.policy_losses(x, OLD, ADVANTAGES[:, None], clip_high=0.28).losses.sum()
    )(jnp.asarray(LOG_P))
    assert losses.shape == clipped.shape
    assert clipped.any()
    np.testing.assert_array_equal(clipped, gradient == 0)


REWARDS = np.array([1.0, 0.0, 0.0, 2.5, 1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_advantages_equal_the_papers(kind: Callable[[Any], Any]) -> None:
    for scale in (True, False):
        found = tjx_rl.group_advantages(kind(REWARDS), 4, scale=scale)
        expected = oracles.group_advantages(REWARDS, 4, scale=scale, epsilon=1e-4)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    found = tjx_rl.leave_one_out_advantages(kind(REWARDS), 4)
    np.testing.assert_allclose(found, oracles.leave_one_out(REWARDS, 4), rtol=1e-12)
    found = tjx_rl.whiten(kind(LOG_P), kind(MASK))
    np.testing.assert_allclose(found, oracles.whiten(LOG_P, MASK, 1e-8), rtol=1e-12)
    kls = LOG_P - REF
    found = tjx_rl.penalized_returns(kind(ADVANTAGES), kind(kls), kind(MASK), coefficient=0.1)
    expected = oracles.penalized_returns(ADVANTAGES, kls, MASK, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_equal_rewards_have_no_advantage() -> None:
    assert not tjx_rl.group_advantages(np.ones(4), 2).any()


def test_malformed_groups_and_weights_raise() -> None:
    with pytest.raises(ValueError, match="group_size: got 3 for 8 rewards; expected"):
        tjx_rl.group_advantages(REWARDS, 3)
    with pytest.raises(ValueError, match="group_size: got 1"):
        tjx_rl.leave_one_out_advantages(REWARDS, 1)
    with pytest.raises(ValueError, match="aggregation: got fixed_length with max_length None"):
        tjx_rl.token_weights(MASK, "fixed_length")


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(ValueError, match="algorithm: got 'gpro'") as error:
        tjx_rl.RLConfig(algorithm="gpro", beta=0.0, clip_low=1.0, samples_per_prompt=1)  # type: ignore[arg-type]
    for name in ("beta", "clip_low", "samples_per_prompt"):
        assert f"{name}: got" in str(error.value)
    with pytest.raises(ValueError, match=r"kl_coefficient: got 0.1 with algorithm rloo"):
        tjx_rl.RLConfig(algorithm="rloo", kl_coefficient=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.1 with preference_loss ipo"):
        tjx_rl.RLConfig(preference_loss="ipo", label_smoothing=0.1)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parent / "golden" / "trl.npz") as file:
        return dict(file)


def golden_log_probs(logits: Any, ids: Any) -> Any:
    return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), ids[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    ("algorithm", "penalty"), [("grpo", "_kl"), ("dr_grpo", ""), ("dapo", "_kl")]
)
def test_policy_losses_equal_those_of_trl(
    algorithm: str, penalty: str, golden: dict[str, Any]
) -> None:
    def loss(logits: Any) -> Any:
        return tjx_rl.policy_loss(
            algorithm, golden_log_probs(logits, golden["ids"]), golden["old"],
            golden["advantages"][:, None], golden["mask"] > 0, max_length=8, clip_high=0.28,
            reference_log_probs=golden["reference"], kl_coefficient=0.3 if penalty else 0.0,
        )  # fmt: skip

    value, gradient = jax.jit(jax.value_and_grad(loss))(golden["logits"])
    # The weights of tokens are float32.
    np.testing.assert_allclose(value, golden[f"{algorithm}{penalty}_loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, golden[f"{algorithm}{penalty}_gradient"], atol=1e-7)


def test_dpo_loss_equals_that_of_trl(golden: dict[str, Any]) -> None:
    mask = golden["mask"] > 0

    def loss(logits: Any) -> Any:
        log_probs = golden_log_probs(logits, golden["ids"])
        policy, reference = (
            tjx_rl.sequence_log_probs(x, mask) for x in (log_probs, golden["reference"])
        )
        pairs = [*jnp.split(policy, 2), *jnp.split(reference, 2)]
        return tjx_rl.dpo_loss(*pairs, beta=0.3).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(golden["logits"])
    np.testing.assert_allclose(value, golden["dpo_loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, golden["dpo_gradient"], atol=1e-10)
