"""Generation: equivalence to the forward pass, ragged prompts, sampling, streaming, errors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import EncoderDecoderConfig, GPTConfig, bind, generate, stream
from tjx_nn.binding import Params
from tjx_nn.generation import decoding_loop
from tjx_nn.generation.prompt import Prompt, read_prompt
from tjx_nn.layers.scan_layers import clone_key

Run = Callable[..., np.ndarray]
Make = Callable[..., Params]
LENGTHS = np.array([7, 1, 4], np.int32)


@pytest.fixture(scope="module")
def config(tiny: GPTConfig) -> GPTConfig:
    return dataclasses.replace(tiny, max_seq_len=64)


@pytest.fixture(scope="module")
def params(config: GPTConfig, make: Make) -> Params:
    params = jax.device_get(make(config))
    # Without strong positions a random model repeats one token, which tests nothing.
    params["wpe"]["embedding"] = 20 * params["wpe"]["embedding"]
    on_device: Params = jax.device_put(params)
    return on_device


@pytest.fixture
def prompts() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 23, (3, 7), np.int32)


def greedy_without_cache(
    config: GPTConfig, params: Params, prompt: np.ndarray, new: int, run: Run
) -> list[int]:
    row = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, config.max_seq_len), np.int32)
        padded[0, : len(row)] = row
        row.append(int(run(config, params, padded)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


def test_logits_with_a_cache_equal_the_forward_pass(
    config: GPTConfig, params: Params, run: Run
) -> None:
    tokens = np.random.default_rng(2).integers(0, 23, (2, 12), np.int32)

    @jax.jit
    def decode_all(params: Params, tokens: jax.Array) -> jax.Array:
        """Read 4 tokens as a prompt and the rest one by one."""
        model = bind(config, params)
        blocks = model.unstacked_blocks()
        hidden, kv = model.prefill(blocks, tokens[:, :4])
        room = ((0, 0), (0, 8), (0, 0), (0, 0))
        cache = jax.tree.map(lambda entry: jnp.pad(entry, room), kv)
        logits = [model.logits(hidden)]
        for t in range(4, 12):
            positions = jnp.full((2, 1), t, jnp.int32)
            new = tokens[:, t : t + 1]
            step, cache = model.decode(blocks, new, positions, cache)
            logits.append(step)
        return jnp.concatenate(logits, axis=1)

    cached = np.asarray(decode_all(params, jax.device_put(tokens)))
    np.testing.assert_allclose(cached, run(config, params, tokens), atol=1e-6, rtol=1e-6)


def test_ragged_prompts_equal_single_prompts_and_the_plain_model(
    config: GPTConfig, params: Params, prompts: np.ndarray, run: Run
) -> None:
    together = np.asarray(generate(config, params, prompts, LENGTHS, max_new_tokens=6))
    assert min(len(set(row)) for row in together.tolist()) > 2
    for row, length in enumerate(LENGTHS):
        alone = prompts[row : row + 1, :length]
        single = generate(config, params, alone, np.array([length], np.int32), max_new_tokens=6)
        np.testing.assert_array_equal(together[row], np.asarray(single)[0])
        expected = greedy_without_cache(config, params, alone[0], 6, run)
        assert together[row].tolist() == expected


def test_samples_of_a_prompt_share_its_prefill(
    config: GPTConfig, params: Params, prompts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_read = []

    def read(model: Any, blocks: Any, prompt: Prompt, slots: int) -> Any:
        rows_read.append(len(prompt.tokens))
        return read_prompt(model, blocks, prompt, slots)

    monkeypatch.setattr(decoding_loop, "read_prompt", read)
    options: Any = {"max_new_tokens": 6, "temperature": 1.0, "seeds": np.arange(len(prompts) * 3)}
    shared = np.asarray(generate(config, params, prompts, LENGTHS, samples=3, **options))
    repeated = [np.repeat(x, 3, axis=0) for x in (prompts, LENGTHS)]
    np.testing.assert_array_equal(shared, generate(config, params, *repeated, **options))
    assert len({tuple(row) for row in shared[:3].tolist()}) == 3
    assert rows_read == [len(prompts), 3 * len(prompts)]
    greedy = generate(config, params, prompts, LENGTHS, samples=3, max_new_tokens=6)
    alone = np.asarray(generate(config, params, prompts, LENGTHS, max_new_tokens=6))
    np.testing.assert_array_equal(greedy, np.repeat(alone, 3, axis=0))
    with pytest.raises(ValueError, match="samples: got 0; expected at least 1"):
        generate(config, params, prompts, LENGTHS, samples=0, max_new_tokens=6)


def test_columns_after_a_prompt_are_ignored(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    other = prompts.copy()
    other[1, 1:] = -7
    other[2, 4:] = 22
    first, second = (
        np.asarray(generate(config, params, rows, LENGTHS, max_new_tokens=6))
        for rows in (prompts, other)
    )
    np.testing.assert_array_equal(first, second)


def test_new_lengths_and_temperatures_within_a_bucket_do_not_compile(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    with jax.transfer_guard("allow"):
        key = jax.random.key(0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )

    def sample(length: int, temperature: float) -> None:
        lengths = np.minimum(LENGTHS, length)
        generate(
            config, params, prompts[:, :length], lengths,
            max_new_tokens=6, temperature=temperature, key=clone_key(key),
        )  # fmt: skip

    sample(7, 1.0)
    assert compiled
    compiled.clear()
    for length, temperature in ((6, 1.0), (3, 0.5), (1, 2.0)):
        sample(length, temperature)
    assert not compiled


def test_a_row_repeats_its_stop_token(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    free = np.asarray(generate(config, params, prompts, LENGTHS, max_new_tokens=6))
    stop = int(free[0, 2])
    stopped = np.asarray(
        generate(config, params, prompts, LENGTHS, max_new_tokens=6, stop_token=stop)
    )
    for free_row, row in zip(free.tolist(), stopped.tolist(), strict=True):
        end = free_row.index(stop) if stop in free_row else 6
        assert row == free_row[:end] + [stop] * (6 - end)


def test_sampling_follows_the_key_and_top_1_is_greedy(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    with jax.transfer_guard("allow"):
        one, two = jax.random.key(1), jax.random.key(2)

    def sample(key: jax.Array | None, **kwargs: Any) -> np.ndarray:
        key = None if key is None else clone_key(key)
        return np.asarray(
            generate(
                config, params, prompts, LENGTHS, max_new_tokens=6, key=key, **kwargs
            )
        )  # fmt: skip

    np.testing.assert_array_equal(sample(one, temperature=1.0), sample(one, temperature=1.0))
    assert (sample(one, temperature=1.0) != sample(two, temperature=1.0)).any()
    greedy = sample(None)
    np.testing.assert_array_equal(sample(one, temperature=1.0, top_k=1), greedy)
    np.testing.assert_array_equal(sample(one, temperature=1e-6), greedy)


def test_samples_have_the_model_s_distribution(config: GPTConfig, params: Params, run: Run) -> None:
    with jax.transfer_guard("allow"):
        key = jax.random.key(5)
    rows = 4000
    prompt = np.full((rows, 1), 3, np.int32)
    ones = np.ones(rows, np.int32)
    new = np.asarray(
        generate(config, params, prompt, ones, max_new_tokens=1, temperature=0.7, key=key, top_k=9)
    )
    logits = run(config, params, prompt[:1])[0, 0] / 0.7
    logits[np.argsort(logits)[:-9]] = -np.inf
    expected = np.exp(logits) / np.exp(logits).sum()
    found = np.bincount(new[:, 0], minlength=config.vocab_size) / rows
    # Five standard deviations of a count.
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / rows))


def test_rows_end_with_any_of_several_stop_tokens(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    free = np.asarray(generate(config, params, prompts, LENGTHS, max_new_tokens=6)).tolist()
    stops = [free[0][1], free[1][2]]
    stopped = generate(config, params, prompts, LENGTHS, max_new_tokens=6, stop_token=stops)
    for free_row, row in zip(free, np.asarray(stopped).tolist(), strict=True):
        end = min((free_row.index(stop) for stop in stops if stop in free_row), default=5)
        assert row == free_row[: end + 1] + [free_row[end]] * (5 - end)


SEVERAL: dict[str, Any] = {"temperature": 1.0, "top_k": 9, "top_p": 0.95, "min_p": 0.01}


def test_samples_of_a_row_depend_only_on_its_seed(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    def sample(rows: list[int], seeds: list[int]) -> np.ndarray:
        given = (config, params, prompts[rows], LENGTHS[rows])
        new = generate(*given, max_new_tokens=6, seeds=np.array(seeds), **SEVERAL)
        return np.asarray(new)

    together = sample([0, 1, 2], [5, -1, 2**32 - 2])
    np.testing.assert_array_equal(sample([2, 0, 1], [2**32 - 2, 5, -1]), together[[2, 0, 1]])
    np.testing.assert_array_equal(sample([1], [-1]), together[1:2])
    assert (sample([0, 1, 2], [6, 7, 8]) != together).any(1).all()


def test_stream_yields_the_same_tokens_and_ends_with_the_last_row(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    seeds = np.arange(3)
    for options in ({}, {"seeds": seeds, "repetition_penalty": 1.3, **SEVERAL}):
        given: Any = {"max_new_tokens": 11, **options}
        whole = np.asarray(generate(config, params, prompts, LENGTHS, **given))
        pieces = list(stream(config, params, prompts, LENGTHS, **given))
        np.testing.assert_array_equal(np.stack(pieces, 1), whole)
        assert pieces[0].dtype == np.int32
    stops = whole[:, 2].tolist()
    ended = list(stream(config, params, prompts, LENGTHS, stop_token=stops, **given))
    longest = max(min(row.index(stop) for stop in stops if stop in row) for row in whole.tolist())
    assert len(ended) == longest + 1


def test_the_repetition_penalty_counts_prompt_and_continuation(
    config: GPTConfig, params: Params, prompts: np.ndarray, run: Run
) -> None:
    penalty = 1e4  # a token recurs only when no other is left
    given = (config, params, prompts, LENGTHS)
    new = np.asarray(generate(*given, max_new_tokens=11, repetition_penalty=penalty))
    for row, length in enumerate(LENGTHS):
        tokens = [*prompts[row, :length].tolist(), *new[row].tolist()]
        padded = np.zeros((1, config.max_seq_len), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = run(config, params, padded)[0]
        for t in range(length, len(tokens)):
            step = logits[t - 1].copy()
            for token in set(tokens[:t]):
                step[token] *= penalty if step[token] < 0 else 1 / penalty
            assert tokens[t] == step.argmax()


def test_log_probabilities_are_those_of_the_model(
    config: GPTConfig, params: Params, prompts: np.ndarray, run: Run
) -> None:
    options: Any = {"seeds": np.arange(3), "repetition_penalty": 1.3, **SEVERAL}
    given: Any = {"max_new_tokens": 11, **options}
    plain = np.asarray(generate(config, params, prompts, LENGTHS, **given))
    stop = int(plain[0, 4])
    tokens, log_probs = jax.device_get(
        generate(
            config, params, prompts, LENGTHS, stop_token=stop, return_log_probs=True, **given
        )
    )  # fmt: skip
    for row, length in enumerate(LENGTHS):
        end = [*tokens[row], stop].index(stop) + 1
        np.testing.assert_array_equal(tokens[row, :end], plain[row, :end])
        padded = np.zeros((1, config.max_seq_len), np.int32)
        padded[0, : length + 11] = [*prompts[row, :length], *tokens[row]]
        logits = run(config, params, padded)[0, length - 1 : length + 10].astype(np.float64)
        expected = logits[range(11), tokens[row]] - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(log_probs[row, :end], expected[:end], atol=1e-4)
        assert not log_probs[row, end:].any()


def test_encoder_decoder_generation_equals_its_forward_pass(make: Make) -> None:
    pair = EncoderDecoderConfig(
        vocab_size=23, source_vocab_size=7, max_seq_len=32, n_layer=2, n_encoder_layer=1,
        n_head=2, d_model=8, window=4,
    )  # fmt: skip
    params = make(pair)
    source = np.array([[3, 1, 4, 1, 5], [5, 6, 0, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    start, lengths = np.array([[1, 9, 9], [1, 0, 0]], np.int32), np.array([3, 1], np.int32)
    given: Any = {"max_new_tokens": 12, "source": source, "source_mask": mask}
    new = np.asarray(generate(pair, params, start, lengths, **given))
    streamed = list(stream(pair, params, start, lengths, **given))
    np.testing.assert_array_equal(np.stack(streamed, 1), new)

    @jax.jit
    def greedy(params: Params, source: jax.Array, mask: jax.Array, target: jax.Array) -> jax.Array:
        return bind(pair, params)(source, target, source_mask=mask).argmax(-1)

    targets = np.zeros((2, 15), np.int32)
    for row, length in enumerate(lengths):
        targets[row, : length + 12] = [*start[row, :length], *new[row]]
    expected = np.asarray(greedy(params, *jax.device_put((source, mask, targets))))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(new[row], expected[row, length - 1 : length + 11])
    with pytest.raises(ValueError, match="source: got None"):
        generate(pair, params, start, lengths, max_new_tokens=2)
    with pytest.raises(ValueError, match="source: got 33 tokens; expected at most max_seq_len 32"):
        generate(
            pair, params, start, lengths, max_new_tokens=2, source=np.zeros((2, 33), np.int32)
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected a row for each of the"):
        generate(pair, params, start, lengths, max_new_tokens=2, source=source[:1])
    with pytest.raises(
        ValueError, match=r"source ids: got values from 7 to 7;.*source_vocab_size is 7"
    ):
        generate(
            pair, params, start, lengths, max_new_tokens=2, source=np.full((2, 3), 7, np.int32)
        )


def test_empty_requests_give_empty_results(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    assert generate(config, params, prompts, LENGTHS, max_new_tokens=0).shape == (3, 0)
    none = prompts[:0], LENGTHS[:0]
    tokens, log_probs = generate(
        config, params, *none, max_new_tokens=4, return_log_probs=True
    )  # fmt: skip
    assert tokens.shape == log_probs.shape == (0, 4)
    assert list(stream(config, params, *none, max_new_tokens=4)) == []


def test_all_errors_are_in_one_exception(
    config: GPTConfig, params: Params, prompts: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="prompt_lengths") as error:
        generate(
            config, params, prompts, np.array([7, 0, 9], np.int32),
            max_new_tokens=60, temperature=1.0, top_k=0,
        )  # fmt: skip
    with pytest.raises(TypeError, match="topk"):
        generate(config, params, prompts, LENGTHS, max_new_tokens=1, topk=4)  # type: ignore[call-overload]  # that is the test
    with pytest.raises(ValueError, match="tokens_per_call: got 0"):
        stream(config, params, prompts, LENGTHS, max_new_tokens=1, tokens_per_call=0)
    with pytest.raises(ValueError, match="without an encoder"):
        generate(config, params, prompts, LENGTHS, max_new_tokens=1, source=prompts)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "max_seq_len 64" in lines[1]
    wrong, length = np.array([[0, 99]], np.int32), np.array([2], np.int32)
    with pytest.raises(ValueError, match="prompt ids: got values from 0 to 99"):
        generate(config, params, wrong, length, max_new_tokens=1)


def test_prompt_and_continuation_may_fill_max_seq_len(config: GPTConfig, params: Params) -> None:
    prompt = np.ones((1, 60), np.int32)
    new = generate(config, params, prompt, np.array([60], np.int32), max_new_tokens=4)
    assert new.shape == (1, 4)


def test_a_reused_key_raises_in_debug_mode(config: GPTConfig, params: Params) -> None:
    with jax.debug_key_reuse(True):
        key = jax.jit(jax.random.key, static_argnums=0)(3)

        def call() -> None:
            prompt, lengths = np.array([[1, 2]], np.int32), np.array([2], np.int32)
            generate(config, params, prompt, lengths, max_new_tokens=3, temperature=1.0, key=key)

        call()
        with pytest.raises(jax.errors.KeyReuseError):
            call()
