"""Float64 NumPy oracles of the losses, written from the papers as loops over the tokens."""

from typing import Any

import numpy as np

Floats = Any  # float64 arrays


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def dpo(c: Floats, r: Floats, ref_c: Floats, ref_r: Floats, beta: float, smooth: float) -> Floats:
    # Rafailov et al. 2023, equation 7: -log sigma(beta log pi/ref(y_w) - beta log pi/ref(y_l)).
    h = beta * np.log((np.exp(c) / np.exp(ref_c)) / (np.exp(r) / np.exp(ref_r)))
    return -(1 - smooth) * np.log(sigmoid(h)) - smooth * np.log(sigmoid(-h))


def ipo(c: Floats, r: Floats, ref_c: Floats, ref_r: Floats, beta: float) -> Floats:
    # Azar et al. 2023, equation 17: (h - 1 / (2 tau))^2.
    h = np.log(np.exp(c) * np.exp(ref_r) / (np.exp(r) * np.exp(ref_c)))
    return (h - 0.5 / beta) ** 2


def kto(
    y: Floats, ref: Floats, good: Floats, z0: float, beta: float, w_good: float, w_bad: float
) -> Floats:
    # Ethayarajh et al. 2024, equation 8: lambda_y - v(x, y).
    found = []
    for reward, is_good in zip(y - ref, good, strict=True):
        if is_good:
            found.append(w_good - w_good * sigmoid(beta * (reward - z0)))
        else:
            found.append(w_bad - w_bad * sigmoid(beta * (z0 - reward)))
    return np.array(found)


def kl(estimator: str, log_p: float, log_ref: float) -> float:
    # Schulman 2020, with r = ref(x) / p(x).
    r = np.exp(log_ref) / np.exp(log_p)
    return float({"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": (r - 1) - np.log(r)}[estimator])


def group_advantages(rewards: Floats, size: int, *, scale: bool, epsilon: float) -> Floats:
    found: list[float] = []
    for first in range(0, len(rewards), size):
        group = rewards[first : first + size]
        deviation = np.std(group, ddof=1) + epsilon if scale else 1.0
        found += [(reward - np.mean(group)) / deviation for reward in group]
    return np.array(found)


def leave_one_out(rewards: Floats, size: int) -> Floats:
    found = []
    for i, reward in enumerate(rewards):
        first = i - i % size
        others = [rewards[j] for j in range(first, first + size) if j != i]
        found.append(reward - np.mean(others))
    return np.array(found)


def whiten(values: Floats, mask: Floats, epsilon: float) -> Floats:
    real = values[mask]
    return np.where(mask, (values - real.mean()) / np.sqrt(real.var() + epsilon), 0)


def penalized_returns(rewards: Floats, kls: Floats, mask: Floats, coefficient: float) -> Floats:
    found = np.zeros(kls.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        later = sum(kls[i, s] for s in range(t, kls.shape[1]) if mask[i, s])
        found[i, t] = rewards[i] - coefficient * later
    return found


def surrogate(
    log_p: float, old: float, advantage: float, low: float, high: float, weight: float
) -> float:
    # Schulman et al. 2017, equation 7; clip-higher: Yu et al. 2025, equation 8.
    ratio = np.exp(log_p) / np.exp(old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    return float(weight * min(ratio * advantage, clipped * advantage))


def policy_loss(
    algorithm: str, log_p: Floats, old: Floats, advantages: Floats, mask: Floats, *,
    max_length: int, weights: Floats, low: float = 0.2, high: float = 0.2,
    ref: Floats = None, coefficient: float = 0.0, estimator: str = "k3",
) -> float:  # fmt: skip
    """Return the loss: minus the objective of each paper."""
    rows = []
    for i in range(len(log_p)):
        tokens = []
        for t in np.nonzero(mask[i])[0]:
            value = surrogate(log_p[i, t], old[i, t], advantages[i], low, high, weights[i, t])
            if ref is not None:
                value -= coefficient * kl(estimator, log_p[i, t], ref[i, t])
            tokens.append(value)
        rows.append(tokens)
    if algorithm == "grpo":  # Shao et al. 2024, equation 3: 1/G sum_i 1/|o_i| sum_t
        return -float(np.mean([np.mean(tokens) for tokens in rows]))
    if algorithm == "dr_grpo":  # Liu et al. 2025: without 1/|o_i|; a constant takes its place
        return -float(np.mean([np.sum(tokens) / max_length for tokens in rows]))
    if algorithm == "rloo":  # Ahmadian et al. 2024, equation 8: 1/k sum_i advantage_i grad log pi
        return -float(np.mean([np.sum(tokens) for tokens in rows]))
    assert algorithm in ("dapo", "reinforce_pp")  # Yu et al. 2025, equation 8: 1/sum|o_i| sum_it
    return -float(np.sum([value for tokens in rows for value in tokens]) / mask.sum())
