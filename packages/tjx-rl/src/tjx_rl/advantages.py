"""Advantages from the rewards of several responses to each prompt.

The functions accept NumPy and JAX arrays and return arrays of the same kind. The responses to one
prompt, its group, are consecutive.
"""

from typing import Any


def group_advantages(
    rewards: Any, group_size: int, *, scale: bool = True, epsilon: float = 1e-4
) -> Any:
    """Compare each reward with the mean of its group.

    With `scale` these are the advantages of GRPO (Shao et al. 2024, "DeepSeekMath", section
    4.1.2); without it those of Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training",
    section 3.2), which does not weigh prompts by their difficulty.

    Parameters
    ----------
    rewards : float [B]
        Reward of each response.
    group_size : int
        Responses per prompt, at least 2; divides B.
    scale : bool
        Whether to divide by the standard deviation of the group (with Bessel's correction).
    epsilon : float
        Added to the standard deviation.

    Returns
    -------
    float [B]
        Advantages; 0 in groups with equal rewards.

    Raises
    ------
    ValueError
        If `group_size` is below 2 or does not divide B.

    Examples
    --------
    >>> import numpy as np
    >>> print(group_advantages(np.array([1.0, 0.0, 1.0, 1.0]), 2).round(3))
    [ 0.707 -0.707  0.     0.   ]
    """
    groups = _groups(rewards, group_size)
    centered = groups - groups.mean(1, keepdims=True)
    if scale:
        deviation = ((centered**2).sum(1, keepdims=True) / (group_size - 1)) ** 0.5
        centered = centered / (deviation + epsilon)
    return centered.reshape(rewards.shape)


def leave_one_out_advantages(rewards: Any, group_size: int) -> Any:
    """Compare each reward with the mean of the other rewards of its group (RLOO).

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al.
    2024, "Back to Basics: Revisiting REINFORCE-Style Optimization", equation 8.

    Parameters
    ----------
    rewards, group_size
        As for `group_advantages`.

    Returns
    -------
    float [B]
        Advantages.

    Raises
    ------
    ValueError
        As `group_advantages`.

    Examples
    --------
    >>> import numpy as np
    >>> print(leave_one_out_advantages(np.array([1.0, 0.0, 0.0]), 3))
    [ 1.  -0.5 -0.5]
    """
    groups = _groups(rewards, group_size)
    others = (groups.sum(1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(rewards.shape)


def whiten(values: Any, mask: Any, *, epsilon: float = 1e-8) -> Any:
    """Shift and scale values to mean 0 and variance 1 over all real entries of a batch.

    Source: Hu 2025, "REINFORCE++", section 3: normalization of advantages over the global batch.

    Parameters
    ----------
    values : float array
        For example advantages, [B] or [B, T].
    mask : bool array of the same shape
        False for padding, which becomes 0.
    epsilon : float
        Added to the variance.

    Returns
    -------
    float array
        Of the same shape.

    Examples
    --------
    >>> import numpy as np
    >>> print(whiten(np.array([1.0, 3.0, 9.0]), np.array([True, True, False])).round(3))
    [-1.  1.  0.]
    """
    count = mask.sum()
    mean = (values * mask).sum() / count
    centered = (values - mean) * mask
    return centered * ((centered**2).sum() / count + epsilon) ** -0.5


def penalized_returns(rewards: Any, kl: Any, mask: Any, *, coefficient: float) -> Any:
    """Subtract from each reward the KL penalties of a token and of those after it.

    Source: Hu 2025, "REINFORCE++", section 3: the returns at discount 1 of a reward at the last
    token and of a penalty at each. At the first token this is the penalized reward of RLOO
    (Ahmadian et al. 2024, equation 2).

    Parameters
    ----------
    rewards : float [B]
        Reward of each response.
    kl : float [B, T]
        Estimate of the divergence at each token [nats], such as `kl_k1`.
    mask : bool [B, T]
        True for tokens of the response.
    coefficient : float
        Weight of the divergence.

    Returns
    -------
    float [B, T]
        Returns; 0 outside of the mask.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[False, True, True]])
    >>> kl = np.array([[9.0, 2.0, 1.0]])
    >>> print(penalized_returns(np.array([1.0]), kl, mask, coefficient=0.1))
    [[0.  0.7 0.9]]
    """
    real = kl * mask
    following = real.sum(1, keepdims=True) - real.cumsum(1) + real
    return (rewards[:, None] - coefficient * following) * mask


def _groups(rewards: Any, group_size: int) -> Any:
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"group_size: got {group_size} for {len(rewards)} rewards; expected at least 2 and a "
            "divisor of their number; sample as many responses for each prompt"
        )
    return rewards.reshape(-1, group_size)
