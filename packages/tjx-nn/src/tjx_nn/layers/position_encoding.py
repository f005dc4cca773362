"""Positions: rotary, sinusoidal, and the slopes of ALiBi.

Axes in names: B batch, T time, N heads, H head_dim.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tjx_nn.sub_configs import RopeConfig


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], rope: RopeConfig | None = None
) -> Float[Array, "B T N H"]:
    """Turn each pair of features of each head by an angle that grows with the position.

    Parameters
    ----------
    x
        Queries or keys.
    positions
        Of each token.
    rope
        Which features turn, how fast, and in which layout.

    Returns
    -------
    Array
        In x's dtype; angles are float32.

    References
    ----------
    Su et al. 2021, "RoFormer", section 3.2.

    Examples
    --------
    >>> x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    >>> turned = apply_rope(x, jnp.array([[1]]), RopeConfig(base=100.0, interleaved=True))
    >>> print(np.asarray(turned).ravel().round(3))  # by 1 and by 0.1 radians
    [ 0.54   0.841 -0.1    0.995]
    """
    rope = RopeConfig() if rope is None else rope
    dim = rope.dim or x.shape[-1]
    frequencies, factor = rope_frequencies(rope, dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
    turning, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[np.ndarray, float]:
    """Return radians a token of each pair of features, float32 [dim / 2], and a factor for both.

    The factor, which yarn sets, scales queries and keys and so sharpens attention.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    base = rope.base
    if rope.scaling == "ntk":
        base *= rope.factor ** (dim / max(dim - 2, 1))
    plain = base**-exponent
    slow = plain / rope.factor
    if rope.scaling == "linear":
        return slow.astype(np.float32), 1.0
    if rope.scaling == "llama3":
        assert rope.original_seq_len is not None
        turns = rope.original_seq_len * plain / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        return (keep * plain + (1 - keep) * slow).astype(np.float32), 1.0
    if rope.scaling == "yarn":
        assert rope.original_seq_len is not None

        def pair_that_turns(times: float) -> float:
            tokens = rope.original_seq_len / (times * 2 * math.pi)  # type: ignore[operator]
            return dim * math.log(tokens) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(rope.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        mixed = ramp * slow + (1 - ramp) * plain
        return mixed.astype(np.float32), 0.1 * math.log(rope.factor) + 1
    return plain.astype(np.float32), 1.0


def sinusoids(positions: Int[Array, "#B T"], features: int) -> Float[Array, "#B T D"]:
    """Return the fixed vectors of positions, float32. Vaswani et al. 2017, section 3.5.

    Sines fill the first half of the features and cosines the second, as in the authors' code; the
    paper interleaves them, which is the same for a model that is trained.
    """
    half = -(-features // 2)
    frequencies = jnp.asarray(10000.0 ** -(np.arange(half) / half), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[..., :features]


def alibi_slopes(heads: int) -> np.ndarray:
    """Return how much each head's attention falls with a token of distance, float32 [heads].

    Press et al. 2022, "Train Short, Test Long", and its authors' code for heads that are no power
    of two.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4 / whole * np.arange(1, 2 * (heads - whole), 2))
    return np.concatenate([slopes, between]).astype(np.float32)
