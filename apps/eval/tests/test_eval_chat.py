"""Chat with a fine-tuned run: the run's template and merged adapters, also in an export."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import tiny_run

from tjx_data import ChatTemplate
from tjx_eval.errors import EvalError
from tjx_eval.generation.conversation import TemplateContext, chat
from tjx_eval.load_model import load_model
from tjx_eval.main import main
from tjx_nn import lora
from tjx_trainer import main as trainer

FLAGS = """
--task=sft --data.tokenizer=byte --model.n_layer=1 --model.n_head=2 --model.d_model=8
--model.max_seq_len=48 --data.seq_len=48 --train.max_steps=2 --train.batch_size=8
--train.sample_tokens=0 --lora.rank=2 --optimizer.learning_rate=1e-2
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    records = [{"prompt": f"{n}+1?", "completion": f"{n + 1}"} for n in range(12)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = [f"--data.path={folder / 'chats.jsonl'}", f"--run_dir={folder / 'run'}"]
    assert trainer.main([*FLAGS, *words]) == 0
    return folder / "run"


def test_the_command_answers_with_the_template(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    words = ["generate", str(run), "--chat", "--prompt", "1+1?", "--max_new_tokens", "3"]
    assert main([*words, "--json", str(found)]) == 0
    record = json.loads(found.read_text())
    tokenizer = load_model(run).tokenizer
    assert tokenizer.decode(record["prompt_tokens"]) == (
        "<|endoftext|><|user|>1+1?<|end|><|assistant|>"
    )
    assert capsys.readouterr().out == record["samples"][0]["text"] + "\n"
    assert main(["generate", str(tiny_run()), "--chat", "--prompt", "1"]) == 2
    assert "a run of --task sft has one" in capsys.readouterr().err


def test_pass_at_k_samples_answers_with_the_template(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    file.write_text('{"prompt": "1+1?", "answer": "2"}\n')
    seen: list[Any] = []

    def complete_all(_: object, requests: list[Any], *, slots: int) -> list[str]:
        assert slots == len(requests)
        seen.extend(requests)
        return ["3", "It is 2", "2"]

    monkeypatch.setattr("tjx_eval.generation.batch.complete_all", complete_all)
    words = ["--samples", "3", "--k", "1,3", "--max_new_tokens", "3", "--chat"]
    prompts = ["--prompts", str(file), "--json", str(found)]
    assert main(["pass_at_k", str(run), *prompts, *words]) == 0
    record = json.loads(found.read_text())
    assert (record["pass_at_1"], record["pass_at_3"]) == (pytest.approx(2 / 3), 1)
    decoded = {load_model(run).tokenizer.decode(each.prompt) for each in seen}
    assert decoded == {"<|endoftext|><|user|>1+1?<|end|><|assistant|>"}
    assert "<|end|>" in seen[0].stops
    assert len({each.options["seed"] for each in seen}) == 3


def test_messages_are_the_context_of_the_next_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(run)
    monkeypatch.setattr("tjx_eval.generation.conversation._answer", lambda *_: "yes\n")
    lines = iter(["one", "two <|end|>", "three"])

    def read_line(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    shown: list[str] = []
    contexts: list[str] = []
    original: Any = TemplateContext.tokens

    def tokens(self: TemplateContext) -> list[int]:
        found: list[int] = original.fget(self)
        contexts.append(model.tokenizer.decode(found))
        return found

    monkeypatch.setattr(TemplateContext, "tokens", property(tokens))
    template = ChatTemplate.load(run)
    params: Any = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    turns = chat(
        model, "Hi", stops=[], params=params, template=template,
        read_line=read_line, write=shown.append,
    )  # fmt: skip
    assert turns == 2
    assert contexts[-1] == (
        "<|endoftext|><|system|>Hi<|end|><|user|>one<|end|><|assistant|>yes<|end|>"
        "<|user|>three<|end|><|assistant|>"
    )
    assert any("special token" in text for text in shown)
    context = TemplateContext(model, 8, "", template)
    context.add("a" * 15)
    context.add("b" * 9, by_model=True)
    assert context.add("c" * 14) == "dropped the oldest 2 messages"
    with pytest.raises(ValueError, match="tokens too many"):
        context.add("d" * 40)
    with pytest.raises(EvalError, match="leaves no room for a question"):
        TemplateContext(model, 47, "", template)


def test_an_export_has_merged_parameters_and_the_template(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert main(["export", str(run), str(out)]) == 0
    model, exported = load_model(run), load_model(out)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(*jax.device_get((x, y))),
        model.params, exported.params,
    )  # fmt: skip
    messages = [{"role": "user", "content": "1+1?"}]
    assert exported.chat_template().render(messages) == model.chat_template().render(messages)
    generation = json.loads((out / "generation_config.json").read_text())
    special = model.tokenizer.special_tokens
    assert generation["eos_token_id"] == [special["<|endoftext|>"], special["<|end|>"]]


def test_adapters_are_exported_for_peft(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapters"
    assert main(["export", str(run), str(out), "--format", "peft"]) == 0
    model = load_model(run)
    assert model.run is not None
    low_rank, read = lora.load(out, model.gpt)
    assert low_rank.scale == model.run.config.lora.scale
    saved, step = model.run.load_adapters(model.mesh)
    assert step == 2
    up, expected = read["blocks"]["mlp"]["up"], jax.device_get(saved)["blocks"]["mlp"]["up"]
    np.testing.assert_array_equal(up["b"], expected["b"])
    assert main(["export", str(tiny_run()), str(tmp_path / "none"), "--format", "peft"]) == 2
    assert "got a run without adapters" in capsys.readouterr().err
