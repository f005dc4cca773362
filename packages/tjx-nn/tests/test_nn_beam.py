"""Beam search against exhaustive search and against a NumPy implementation."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from tjx_nn import EncoderDecoderConfig, GPTConfig, beam_search, generate
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]
Make = Callable[..., Params]
PAIR = EncoderDecoderConfig(
    vocab_size=4, source_vocab_size=7, max_seq_len=16, n_layer=1, n_encoder_layer=1, n_head=2,
    d_model=8,
)  # fmt: skip
SOURCE = np.array([[3, 1, 4, 1], [5, 6, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
START = np.ones((2, 1), np.int32)
ONES = np.ones(2, np.int32)
STOP, NEW = 2, 4
Scored = dict[tuple[int, ...], float]


@pytest.fixture(scope="module")
def params(make: Make) -> Params:
    return make(PAIR, 1)


@pytest.fixture(scope="module")
def log_probs(params: Params) -> list[Scored]:
    """Log-probability of every sequence of up to NEW tokens of each row, from one forward pass."""
    from tjx_nn import bind

    every = np.array(list(itertools.product(range(4), repeat=NEW)), np.int32)
    found = []
    for row in range(2):
        targets = np.concatenate([np.ones((len(every), 1), np.int32), every], 1)
        source, mask = (np.repeat(x[row : row + 1], len(every), 0) for x in (SOURCE, MASK))
        logits = jax.jit(lambda p, s, t, m: bind(PAIR, p)(s, t, source_mask=m))(
            params, *jax.device_put((source, targets, mask))
        )
        steps = np.asarray(logits, np.float64)[:, :-1]
        steps -= np.log(np.exp(steps).sum(-1, keepdims=True))
        sums = np.cumsum(np.take_along_axis(steps, every[:, :, None], 2)[:, :, 0], 1)
        found.append(
            {
                tuple(sequence[: n + 1].tolist()): float(sums[i, n])
                for i, sequence in enumerate(every)
                for n in range(NEW)
            }
        )
    return found


def finished(sequence: tuple[int, ...]) -> bool:
    return STOP not in sequence[:-1] and (sequence[-1] == STOP or len(sequence) == NEW)


def by_hand(log_probs: Scored, beams: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search in NumPy, as documented."""
    alive: list[tuple[int, ...]] = [()]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, NEW + 1):
        grown = [(*sequence, token) for sequence in alive for token in range(4)]
        ended += [(log_probs[s] / length**penalty, s) for s in grown if s[-1] == STOP]
        grown = [s for s in grown if s[-1] != STOP]
        alive = sorted(grown, key=lambda s: -log_probs[s])[:beams]
    ended += [(log_probs[s] / NEW**penalty, s) for s in alive]
    return sorted(ended, reverse=True)[:beams]


def search(params: Params, beams: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    tokens, scores = beam_search(
        PAIR, params, START, ONES,
        beams=beams, max_new_tokens=NEW, length_penalty=penalty, stop_token=STOP,
        source=SOURCE, source_mask=MASK,
    )  # fmt: skip
    return np.asarray(tokens), np.asarray(scores)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_wide_beams_equal_exhaustive_search(
    params: Params, log_probs: list[Scored], penalty: float
) -> None:
    tokens, scores = search(params, 28, penalty)
    for row, all_of_row in enumerate(log_probs):
        every = [(p / len(s) ** penalty, s) for s, p in all_of_row.items() if finished(s)]
        check(tokens[row], scores[row], sorted(every, reverse=True)[:28])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_narrow_beams_equal_numpy_beam_search(
    params: Params, log_probs: list[Scored], penalty: float
) -> None:
    tokens, scores = search(params, 2, penalty)
    for row, all_of_row in enumerate(log_probs):
        check(tokens[row], scores[row], by_hand(all_of_row, 2, penalty))


def check(
    tokens: np.ndarray, scores: np.ndarray, expected: list[tuple[float, tuple[int, ...]]]
) -> None:
    np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-4, atol=1e-5)
    for found, (_, sequence) in zip(tokens.tolist(), expected, strict=True):
        assert tuple(found) == (*sequence, *[STOP] * (NEW - len(sequence)))


def test_one_beam_of_gpt_is_greedy_decoding(tiny: GPTConfig, make: Make) -> None:
    params = make(tiny)
    prompt = np.random.default_rng(1).integers(0, 23, (3, 7), np.int32)
    lengths = np.array([7, 1, 4], np.int32)
    greedy = generate(tiny, params, prompt, lengths, max_new_tokens=6)
    tokens, _ = beam_search(tiny, params, prompt, lengths, beams=1, max_new_tokens=6)
    np.testing.assert_array_equal(np.asarray(tokens)[:, 0], np.asarray(greedy))


def test_errors_and_empty_results(params: Params) -> None:
    with pytest.raises(ValueError, match="beams: got 0") as error:
        beam_search(
            PAIR, params, START, ONES, beams=0, max_new_tokens=20, length_penalty=float("nan")
        )
    assert len(str(error.value).splitlines()) == 4  # and no source, and too long
    tokens, scores = beam_search(
        PAIR, params, START, ONES, beams=3, max_new_tokens=0, source=SOURCE, source_mask=MASK
    )
    assert tokens.shape == (2, 3, 0)
    assert scores.shape == (2, 3)
