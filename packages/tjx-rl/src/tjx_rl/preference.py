"""Losses on preferences between responses, relative to a frozen reference model.

All take the log-probabilities of whole responses, `sequence_log_probs`.
"""

import jax
import jax.numpy as jnp


def sequence_log_probs(log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum the log-probabilities of the tokens of each response.

    Parameters
    ----------
    log_probs : float [..., T]
        Log-probability of each token [nats].
    mask : bool [..., T]
        True for tokens of the response.

    Returns
    -------
    float [...]
        Log-probability of each response [nats].
    """
    return jnp.where(mask, log_probs, 0).sum(-1)


def dpo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Compute the loss of direct preference optimization (DPO).

    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 7; with label smoothing
    Mitchell 2023, "A note on DPO with noisy preferences", equation 3.

    Parameters
    ----------
    chosen, rejected : float [B]
        Log-probabilities of the preferred and of the other response under the policy [nats].
    reference_chosen, reference_rejected : float [B]
        The same under the reference model.
    beta : float
        Strength of the KL constraint, positive; smaller values allow larger changes.
    label_smoothing : float
        Probability that a preference is wrong, below 0.5.

    Returns
    -------
    float [B]
        Loss of each pair [nats].

    Examples
    --------
    >>> equal = jnp.zeros(1)
    >>> print(dpo_loss(equal, equal, equal, equal, beta=0.1).round(4))  # log(2)
    [0.6931]
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float,
) -> jax.Array:
    """Compute the loss of identity preference optimization (IPO).

    Its optimum is a finite margin of ``1 / (2 beta)``, so that it does not overfit preferences that
    never contradict. Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand
    Learning from Human Preferences", equation 17 (beta is its tau).

    Parameters
    ----------
    chosen, rejected, reference_chosen, reference_rejected, beta
        As for `dpo_loss`. Log-probabilities are sums over tokens, as in the paper.

    Returns
    -------
    float [B]
        Loss of each pair [nats squared].
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return jnp.square(margin - 1 / (2 * beta))


def kto_reference_point(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Estimate the KL divergence of the policy, the reference point of `kto_loss`.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization",
    section 4.1.

    Parameters
    ----------
    log_probs, reference_log_probs : float [B]
        Log-probabilities of *unrelated* responses, such as the response to the next prompt of the
        batch, under policy and reference [nats].

    Returns
    -------
    float scalar
        At least 0 [nats]; not differentiated.
    """
    return jax.lax.stop_gradient(jnp.maximum((log_probs - reference_log_probs).mean(), 0))


def kto_loss(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    desirable: jax.Array,
    reference_point: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Compute the loss of Kahneman-Tversky optimization (KTO), for responses without a pair.

    Source: Ethayarajh et al. 2024, equation 8.

    Parameters
    ----------
    log_probs, reference_log_probs : float [B]
        Log-probabilities of the responses under policy and reference [nats].
    desirable : bool [B]
        Whether each response is a good one.
    reference_point : float scalar
        From `kto_reference_point`.
    beta : float
        Risk aversion, positive.
    desirable_weight, undesirable_weight : float
        Weights of the two kinds, to balance their numbers.

    Returns
    -------
    float [B]
        Loss of each response, between 0 and its weight.
    """
    gain = beta * (log_probs - reference_log_probs - reference_point)
    value = jax.nn.sigmoid(jnp.where(desirable, gain, -gain))
    return jnp.where(desirable, desirable_weight, undesirable_weight) * (1 - value)
