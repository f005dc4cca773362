"""lm-evaluation-harness on local tasks: exact log-likelihoods, no network access."""

import functools
import json
import os
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import tiny_run
from lm_eval.tasks import TaskManager

from tjx_eval.load_model import TrainedModel, load_model
from tjx_eval.main import main
from tjx_eval.scoring.lm_harness import HarnessModel
from tjx_nn import GPTConfig, bind
from tjx_trainer.tasks.sampling import generate_text

# Libraries of the harness issue deprecation warnings.
pytestmark = pytest.mark.filterwarnings("default")

CHOICES = """
task: sheep_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITING = """
task: sheep_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [
    ("1 sh", ["eep", "and"], 0),
    ("2 sheep", ["p", " and"], 1),
    ("3 sheep and mo", ["re more", "  "], 0),
]


class Instance:
    """A request of the harness."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load_model(tiny_run())


def log_likelihood(model: TrainedModel, before: list[int], text: list[int]) -> tuple[float, bool]:
    """Return the float64 sum from the model's logits, and whether the text is greedy."""
    tokens = (before + text)[-17:]
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(tokens) - 1] = tokens[:-1]
    with jax.transfer_guard("allow"):
        logits = np.asarray(_logits(model.gpt, jax.device_get(model.params), padded), np.float64)[0]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    places = range(len(tokens) - 1 - len(text), len(tokens) - 1)
    found = [(log_p[i, tokens[i + 1]], log_p[i].argmax() == tokens[i + 1]) for i in places]
    return float(sum(p for p, _ in found)), all(hit for _, hit in found)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: GPTConfig, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    return bind(config, params)(tokens)


def test_log_likelihoods_equal_a_computation_in_float64(model: TrainedModel) -> None:
    harness = HarnessModel(model, batch_size=8)
    encode = model.tokenizer.encode
    start = [harness.eot_token_id]
    pairs = [("1 sh", "eep"), ("", "2 sheep"), ("more more more more m", "ore"), ("3 ", "sheep")]
    pairs += [(f"{i} s", "heep and"[: 1 + i % 8]) for i in range(9)]
    found = harness.loglikelihood([Instance(*pair) for pair in pairs], disable_tqdm=True)
    for (before, text), (value, greedy) in zip(pairs, found, strict=True):
        whole = encode(before + text)
        # The harness moves trailing spaces of the context to the text.
        cut = len(encode(before.rstrip()))
        context, rest = (whole[:cut], whole[cut:]) if before else (start, whole)
        expected, writes = log_likelihood(model, context, rest)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert greedy == writes
    assert harness.notes == {"contexts that are too long were truncated to their end"}
    text = "12 sheep and more more\n14 sheep and"
    tokens = encode(text)
    (rolling,) = harness.loglikelihood_rolling([Instance(text)], disable_tqdm=True)
    expected = log_likelihood(model, start, tokens[:16])[0]
    # Each later window starts with the last token of the previous one.
    expected += log_likelihood(model, tokens[15:16], tokens[16:32])[0]
    # The last window has as much context as possible.
    expected += log_likelihood(model, tokens[len(tokens) - 17 : 32], tokens[32:])[0]
    assert len(tokens) < 48
    assert rolling == pytest.approx(expected, rel=1e-5)


def test_local_tasks_run_without_a_network(
    model: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    written = [
        generate_text(
            model.gpt, model.params, model.tokenizer, question, max_new_tokens=5, temperature=0.0,
            top_k=None, seed=0,
        )[0].partition("\n")[0]
        for question, _, _ in QUESTIONS[:2]
    ] + ["never"]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": q, "choices": c, "label": label, "written": w}) + "\n"
            for (q, c, label), w in zip(QUESTIONS, written, strict=True)
        )
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for number, text in enumerate((CHOICES, WRITING)):
        (tasks / f"{number}.yaml").write_text(text.format(data=data))
    out = tmp_path / "found.json"
    words = ["tasks", str(tiny_run()), "--include_path", str(tasks), "--json", str(out)]
    assert main([*words, "--tasks", "sheep_choice,sheep_writing"]) == 0
    found = json.loads(out.read_text())["results"]
    encode = model.tokenizer.encode
    right = 0
    for question, choices, label in QUESTIONS:
        values = [log_likelihood(model, encode(question), encode(each))[0] for each in choices]
        right += int(np.argmax(values)) == label
    assert found["sheep_choice"]["acc,none"] == pytest.approx(right / 3)
    # The text that the model does not generate is wrong.
    assert found["sheep_writing"]["exact_match,none"] == pytest.approx(2 / 3)
    assert "sheep_choice" in capsys.readouterr().out
    assert os.environ["HF_HUB_OFFLINE"] == "1"

    def disconnected(**_: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.simple_evaluate", disconnected)
        assert main([*words, "--tasks", "sheep_choice"]) == 2
    error = capsys.readouterr().err
    assert "--tasks sheep_choice: the data of a task cannot be downloaded" in error
    assert "connect to the hub" in error

    # Reading the tasks of the harness takes seconds.
    class LocalTasks(TaskManager):  # type: ignore[misc]  # untyped
        def __init__(self, include_path: str, include_defaults: bool) -> None:
            assert include_defaults
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", LocalTasks)
    assert main([*words, "--tasks", "sheep_choise"]) == 2
    assert "did you mean sheep_choice?" in capsys.readouterr().err


def test_a_folder_without_tasks_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tasks", str(tiny_run()), "--tasks", "a", "--include_path", str(tmp_path)]
    assert main(words) == 2
    assert "which has no .yaml file" in capsys.readouterr().err
