"""Estimators of the KL divergence from a reference policy, per sampled token.

Each estimates KL(policy || reference) at tokens that the policy has sampled. Source: Schulman 2020,
"Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
"""

import jax
import jax.numpy as jnp


def kl_k1(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Return the log-ratio: unbiased, of high variance, can be negative.

    Parameters
    ----------
    log_probs, reference_log_probs : float array
        Log-probabilities of the sampled tokens under policy and reference [nats], of one shape.

    Returns
    -------
    float array
        Of the same shape [nats].
    """
    return log_probs - reference_log_probs


def kl_k2(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Return half the squared log-ratio: biased, of low variance, never negative.

    As a loss it has the expected gradient of the divergence.

    Parameters
    ----------
    log_probs, reference_log_probs
        As for `kl_k1`, as is the result.

    Returns
    -------
    jax.Array
        As of `kl_k1`.
    """
    return jnp.square(log_probs - reference_log_probs) / 2


def kl_k3(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Return ``exp(-k1) - 1 + k1``: unbiased, of low variance, never negative.

    GRPO uses this estimator (Shao et al. 2024, equation 4).

    Parameters
    ----------
    log_probs, reference_log_probs
        As for `kl_k1`, as is the result.

    Returns
    -------
    jax.Array
        As of `kl_k1`.

    Examples
    --------
    >>> import numpy as np
    >>> print(kl_k3(np.log(np.float32([0.5, 0.2])), np.log(np.float32([0.5, 0.4]))).round(4))
    [0.     0.3069]
    """
    log_ratio = reference_log_probs - log_probs
    return jnp.expm1(log_ratio) - log_ratio
