"""Position encodings against reference values: RoPE layouts and scalings, sinusoids, ALiBi."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, RopeConfig, apply_rope
from tjx_nn.layers.position_encoding import alibi_slopes, rope_frequencies, sinusoids


def turned(x: list[float], position: int, rope: RopeConfig) -> np.ndarray:
    vector = np.array(x, np.float32).reshape(1, 1, 1, -1)
    positions = np.array([[position]], np.int32)
    on_device = jax.device_put((vector, positions))
    found = jax.jit(apply_rope, static_argnums=2)(*on_device, rope)
    return np.asarray(found).ravel()


def test_interleaved_and_half_pairs() -> None:
    # Base 100 and four features: the first pair rotates by 1 radian per token, the second by 0.1.
    fast, slow = (math.cos(3), math.sin(3)), (math.cos(0.3), math.sin(0.3))
    x = [2.0, 1.0, -1.0, 4.0]

    def pair(a: float, b: float, turn: tuple[float, float]) -> list[float]:
        return [a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]]

    side_by_side = [*pair(2, 1, fast), *pair(-1, 4, slow)]
    (a, b), (c, d) = pair(2, -1, fast), pair(1, 4, slow)
    for interleaved, expected in ((True, side_by_side), (False, [a, c, b, d])):
        rope = RopeConfig(base=100.0, interleaved=interleaved)
        np.testing.assert_allclose(turned(x, 3, rope), expected, atol=1e-6)
        np.testing.assert_array_equal(turned(x, 0, rope), x)
        # Only the first features rotate.
        part = RopeConfig(base=100.0, interleaved=interleaved, dim=2)
        np.testing.assert_allclose(turned(x, 3, part), [*pair(2, 1, fast), -1, 4], atol=1e-6)


def test_scores_depend_only_on_the_distance() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 8)).tolist()
    for rope in (RopeConfig(), RopeConfig(interleaved=True)):
        near, far = (turned(q, p, rope) @ turned(k, p - 4, rope) for p in (5, 60))
        np.testing.assert_allclose(near, far, rtol=1e-4)


PLAIN = 10000.0 ** -np.array([0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    ("rope", "expected", "factor"),
    [
        (RopeConfig(), PLAIN, 1.0),
        (RopeConfig(scaling="linear", factor=4.0), PLAIN / 4, 1.0),
        # The highest frequency is unchanged, the lowest as with "linear".
        (
            RopeConfig(scaling="ntk", factor=4.0),
            (10000.0 * 4 ** (8 / 6)) ** -np.array([0, 0.25, 0.5, 0.75]),
            1.0,
        ),
        # In 1000 tokens the pairs rotate 159, 15.9, 1.59 and 0.159 times: only the last two are
        # scaled, the last fully; the third is interpolated with (1.59 - 1) / (4 - 1).
        (
            RopeConfig(scaling="llama3", factor=4.0, original_seq_len=1000),
            PLAIN * [1, 1, 0.25 + 0.75 * (10 / (2 * math.pi) - 1) / 3, 0.25],
            1.0,
        ),
        # Pairs 0.70 and 2.20 rotate 32 times and once: rounded outward, the ramp is from 0 to 3.
        (
            RopeConfig(scaling="yarn", factor=4.0, original_seq_len=1000),
            PLAIN * [1, 0.75, 0.5, 0.25],
            0.1 * math.log(4) + 1,
        ),
        # Without rounding the ramp is from 0.6967 to 2.2018.
        (
            RopeConfig(scaling="yarn", factor=4.0, original_seq_len=1000, truncate=False),
            PLAIN * [1, 1 - 0.75 * 0.201528, 1 - 0.75 * 0.865914, 0.25],
            0.1 * math.log(4) + 1,
        ),
        (
            RopeConfig(
                scaling="longrope",
                factor=100.0,
                original_seq_len=10,
                short_factors=(1.0, 1.25, 1.5, 2.0),
                long_factors=(3.0, 4.0, 5.0, 6.0),
            ),
            PLAIN / [1, 1.25, 1.5, 2],
            math.sqrt(3),
        ),
    ],
    ids=["none", "linear", "ntk", "llama3", "yarn", "yarn-not-rounded", "longrope"],
)
def test_frequencies_of_each_scaling(rope: RopeConfig, expected: np.ndarray, factor: float) -> None:
    found, scale = rope_frequencies(rope, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert scale == factor
    vector = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(turned(vector, 2, rope)[0], factor * math.cos(2 * expected[0]), 1e-5)


def test_longrope_has_the_factors_of_the_longest_sequence() -> None:
    rope = RopeConfig(
        scaling="longrope", factor=2.0, original_seq_len=16, short_factors=(1.0, 1.5),
        long_factors=(2.0, 4.0),
    )  # fmt: skip
    config = GPTConfig(n_head=1, d_model=4, positions="rope", rope=rope, max_seq_len=16)
    assert config.block_rope(None) == rope
    longer = dataclasses.replace(config, max_seq_len=17)
    assert longer.block_rope(None) == dataclasses.replace(rope, short_factors=(2.0, 4.0))
    with pytest.raises(ValueError, match=r"rope.short_factors: got 2 numbers; expected 4, half"):
        dataclasses.replace(config, d_model=8)
    with pytest.raises(ValueError, match=r"long_factors: got \(\); expected a positive number"):
        dataclasses.replace(rope, long_factors=())


def test_sinusoids_are_sines_followed_by_cosines() -> None:
    found = jax.jit(sinusoids, static_argnums=1)(jax.device_put(np.array([[0, 3]], np.int32)), 4)
    slow = 3 / 10000**0.5
    expected = [[0.0, 0.0, 1.0, 1.0], [math.sin(3), math.sin(slow), math.cos(3), math.cos(slow)]]
    np.testing.assert_allclose(np.asarray(found)[0], expected, atol=1e-6)


def test_alibi_slopes_equal_the_reference_code() -> None:
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    # The slopes of four heads, and every other one of eight heads.
    np.testing.assert_allclose(alibi_slopes(6), 2.0 ** -np.array([2, 4, 6, 8, 1, 3]))
