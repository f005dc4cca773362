"""Policy-gradient losses on sampled responses: GRPO, Dr. GRPO, DAPO, REINFORCE++ and RLOO.

They differ in the advantages, in the clipping range and in the weights of tokens:
`ALGORITHMS` has a row for each.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from tjx_rl.kl import kl_k1, kl_k2, kl_k3

KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "fixed_length"]
Advantages = Literal["group_scaled", "group_centered", "whitened", "leave_one_out"]


class Algorithm(NamedTuple):
    """The choices that make up an algorithm.

    Attributes
    ----------
    advantages
        Estimator of the advantages: `group_advantages` with and without scale, `whiten`, or
        `leave_one_out_advantages`.
    aggregation
        Weights of the tokens, as for `token_weights`.
    clip_high
        Default upper clipping range; the lower one is 0.2.
    """

    advantages: Advantages
    aggregation: Aggregation
    clip_high: float


ALGORITHMS: Mapping[str, Algorithm] = {
    # Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning", equation 3.
    "grpo": Algorithm("group_scaled", "sequence_mean", 0.2),
    # Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", section 3.2.
    "dr_grpo": Algorithm("group_centered", "fixed_length", 0.2),
    # Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System", equation 8.
    "dapo": Algorithm("group_scaled", "token_mean", 0.28),
    # Hu 2025, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models".
    "reinforce_pp": Algorithm("whitened", "token_mean", 0.2),
    # Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE-Style Optimization", equation 8.
    "rloo": Algorithm("leave_one_out", "sequence_sum", 0.2),
}
"""The algorithms by name."""


class PolicyLosses(NamedTuple):
    """Losses of the sampled tokens.

    Attributes
    ----------
    losses : float [B, T]
        Loss of each token; padding is not masked.
    clipped : bool [B, T]
        Whether clipping removes the gradient of a token.
    kl : float [B, T]
        Estimated divergence from the reference [nats]; 0 without a reference.
    """

    losses: jax.Array
    clipped: jax.Array
    kl: jax.Array


def policy_losses(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_weights: jax.Array | float = 1.0,
    reference_log_probs: jax.Array | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
) -> PolicyLosses:
    """Compute the clipped surrogate loss of each token, with an optional KL penalty.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; a
    `clip_high` above `clip_low` is clip-higher (Yu et al. 2025, section 3.1); the penalty is that
    of GRPO (Shao et al. 2024, equation 3).

    Parameters
    ----------
    log_probs : float [B, T]
        Log-probability of each token under the policy [nats].
    old_log_probs : float [B, T]
        The same before the first update on these samples; not differentiated. With one update per
        rollout pass `log_probs` itself: the ratio is 1, and the gradient is that of REINFORCE.
    advantages : float [B, 1] or [B, T]
        Advantage of each response or token.
    clip_low, clip_high : float
        The ratio of probabilities is clipped to ``[1 - clip_low, 1 + clip_high]``.
    importance_weights : float [B, T]
        Factors of the surrogate loss, from `truncated_importance_weights`.
    reference_log_probs : float [B, T], optional
        Log-probabilities under the reference model [nats].
    kl_coefficient : float
        Weight of the divergence from the reference.
    kl_estimator : {"k1", "k2", "k3"}
        Its estimator.

    Returns
    -------
    PolicyLosses
        Of each token.

    Examples
    --------
    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> old = jnp.log(jnp.array([[0.5, 0.25]]))
    >>> losses, clipped, _ = policy_losses(log_probs, old, jnp.ones((1, 1)))
    >>> print(losses, clipped)
    [[-1.  -1.2]] [[False  True]]
    """
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(old_log_probs))
    limited = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    clipped = limited * advantages < ratio * advantages
    surrogate = jnp.minimum(ratio * advantages, limited * advantages)
    losses = -jax.lax.stop_gradient(importance_weights) * surrogate
    kl = jnp.zeros_like(log_probs)
    if reference_log_probs is not None:
        kl = KL_ESTIMATORS[kl_estimator](log_probs, jax.lax.stop_gradient(reference_log_probs))
        losses = losses + kl_coefficient * kl
    return PolicyLosses(losses, clipped, kl)


def truncated_importance_weights(
    log_probs: jax.Array, sampler_log_probs: jax.Array, *, cap: float
) -> jax.Array:
    """Weigh tokens by the ratio of their probabilities in trainer and sampler, up to a cap.

    It corrects for a sampler whose numerics differ from the training forward pass. Source: Ionides
    2008, "Truncated Importance Sampling"; Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training".

    Parameters
    ----------
    log_probs : float [B, T]
        Log-probability of each token in the training forward pass of the policy that has sampled
        it [nats].
    sampler_log_probs : float [B, T]
        The same as computed by the sampler.
    cap : float
        Largest weight, at least 1.

    Returns
    -------
    float [B, T]
        Weights; not differentiated.

    Examples
    --------
    >>> ratio = jnp.log(jnp.array([0.5, 1.0, 3.0]))
    >>> print(truncated_importance_weights(ratio, jnp.zeros(3), cap=2.0))
    [0.5 1.  2. ]
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_probs - sampler_log_probs), cap))


def token_weights(mask: Any, aggregation: Aggregation, *, max_length: int | None = None) -> Any:
    """Return the weight of each token in the loss of a batch.

    Parameters
    ----------
    mask : bool [B, T]
        True for tokens of the responses; each row has at least one. NumPy or JAX.
    aggregation : str
        sequence_mean: mean over responses of the mean over their tokens (GRPO). token_mean: mean
        over all tokens (DAPO, section 3.3). fixed_length: sum over tokens divided by B and
        `max_length` (Dr. GRPO). sequence_sum: mean over responses of the sum over their tokens
        (RLOO).
    max_length : int, optional
        Largest length of a response [tokens], for fixed_length.

    Returns
    -------
    float32 [B, T]
        Weights; the loss is the sum of weights times token losses.

    Raises
    ------
    ValueError
        If `aggregation` is unknown, or fixed_length has no `max_length`.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[True, True], [True, False]])
    >>> print(token_weights(mask, "sequence_mean"))
    [[0.25 0.25]
     [0.5  0.  ]]
    """
    real = mask.astype("float32")
    if aggregation == "sequence_mean":
        return real / real.sum(1, keepdims=True) / len(mask)
    if aggregation == "token_mean":
        return real / real.sum()
    if aggregation == "sequence_sum":
        return real / len(mask)
    if aggregation != "fixed_length" or not max_length:
        raise ValueError(
            f"aggregation: got {aggregation} with max_length {max_length}; expected sequence_mean, "
            "token_mean, sequence_sum, or fixed_length with a max_length; change one of them"
        )
    return real / (len(mask) * max_length)


def policy_loss(
    algorithm: str,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    max_length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    **options: Any,
) -> jax.Array:
    """Compute the loss of a batch with the clipping range and token weights of an algorithm.

    Parameters
    ----------
    algorithm : str
        A name of `ALGORITHMS`.
    log_probs, old_log_probs, advantages, **options
        As for `policy_losses`; `ALGORITHMS` names the estimator of the advantages.
    mask : bool [B, T]
        True for tokens of the responses.
    max_length : int, optional
        As for `token_weights`.
    clip_low, clip_high : float
        As for `policy_losses`; None is the algorithm's `clip_high`.

    Returns
    -------
    float scalar
        The loss, to be minimized.

    Raises
    ------
    ValueError
        As `token_weights`.

    Examples
    --------
    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    >>> mask = jnp.array([[True, True], [True, False]])
    >>> advantages = jnp.array([[1.0], [-1.0]])
    >>> print(policy_loss("dapo", log_probs, log_probs, advantages, mask).round(4))
    -0.3333
    """
    chosen = ALGORITHMS[algorithm]
    losses = policy_losses(
        log_probs,
        old_log_probs,
        advantages,
        clip_low=clip_low,
        clip_high=chosen.clip_high if clip_high is None else clip_high,
        **options,
    ).losses
    weights = token_weights(mask, chosen.aggregation, max_length=max_length)
    total: jax.Array = (weights * jnp.where(mask, losses, 0)).sum()
    return total
