"""Tasks grpo, dpo and kto: losses, metrics, exact resume, data and messages."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import only_one_device
from process_harness import records, run_attempt

import tjx_ckpt
import tjx_nn
import tjx_parallel
import tjx_rl
from tjx_data import (
    CHAT_TOKENS,
    ChatTemplate,
    Conversation,
    byte_tokenizer,
    char_tokenizer,
    encode_chat_prompt,
    encode_conversation,
)
from tjx_nn.layout import SINGLE_DEVICE
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.rl import grpo_task, preference_tasks, rollouts
from tjx_trainer.rl.episodes import run_episodes
from tjx_trainer.rl.examples import make_row
from tjx_trainer.rl.open_rl import open_tokenizer
from tjx_trainer.rl.preference_tasks import KTOTask
from tjx_trainer.rl.prompt_format import PromptFormat
from tjx_trainer.rl.rollouts import sample_responses
from tjx_trainer.rl.scoring import BatchCompleter, Scorer
from tjx_trainer.run_reader import SavedRun
from tjx_trainer.runtime.exit_codes import ExactError
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.train_state import TrainState

STEPS = 4
TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=32 --data.seq_len=14
--train.batch_size=8 --train.accumulation=2 --train.max_steps=4 --train.eval_every=4
--train.eval_tokens=100 --optimizer.learning_rate=1e-2 --log.every=1 --checkpoint.every=2
--mesh.data=1
""".split()  # noqa: SIM905  a list of words reads worse
GRPO = """
--task=grpo --data.corpus=arithmetic --rl.max_new_tokens=4 --rl.samples_per_prompt=4
--rl.kl_coefficient=0.1 --rl.eval_prompts=8 --rl.eval_samples=3
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def grpo(monkeypatch_module: pytest.MonkeyPatch) -> Job:
    # An untrained model is never right: reward short responses, so that there are advantages.
    monkeypatch_module.setitem(
        vars(tjx_rl), "verify",
        lambda _, responses, answers: [
            tjx_rl.Verdict(float(sum(map(ord, text)) % 2), None if answer else "none")
            for text, answer in zip(responses, answers, strict=True)
        ],
    )  # fmt: skip
    return build(*TINY, *GRPO)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def build(*words: str) -> Job:
    with only_one_device():
        return build_job(*open_task(resolve([*words])))


@pytest.fixture(scope="module")
def whole(grpo: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_attempt(grpo, path) == 0
    return path


@pytest.fixture(scope="module")
def whole_kto(kto: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_attempt(kto, path) == 0
    return path


class Digits:
    """Answers responses with text, up to three turns; remembers both."""

    episodes: ClassVar[list[list[str]]] = []

    def __init__(self, prompt: str, answer: str) -> None:
        assert answer.isdecimal()
        self.texts = [prompt]
        self.episodes.append(self.texts)

    def step(self, response: str) -> tjx_rl.EnvironmentStep:
        number = len(self.texts) // 2
        observation = None if "+" in response else f"={number}+"
        self.texts += [response, observation or ""]
        return tjx_rl.EnvironmentStep(observation, sum(map(ord, response)) % 2 / 2)


LONGER = [word for word in TINY if "seq_len=14" not in word] + ["--data.seq_len=28"]


@pytest.fixture(scope="module")
def turns(monkeypatch_module: pytest.MonkeyPatch) -> Job:
    monkeypatch_module.setitem(tjx_rl.registered_environments, "digits", Digits)
    return build(*LONGER, *GRPO, "--rl.environment=digits", "--rl.max_turns=3")


@pytest.fixture(scope="module")
def whole_turns(turns: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_attempt(turns, path) == 0
    return path


@pytest.mark.key_reuse
def test_observations_are_read_and_not_trained_on(turns: Job, whole_turns: Path) -> None:
    Digits.episodes.clear()
    batch, metrics = completed(turns, 0, turns.initial_state())
    given: Any = jax.device_get(batch)
    tokenizer = turns.task.form.tokenizer  # type: ignore[attr-defined]
    assert len(Digits.episodes) == len(given["tokens"]) == 8
    for row, (prompt, *texts) in enumerate(Digits.episodes):
        ids: list[int] = tokenizer.encode_prompt(prompt)
        is_sampled: list[bool] = []
        first = len(ids)
        # The observation after the last response is not in the row.
        for number, text in enumerate(texts[:-1]):
            end = [tokenizer.eot_id] if number % 2 == 0 and len(text) < 4 else []
            ids += [*tokenizer.encode(text), *end]
            is_sampled += [number % 2 == 0] * (len(ids) - first - len(is_sampled))
        assert given["tokens"][row][: len(ids) - 1].tolist() == ids[:-1]
        wanted = np.full(28, -100)
        wanted[first - 1 : len(ids) - 1] = np.where(is_sampled, ids[first:], -100)
        assert given["labels"][row].tolist() == wanted.tolist()
    ignored = given["labels"] < 0
    assert not given["weights"][ignored].any()
    assert not given["sampler_log_probs"][ignored].any()
    # The trainer computes the log-probabilities of later turns from the same contexts.
    assert metrics["gap_max"] < 1e-4
    assert 1 < metrics["turns"] <= 3
    rewards = [
        sum(sum(map(ord, text)) % 2 / 2 for text in texts[1::2]) for texts in Digits.episodes
    ]
    assert metrics["reward"] == pytest.approx(np.mean(rewards))
    lines = [line for line in records(whole_turns) if "train/turns" in line]
    assert len(lines) == STEPS
    assert max(line["train/gap_max"] for line in lines) < 1e-4


def test_episodes_end_before_a_context_that_is_too_long() -> None:
    class Talks:
        def step(self, _: str) -> tjx_rl.EnvironmentStep:
            return tjx_rl.EnvironmentStep("=" * 3, 1.0)

    form = PromptFormat(char_tokenizer(["0123456789+="], ()), None, None)

    def sample(contexts: Any, _: int) -> rollouts.Rollouts:
        assert max(map(len, contexts)) <= 14
        return rollouts.Rollouts([[1, 2]] * 2, [np.zeros(2, np.float32)] * 2)

    prompts = [[1] * 4, [1] * 10]
    found = run_episodes(
        form, prompts, dict.fromkeys(range(2), Talks()), sample, max_turns=9, max_context=14
    )
    assert [(each.turns, each.score, len(each.tokens)) for each in found] == [(3, 3, 12), (1, 1, 2)]


def final_bits(job: Job, path: Path) -> list[bytes]:
    with tjx_ckpt.Checkpointer(path / "checkpoints") as checkpointer:
        state = checkpointer.restore(job.abstract, step=STEPS)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


def completed(job: Job, step: int, state: TrainState) -> Any:
    assert job.complete_batch is not None
    return job.complete_batch(step, job.task.train_data.batch(step), state)


def log_probs_by_logits(job: Job, params: Any, tokens: Any, labels: Any) -> Any:
    """Return log-probabilities [rows, T] by the logits, which training never makes."""
    model: Any = tjx_nn.bind(job.config.model, params)
    logits = model(tokens)
    return jnp.take_along_axis(
        jax.nn.log_softmax(logits, -1), jnp.maximum(labels, 0)[..., None], -1
    )[..., 0]


class Killed(BaseException):
    """Ends a process without warning."""


def kill(*_: object) -> Any:
    raise Killed


@pytest.mark.parametrize(
    ("task", "moment"),
    [
        ("grpo", "before the rollout"),
        ("grpo", "in the rollout"),
        ("grpo", "in the save"),
        ("kto", "before the step"),
        ("turns", "in the rollout"),
    ],
)
def test_a_run_that_dies_resumes_bit_for_bit(
    task: str, moment: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    job: Job = request.getfixturevalue(task)
    whole: Path = request.getfixturevalue("whole" if task == "grpo" else f"whole_{task}")
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if moment == "in the rollout":
            calls = itertools.count()  # an evaluation draws three times first
            sample, last = sample_responses, 2 if task == "turns" else 0
            patch.setattr(
                grpo_task, "sample_responses",
                lambda *a, **k: kill()
                if not k["greedy"] and k["turn"] == last and next(calls) == 6 else sample(*a, **k),
            )  # fmt: skip
        else:
            beat = ("save", STEPS) if moment == "in the save" else ("train", 3)
            patch.setattr(Watchdog, "beat", lambda _, *now: kill() if now == beat else None)
        with pytest.raises(Killed):
            run_attempt(job, path)
    assert tjx_ckpt.list_steps(path / "checkpoints") == [2]
    assert run_attempt(job, path) == 0
    assert final_bits(job, path) == final_bits(job, whole)
    assert records(path)[-1] == records(whole)[-1]


def test_the_metrics_of_a_run_describe_its_rollouts(grpo: Job, whole: Path) -> None:
    lines = [line for line in records(whole) if "train/reward" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert 0 <= line["train/pass_rate"] <= 1
        assert 1 <= line["train/response_length"] <= grpo.config.rl.max_new_tokens
        assert 0 < line["train/entropy"] < 3  # nats; 14 tokens
        assert line["train/clip_fraction"] == 0
        assert 0 <= line["train/gap_mean"] <= line["train/gap_max"] < 1e-4
        assert line["train/verifier_failures"] == 0
    assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-6)  # the policy is the reference
    assert lines[-1]["train/kl"] > 1e-6
    last = records(whole)[-1]
    assert {"eval/accuracy", "eval/response_length"} <= set(last)
    assert 0 <= last["eval/pass_at_1"] <= last["eval/pass_at_3"] <= 3 * last["eval/pass_at_1"]


def test_a_teacher_gives_each_token_an_advantage(grpo: Job, whole: Path) -> None:
    run = RunDirectory(whole)
    run.write_config(grpo.config)
    grpo.task.record(run)
    words = [*TINY, *GRPO, "--seed=5"]
    alone, job = (
        build(*words, *more)
        for more in ([], [f"--distill.teacher={whole}", "--distill.weight=0.75"])
    )
    state = job.initial_state()
    (rewarded, _), (batch, metrics) = (completed(each, 0, state) for each in (alone, job))
    teacher, _ = SavedRun(whole).load_params(job.mesh)
    log_probs = jax.jit(functools.partial(log_probs_by_logits, job))
    inputs = (batch["tokens"], batch["labels"])
    of_teacher, of_student, given, advantages = jax.device_get((
        log_probs(teacher, *inputs), log_probs(state.params, *inputs), batch, rewarded["advantages"]
    ))  # fmt: skip
    mask = given["labels"] >= 0
    difference = np.where(mask, of_teacher - of_student, 0)
    assert np.ptp(difference[mask]) > 1e-2
    expected = 0.25 * advantages + 0.75 * difference
    np.testing.assert_allclose(given["advantages"], expected, atol=1e-5)
    assert metrics["teacher_kl"] == pytest.approx(-difference[mask].mean(), abs=1e-6)
    _, found = job.train_step(state, batch)
    assert np.isfinite(jax.device_get(found)["grad_norm"])


def test_the_trainer_minimizes_the_loss_of_grpo(grpo: Job) -> None:
    state = grpo.initial_state()
    batch, _ = completed(grpo, 0, state)
    given: Any = jax.device_get(batch)
    assert np.any(given["advantages"] != 0)
    noise = 0.3 * np.random.default_rng(0).standard_normal(given["labels"].shape)
    noisy = {"old_log_probs": noise, "reference_log_probs": -noise, "sampler_log_probs": noise / 2}
    for name, change in noisy.items():
        given[name] = (given[name] + change).astype(np.float32)

    def loss(params: Any, given: Any) -> Any:
        log_probs = log_probs_by_logits(grpo, params, given["tokens"], given["labels"])
        return tjx_rl.policy_loss(
            "grpo", log_probs, given["old_log_probs"], given["advantages"], given["labels"] >= 0,
            reference_log_probs=given["reference_log_probs"], kl_coefficient=0.1,
            importance_weights=tjx_rl.truncated_importance_weights(
                given["old_log_probs"], given["sampler_log_probs"], cap=2.0
            ),
        )  # fmt: skip

    on_device = jax.device_put(given)
    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, on_device)
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(jax.device_get(gradient))))
    _, metrics = grpo.train_step(state, grpo.put(given))
    found: Any = jax.device_get(metrics)
    np.testing.assert_allclose(found["loss"], jax.device_get(value), rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-4)
    assert found["clip_fraction"] > 0
    assert found["tokens"] == np.sum(given["labels"] >= 0)


@pytest.mark.parametrize("steps", [STEPS, pytest.param(100, marks=pytest.mark.slow)])
def test_an_exact_run_has_no_gap_between_sampler_and_trainer(
    steps: int,
    grpo: Job,
    tmp_path: Path,
) -> None:
    tiny = [word for word in TINY if "max_steps" not in word]
    words = ["--rl.exact=true", f"--train.max_steps={steps}", "--train.precision=bf16"]
    job = build(*tiny, *GRPO, *words)
    assert run_attempt(job, tmp_path / "run") == 0
    lines = [line for line in records(tmp_path / "run") if "train/reward" in line]
    assert len(lines) == steps
    assert {line["train/gap_max"] for line in lines} == {0.0}
    assert lines[0]["train/kl"] == 0.0  # the policy is the reference, bit for bit
    assert lines[-1]["train/kl"] > 0
    # The training forward pass, whose derivative is taken, differs in the last bits.
    assert 0 < max(line["train/forward_gap"] for line in lines) < 0.05


def test_an_exact_run_has_the_gradients_of_the_training_forward_pass(grpo: Job) -> None:
    exact = build(*TINY, *GRPO, "--rl.exact=true")
    state = exact.initial_state()
    batch, _ = completed(exact, 0, state)
    batches: Any = jax.device_get(batch)
    _, found = exact.train_step(state, exact.put(batches))
    _, expected = grpo.train_step(grpo.initial_state(), grpo.put(batches))
    norms: Any = jax.device_get((found["grad_norm"], expected["grad_norm"]))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    assert norms[0] > 0


def test_unequal_bits_end_an_exact_run(grpo: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = build(*TINY, *GRPO, "--rl.exact=true")
    score = rollouts.score_responses
    monkeypatch.setattr(
        grpo_task, "score_responses",
        lambda *a, **k: np.nextafter(score(*a, **k), np.float32(-9)),
    )  # fmt: skip
    with pytest.raises(ExactError, match=r"rl\.exact: .* at step 1"):
        completed(exact, 0, grpo.initial_state())


def test_updates_on_a_rollout_keep_the_policy_that_sampled(grpo: Job) -> None:
    constant = ["--schedule.name=constant", "--schedule.warmup_steps=0"]
    twice = build(*TINY, *GRPO, *constant, "--rl.epochs=2")
    once = build(*TINY, *GRPO, *constant)
    batch, _ = completed(once, 0, once.initial_state())
    expected, _ = once.train_step(once.initial_state(), batch)
    expected, last = once.train_step(expected, batch)
    found, metrics = twice.train_step(twice.initial_state(), batch)
    for one, other in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert int(jax.device_get(found.step)) == 1
    counts: Any = jax.device_get((metrics["tokens"], last["tokens"], metrics["clip_fraction"]))
    assert counts[0] == 2 * counts[1]
    assert counts[2] > 0  # the second update is far from the sampling policy


def test_minibatches_have_the_loss_of_the_batch_as_their_mean(grpo: Job) -> None:
    generator = np.random.default_rng(0)
    mask = np.arange(10) < generator.integers(1, 10, (12, 1))
    losses = generator.standard_normal(mask.shape)
    equal = np.repeat([False, True, True], 4)  # the first group teaches nothing
    for skip in (False, True):
        rl = dataclasses.replace(grpo.config.rl, minibatches=3, skip_equal_groups=skip)
        weights = grpo_task.weights_of(rl, mask, equal)
        parts = [(weights * losses)[part::3].sum() / mask[part::3].sum() for part in range(3)]
        of_rows = (losses * mask).sum(1) / mask.sum(1)
        expected = of_rows[equal].mean() if skip else of_rows.mean()
        np.testing.assert_allclose(np.mean(parts), expected, rtol=1e-5)
    assert not grpo_task.weights_of(rl, mask, np.zeros(12, bool)).any()


@pytest.mark.parametrize("template", ["tjx", "plain"])
def test_a_chat_prompt_and_response_are_the_tokens_of_fine_tuning(
    template: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
    ChatTemplate.built_in(template, tokenizer).save(tmp_path)
    words = [*TINY, *GRPO, "--rl.chat=true", f"--train.init_from={tmp_path}"]
    form = PromptFormat.of(resolve(words), tokenizer)
    prompt, response = form.encode_prompt("1+1?"), form.encode_response("1+1?", "2")
    messages = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    tokens, is_answer = encode_conversation(
        ChatTemplate.load(tmp_path), tokenizer, Conversation(messages)
    )
    assert [*prompt, *response] == tokens[: np.flatnonzero(is_answer)[-1] + 1].tolist()
    assert tokenizer.decode([form.stop_token or 0]) == (
        "<|end|>" if template == "tjx" else "<|endoftext|>"
    )
    assert form.decode_response(response).strip() == "2"
    turns = [*messages, {"role": "user", "content": "=2"}]
    expected = encode_chat_prompt(ChatTemplate.load(tmp_path), tokenizer, turns)
    assert [*prompt, *response, *form.encode_observation("=2")] == expected


def test_rollouts_are_a_function_of_seed_step_and_parameters(grpo: Job) -> None:
    state = grpo.initial_state()
    first, again, other = (jax.device_get(completed(grpo, step, state)[0]) for step in (1, 1, 2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert np.any(first["tokens"] != other["tokens"])
    tokens, labels, sampled = (np.asarray(first[n]) for n in ("tokens", "labels", "weights"))
    mask = labels >= 0
    inner = mask[:, :-1] & mask[:, 1:]  # the last label of a row is no input
    np.testing.assert_array_equal(labels[:, :-1][inner], tokens[:, 1:][inner])
    assert len(np.unique(tokens[:4, :7], axis=0)) == 1  # one prompt, four samples
    assert not sampled[~mask].any()


def test_responses_in_slots_are_those_at_once(grpo: Job) -> None:
    assert isinstance(grpo.task, grpo_task.GRPOTask)
    slots = build(*TINY, *GRPO, "--rl.slots=3")
    assert isinstance(slots.task, grpo_task.GRPOTask)
    params, chosen = grpo.initial_state().params, grpo.task.train_data.batch(0)["example"]
    expected, _ = grpo.task.roll_out(0, chosen, params)
    found, metrics = slots.task.roll_out(0, chosen, params)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)
    lengths = (found["labels"] >= 0).sum(1)
    ends = np.zeros(3, int)
    for length in lengths:
        ends[ends.argmin()] += length - 1
    saved = 1 - 3 * ends.max() / (8 * (lengths.max() - 1))
    assert metrics["decode_saved"] == pytest.approx(saved)
    mesh = tjx_parallel.make_mesh(slots.config.mesh, jax.devices()[:1])
    two = jax.sharding.Mesh(np.repeat(mesh.devices, 2, 1), mesh.axis_names)
    scorer = Scorer(slots.config, SINGLE_DEVICE, None)
    with pytest.raises(ValueError, match=r"rl\.slots: got 3; expected a multiple of .* = 2; give"):
        BatchCompleter(slots.config, slots.task, scorer, two)


@pytest.fixture(scope="module")
def dpo(grpo: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("dpo")
    params = jax.device_get(grpo.initial_state().params)
    tjx_nn.hf.save(folder / "model", grpo.config.model, params)
    open_tokenizer(grpo.config).save(folder / "model" / "tokenizer.json")
    pairs = [
        {"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "=" * (1 + n % 3)}
        for n in range(10, 60)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["--task=dpo", f"--data.path={file}", f"--train.init_from={folder / 'model'}"]
    return build(*TINY, *words)


def test_dpo_learns_the_preferences_from_the_reference(dpo: Job, tmp_path: Path) -> None:
    assert run_attempt(dpo, tmp_path / "run") == 0
    lines = [line for line in records(tmp_path / "run") if "train/loss" in line]
    assert lines[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference
    assert lines[0]["train/reward_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["train/loss"] < np.log(2) - 0.001
    assert lines[-1]["train/reward_margin"] > 0
    assert lines[-1]["train/reward_accuracy"] > 0.5


KTO = ["--task=kto", "--rl.desirable_weight=1.5", "--rl.undesirable_weight=0.5"]


@pytest.fixture(scope="module")
def kto(dpo: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    responses = [
        {"prompt": f"{n}+{n}=", "completion": str(2 * n) if n % 3 else "=" * (1 + n % 4),
         "label": bool(n % 3)}
        for n in range(10, 60)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("kto") / "responses.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in responses))
    words = [f"--data.path={file}", f"--train.init_from={dpo.config.train.init_from}"]
    return build(*TINY, *KTO, *words)


def test_kto_learns_which_responses_are_desirable(kto: Job, whole_kto: Path) -> None:
    lines = [line for line in records(whole_kto) if "train/loss" in line]
    assert isinstance(kto.task, KTOTask)
    batch, _ = kto.task.responses(kto.task.train_data.batch(0)["example"])
    desirable = batch["desirable"].mean()
    # Policy and reference are equal: each value is 1/2.
    expected = (1.5 * desirable + 0.5 * (1 - desirable)) / 2
    assert lines[0]["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["train/reward_desirable"] > lines[-1]["train/reward_undesirable"]
    assert lines[-1]["train/reward_desirable"] > 0


def test_the_trainer_minimizes_the_loss_of_kto(kto: Job) -> None:
    state = kto.initial_state()
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32),
        jax.device_get(state.params),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    state = state._replace(params=jax.device_put(noisy, shardings))
    batch, _ = completed(kto, 0, state)
    given: Any = jax.device_get(batch)
    labels, good = given["labels"], given["desirable"]
    assert labels.shape == (8, 14)
    assert 0 < good.sum() < 8
    # Each prompt with the response of the next row.
    other = {"tokens": np.zeros((8, 14), np.int32), "labels": np.full((8, 14), -100, np.int32)}
    for row in range(8):
        prompt = given["tokens"][row, : np.argmax(labels[row] >= 0) + 1].tolist()
        response = labels[(row + 1) % 8]
        ids = [*prompt, *response[response >= 0].tolist()]
        other["tokens"][row, : len(ids) - 1] = ids[:-1]
        other["labels"][row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    initial = kto.initial_state().params

    def sums(params: Any, tokens: Any, labels: Any) -> Any:
        found = log_probs_by_logits(kto, params, tokens, labels)
        return jnp.where(labels >= 0, found, 0).sum(-1)

    def loss(params: Any, initial: Any, given: Any, other: Any) -> Any:
        kl = (sums(params, **other) - sums(initial, **other)).mean()
        inputs = (given["tokens"], given["labels"])
        gain = 0.1 * (
            sums(params, *inputs)
            - sums(initial, *inputs)
            - jax.lax.stop_gradient(jnp.maximum(kl, 0))
        )
        good = given["desirable"]
        return jnp.where(good, 1.5 * jax.nn.sigmoid(-gain), 0.5 * jax.nn.sigmoid(gain)).mean(), kl

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, kl), gradient = compiled(
        state.params, initial, jax.device_put(given), jax.device_put(other)
    )
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(jax.device_get(gradient))))
    assert jax.device_get(kl) > 0.01
    _, metrics = kto.train_step(state, batch)
    found: Any = jax.device_get(metrics)
    np.testing.assert_allclose(found["kl"], jax.device_get(kl), rtol=1e-4)
    np.testing.assert_allclose(found["loss"], jax.device_get(value), rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-4)


def test_kto_means_over_the_kinds_and_long_unrelated_responses(kto: Job) -> None:
    assert isinstance(kto.task, KTOTask)
    everything, _ = kto.task.responses(np.arange(40))
    labels = everything["desirable"]
    for chosen in (np.arange(8), np.flatnonzero(labels)[:8]):
        batch, unrelated = kto.task.responses(chosen)
        total, kinds = np.sum(batch["labels"] >= 0), batch["kind_weights"]
        rewards = np.arange(8.0)
        for column, kind in enumerate((labels[chosen], ~labels[chosen])):
            expected = rewards[kind].mean() if kind.any() else np.nan
            np.testing.assert_allclose(
                (kinds[:, column] * rewards).sum() / total, expected, rtol=1e-6
            )
        assert unrelated["labels"].shape == (8, 14)
    long, short = [1] * 10, [2] * 10
    rows = [make_row(long, [3], 14), make_row([4], short, 14)]
    cut = preference_tasks._unrelated(*(np.stack(each) for each in zip(*rows, strict=True)))
    assert cut["labels"][0].tolist() == [-100] * 9 + [2] * 5
    assert cut["labels"][1].tolist() == [3] + [-100] * 13


@pytest.mark.parametrize("exact", ["false", "true"])
def test_adapters_are_sampled_and_compared_with_their_base(
    exact: str,
    grpo: Job,
    tmp_path: Path,
) -> None:
    job = build(*TINY, *GRPO, "--lora.rank=2", f"--rl.exact={exact}")
    state = job.initial_state()
    assert state.base is not None
    base = jax.device_get(state.base)
    assert run_attempt(job, tmp_path / "run") == 0
    lines = [line for line in records(tmp_path / "run") if "train/reward" in line]
    assert lines[0]["train/kl"] == pytest.approx(0, abs=0 if exact == "true" else 1e-6)
    assert lines[-1]["train/kl"] > 1e-7
    assert max(line["train/gap_max"] for line in lines) <= (0 if exact == "true" else 1e-4)
    with tjx_ckpt.Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        last = checkpointer.restore(job.abstract, step=STEPS)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(last.base), base)
    trained = jax.device_get((last.params, state.params))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, trained), strict=True))


def test_adapters_learn_preferences(dpo: Job, tmp_path: Path) -> None:
    words = [
        f"--data.path={dpo.config.data.path}",
        f"--train.init_from={dpo.config.train.init_from}",
    ]
    job = build(*TINY, "--task=dpo", *words, "--lora.rank=2")
    assert run_attempt(job, tmp_path / "run") == 0
    lines = [line for line in records(tmp_path / "run") if "train/loss" in line]
    assert lines[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["train/reward_margin"] > 0


def test_the_trainer_minimizes_the_loss_of_dpo(dpo: Job) -> None:
    state = dpo.initial_state()
    batch, _ = completed(dpo, 0, state)
    given: Any = jax.device_get(batch)
    rows, (b, two, t) = given["labels"].reshape(-1, 14), given["labels"].shape
    assert (b, two, t) == (8, 2, 14)

    def loss(params: Any, given: Any) -> Any:
        labels = given["labels"].reshape(rows.shape)
        found = log_probs_by_logits(dpo, params, given["tokens"].reshape(rows.shape), labels)
        policy = tjx_rl.sequence_log_probs(found, labels >= 0).reshape(8, 2)
        old = tjx_rl.sequence_log_probs(given["reference_log_probs"], given["labels"] >= 0)
        return tjx_rl.dpo_loss(policy[:, 0], policy[:, 1], old[:, 0], old[:, 1], beta=0.1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, jax.device_put(given))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(jax.device_get(gradient))))
    _, metrics = dpo.train_step(state, batch)
    found: Any = jax.device_get(metrics)
    np.testing.assert_allclose(found["loss"], jax.device_get(value), rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rl.beta=0.2"], "rl: got settings with task none; expected task grpo, dpo or kto"),
        ([*GRPO, "--train.batch_size=6"], "train.batch_size: got 6; expected a multiple of"),
        ([*GRPO, "--data.seq_len=4"], "rl.max_new_tokens: got 4; expected fewer than"),
        ([*GRPO, "--rl.exact=true", "--rl.slots=2"], "rl.exact: got true with slots"),
        ([*GRPO, "--rl.slots=0"], "rl.slots: got 0; expected at least 1"),
        ([*GRPO, "--mesh.stage=2"], "mesh.stage: got 2 with task grpo; expected 1"),
        (["--task=dpo"], "data.path: got none with task dpo; expected a .jsonl file"),
        (["--task=dpo"], "train.init_from: got none with task dpo"),
        (["--task=kto"], "with prompt, completion and label a line"),
        (
            [*KTO, "--train.batch_size=1", "--train.accumulation=1"],
            "train.batch_size: got 1 with task kto; expected at least 2",
        ),
        ([*KTO, "--rl.desirable_weight=0"], "rl.desirable_weight: got 0.0; expected above 0"),
        (["--task=gpro"], "task: got 'gpro'; expected one of none, sft, grpo, dpo, kto"),
        ([*GRPO, "--rl.minibatches=3"], "train.batch_size: got 8; expected a multiple of"),
        ([*GRPO, "--rl.minibatches=8"], "rl.minibatches=8 times train.accumulation"),
        ([*GRPO, "--rl.chat=true"], "rl.chat: got true with task grpo and train.init_from None"),
        (["--task=dpo", "--model.multi_token_loss=1"], "model.multi_token_loss: got 1.0 with task"),
        (["--task=dpo", "--rl.epochs=2"], "rl.minibatches: got 2 updates with task dpo"),
        (
            [*GRPO, "--rl.environment=calc"],
            "environment: got 'calc'; expected one of none, calculator",
        ),
        ([*GRPO, "--rl.max_turns=2"], "rl.max_turns: got 2 without environment; expected both"),
        (
            [*GRPO, "--rl.environment=calculator", "--rl.exact=true"],
            "rl.exact: got true with an env",
        ),
        (
            [*GRPO, "--distill.teacher=x", "--distill.temperature=2"],
            "distill.temperature: got 2.0 with task grpo; expected 1",
        ),
        (
            [*GRPO, "--distill.teacher=x", "--rl.skip_equal_groups=true"],
            "rl.skip_equal_groups: got True with distill.teacher",
        ),
        ([*GRPO, "--chat.template=tjx"], "chat: got one with task grpo; expected --task sft"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {word.partition("=")[0]: word for word in [*TINY, *words]}
    with pytest.raises((SystemExit, ValueError)) as error:
        resolve([*given.values()])
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("grpo", "{", "examples.jsonl:2: got no JSON"),
        ("grpo", '{"prompt": "1+1="}', "examples.jsonl:2: got ['prompt']; expected an object with"),
        ("grpo", '{"prompt": "1+1=", "answer": 2}', "the strings prompt, answer; correct"),
        (
            "grpo",
            '{"prompt": "1+1=1+1=1+1=", "answer": "2"}',
            "data.seq_len: got 14 with a prompt of 13",
        ),
        ("kto", '{"prompt": "1", "completion": "2"}', "examples.jsonl:2: got ['completion', 'pro"),
        (
            "kto",
            '{"prompt": "1", "completion": "2", "label": 1}',
            "the strings prompt, completion and true or false as label; correct the line",
        ),
        (
            "kto",
            '{"prompt": "2+2+2+2=", "completion": "1+1=1+1=", "label": false}',
            "data.seq_len: got 14; expected at least 17",
        ),
        ("kto", "", "desirable ones in both and undesirable ones to train on"),
    ],
)
def test_malformed_examples_are_named_with_their_line(
    task: str, line: str, message: str, dpo: Job, tmp_path: Path
) -> None:
    good = {"answer": "1"} if task == "grpo" else {"completion": "1", "label": True}
    lines = [json.dumps({"prompt": f"{n}+1=", **good}) for n in range(40)]
    file = tmp_path / "examples.jsonl"
    file.write_text("\n".join([lines[0], line, *lines[1:]]))
    words = [f"--data.path={file}", f"--train.init_from={dpo.config.train.init_from}"]
    with pytest.raises(ValueError, match="got") as error:
        build(*TINY, *(GRPO if task == "grpo" else KTO), *words)
    assert message in str(error.value)
