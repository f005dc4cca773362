"""Position encodings: rotary (RoPE) with context extension, sinusoidal, and ALiBi slopes.

Axes in names: B batch, T time, N heads, H head_dim.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tjx_nn.sub_configs import RopeConfig


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"] | None = None,
    rope: RopeConfig | None = None,
) -> Float[Array, "B T N H"]:
    """Apply rotary position embeddings: rotate each pair of features by position * frequency.

    Parameters
    ----------
    x
        Queries or keys, [batch, tokens, heads, head_dim].
    positions
        Position of each token, [batch or 1, tokens]; None counts from 0.
    rope
        Base, rotated features, pair layout (interleaved or halves) and scaling; None is the
        default `RopeConfig`.

    Returns
    -------
    Array
        Rotated x, in the dtype of x; angles are float32.

    References
    ----------
    Su et al. 2021, "RoFormer", section 3.2.

    Examples
    --------
    >>> x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    >>> rotated = apply_rope(x, jnp.array([[1]]), RopeConfig(base=100.0, interleaved=True))
    >>> print(np.asarray(rotated).ravel().round(3))  # by 1 and by 0.1 radians
    [ 0.54   0.841 -0.1    0.995]
    """
    positions = jnp.arange(x.shape[1])[None] if positions is None else positions
    rope = RopeConfig() if rope is None else rope
    dim = rope.dim or x.shape[-1]
    frequencies, factor = rope_frequencies(rope, dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
    rotary, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if rope.interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(rotary.shape)
    else:
        a, b = jnp.split(rotary, 2, -1)
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, rest], -1) if rest.shape[-1] else rotated


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[np.ndarray, float]:
    """Return the frequency of each feature pair and the scale of queries and keys.

    Returns
    -------
    frequencies : float32 [dim / 2]
        Radians per token.
    scale : float
        Factor of queries and keys: 1 except for YaRN and LongRoPE, whose factor sharpens attention.
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
        rotations = rope.original_seq_len * plain / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((rotations - rope.low_freq_factor) / span, 0, 1)
        return (keep * plain + (1 - keep) * slow).astype(np.float32), 1.0
    if rope.scaling == "yarn":
        assert rope.original_seq_len is not None

        def pair_with_rotations(rotations: float) -> float:
            tokens = rope.original_seq_len / (rotations * 2 * math.pi)  # type: ignore[operator]
            return dim * math.log(tokens) / (2 * math.log(base))

        low, high = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        mixed = ramp * slow + (1 - ramp) * plain
        return mixed.astype(np.float32), rope.attention_factor or 0.1 * math.log(rope.factor) + 1
    if rope.scaling == "longrope":
        assert rope.original_seq_len is not None
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_seq_len))
        frequencies = plain / np.asarray(rope.short_factors)
        return frequencies.astype(np.float32), rope.attention_factor or scale
    return plain.astype(np.float32), 1.0


def sinusoids(positions: Int[Array, "#B T"], features: int) -> Float[Array, "#B T D"]:
    """Return sinusoidal position embeddings, float32 (Vaswani et al. 2017, section 3.5).

    Sines fill the first half of the features and cosines the second, as in tensor2tensor; the paper
    interleaves them, which is equivalent for trained models.
    """
    half = -(-features // 2)
    frequencies = jnp.asarray(10000.0 ** -(np.arange(half) / half), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[..., :features]


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the ALiBi slope of each head, float32 [heads]: score penalty per token of distance.

    Press et al. 2022, "Train Short, Test Long"; the reference code for a number of heads that is
    no power of two.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4 / whole * np.arange(1, 2 * (heads - whole), 2))
    return np.concatenate([slopes, between]).astype(np.float32)
