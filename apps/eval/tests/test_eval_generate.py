"""`generate`: streamed text equals generated text; a conversation is its own context."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import tiny_run

from tjx_eval.commands import nanogpt
from tjx_eval.errors import EvalError
from tjx_eval.generation.completions import CompletionStream
from tjx_eval.generation.conversation import chat
from tjx_eval.load_model import TrainedModel, load_model
from tjx_eval.main import main
from tjx_nn import bind
from tjx_trainer.tasks.sampling import SamplingParams, generate_text

CHOICE: SamplingParams = {
    "samples": 3, "max_new_tokens": 10, "temperature": 1.0, "top_k": 50, "top_p": 0.95,
    "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load_model(tiny_run())


@pytest.mark.key_reuse
def test_streamed_texts_equal_generated_texts(model: TrainedModel) -> None:
    texts = generate_text(model.gpt, model.params, model.tokenizer, "12 ", **CHOICE)
    stream = CompletionStream(model, model.tokenizer.encode_prompt("12 "), **CHOICE)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == texts[0]
    assert [each.text for each in stream.completions] == texts
    assert {each.finish_reason for each in stream.completions} == {"length"}
    assert len(set(texts)) == 3
    # A stop text ends each completion at its first occurrence, and the stream when all ended.
    stop = texts[0][4]
    stopped = CompletionStream(model, model.tokenizer.encode_prompt("12 "), stops=[stop], **CHOICE)
    assert "".join(stopped) == texts[0][: texts[0].index(stop)]
    for each, text in zip(stopped.completions, texts, strict=True):
        assert each.text == text.partition(stop)[0]
        assert each.finish_reason == ("stop" if stop in text else "length")


def test_the_command_prints_samples_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("12 ")
    words = ["generate", str(tiny_run()), "--samples", "2", "--max_new_tokens", "10"]
    capsys.readouterr()  # of the training run, if this is its first test
    found = tmp_path / "found.json"
    more = ["--prompt_file", str(prompt), "--json", str(found), "--top_p", "0.9", "--seed", "4"]
    assert main([*words, *more, "--quantization", "int4", "--kv_cache", "int8"]) == 0
    record = json.loads(found.read_text())
    texts = [each["text"] for each in record["samples"]]
    assert capsys.readouterr().out == f"12 {texts[0]}\n----\n12 {texts[1]}\n"
    assert record["options"]["top_p"] == 0.9
    assert [len(each["tokens"]) for each in record["samples"]] == [10, 10]


class Keyboard:
    """Returns lines; an exception in place of a line is a key such as Ctrl-C."""

    def __init__(self, lines: list[Any]) -> None:
        self._lines: Iterator[Any] = iter(lines)

    def __call__(self, prompt: str) -> str:
        assert prompt == "> "
        line = next(self._lines)
        if isinstance(line, type):
            raise line
        assert isinstance(line, str)
        return line


class Terminal:
    """Collects output; raises Ctrl-C once, after a number of pieces."""

    def __init__(self, interrupted_after: int) -> None:
        self.text, self._left = "", interrupted_after

    def __call__(self, text: str) -> None:
        self.text += text
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_a_conversation_is_the_context_of_its_next_answer(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watched(CompletionStream):
        def __init__(self, model: TrainedModel, prompt: Any, **options: Any) -> None:
            seen.append(model.tokenizer.decode(prompt))
            super().__init__(model, prompt, **options)

    monkeypatch.setattr("tjx_eval.generation.conversation.CompletionStream", Watched)
    choice: SamplingParams = {"max_new_tokens": 4, "temperature": 1.0, "top_k": None, "seed": 0}
    keyboard = Keyboard(["1 ", KeyboardInterrupt, "2 sheep", "3", EOFError])
    terminal = Terminal(interrupted_after=2)
    turns = chat(model, "", stops=[], params=choice, read_line=keyboard, write=terminal)
    text = terminal.text
    assert turns == len(seen) == 3
    assert "(stopped)" in text
    assert "(Ctrl-D exits)" in text
    said = text.partition(" (stopped)")[0]
    assert len(said) == 2  # the two pieces before Ctrl-C are kept
    end = model.tokenizer.eot_id
    start = model.tokenizer.decode([end]) if end is not None else ""
    assert seen[0] == f"{start}1 \n"
    whole = f"1 \n{said}" + ("" if said.endswith("\n") else "\n") + "2 sheep\n"
    assert seen[1].removeprefix(start) == whole[-(12 - bool(start)) :]
    assert "dropped the oldest" in text
    assert all(len(model.tokenizer.encode(each.removeprefix(start))) <= 12 for each in seen)
    with pytest.raises(EvalError, match="leaves no room for a question"):
        chat(model, "", stops=[], params={**choice, "max_new_tokens": 16}, read_line=keyboard)


@pytest.mark.key_reuse
def test_the_context_window_slides_beyond_max_seq_len() -> None:
    model = load_model(tiny_run())
    prompt = model.tokenizer.encode_prompt("12 sheep")
    choice: SamplingParams = {"samples": 2, "max_new_tokens": 20, "temperature": 0.0, "seed": 0}
    stream = CompletionStream(model, prompt, **choice)
    text = "".join(stream)
    (tokens, same) = (each.tokens for each in stream.completions)
    assert tokens == same
    assert len(tokens) == 20
    assert text == model.tokenizer.decode(tokens)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return bind(model.gpt, params)(tokens)

    known, params = list(prompt), jax.device_get(model.params)
    for token in tokens:
        window = known[-15:]
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(window)] = window
        with jax.transfer_guard("allow"):
            found = jax.device_get(logits(params, padded))
        # The first tokens attend to all previous ones, up to max_seq_len.
        assert found[0, len(window) - 1].argmax() == token
        known.append(token)


def test_flags_of_sample_py_are_translated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tiny_run()
    words = ["--nanogpt", f"--out_dir={run}", "--start='12 sheep'", "--num_samples=2"]
    assert main([*words, "--max_new_tokens", "20", "--temperature=0.5"]) == 0
    out, err = capsys.readouterr()
    assert out.count("12 sheep") == 2
    assert "max_seq_len is 16 tokens; beyond it" in err
    assert main(["--nanogpt", "--num_sample=3", "--init_from=gpt2", "--top_k"]) == 2
    errors = capsys.readouterr().err
    assert "did you mean num_samples?" in errors
    assert "--top_k: its value is missing" in errors
    assert "--init_from: got gpt2; expected resume" in errors


def test_help_lists_every_flag_of_sample_py(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--nanogpt", "--help"], ["generate", "--nanogpt", "-h"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert {f"--{name}" for name in nanogpt._DEFAULTS} <= set(printed.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "leave out one"),
        (["--prompt_file", "{tmp}/no"], "cannot be read"),
        (["--interactive", "--samples", "2"], "--interactive: not supported with --samples"),
        (["--temperature", "-1", "--max_new_tokens", "2"], "temperature: got -1.0"),
        (["--top_p", "2", "--max_new_tokens", "2"], "top_p: got 2.0"),
    ],
)
def test_mistakes_are_reported(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny_run()), *(w.format(tmp=tmp_path) for w in words)]) == 2
    assert message in capsys.readouterr().err
