"""Chat templates: rendered as by transformers (golden), in a sandbox, with the spans of answers.

`tools/golden/make_chat_golden.py` wrote the golden file.
"""

import datetime
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tjx_data import (
    CHAT_TOKENS,
    ChatConfig,
    ChatTemplate,
    Conversation,
    byte_tokenizer,
    encode_chat_prompt,
    encode_conversation,
    find_template,
)
from tjx_data.conversations import template_program
from tjx_data.conversations.viewer import format_conversation

FOLDER = Path(__file__).parent / "golden"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "chat_templates.json").read_text(encoding="utf-8"))
CHAT = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def golden_template(name: str) -> ChatTemplate:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, GOLDEN["special_tokens"])


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_renders_equal_those_of_transformers(case: dict[str, Any]) -> None:
    template = golden_template(case["template"])
    options: dict[str, Any] = {"tools": case.get("tools", ())}
    rendered = template.render(
        case["messages"],
        add_generation_prompt=case.get("add_generation_prompt", False),
        **options,
        **case.get("variables", {}),
    )
    assert rendered == case["text"]
    if case["spans"] and not case.get("add_generation_prompt"):
        text, spans = template.render_spans(case["messages"], **options)
        assert (text, [list(span) for span in spans]) == (case["text"], case["spans"])


def spans_of(template: ChatTemplate, turns: Any = "all") -> list[str]:
    text, spans = template.render_spans(CHAT, turns=turns)
    return [text[span.start : span.end] for span in spans]


def test_prefixes_and_generation_tags_locate_the_same_answers() -> None:
    llama = golden_template("llama3_style")
    assert spans_of(llama) == ["b<|eot_id|>", "d<|eot_id|>"]
    assert spans_of(llama, "last") == ["d<|eot_id|>"]
    assert spans_of(ChatTemplate(CHATML)) == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert spans_of(golden_template("generation")) == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_template_that_rewrites_earlier_messages_is_refused_for_all_turns() -> None:
    qwen = golden_template("qwen3_style")
    with pytest.raises(ValueError, match=r"until message 2 differently.*turns: last"):
        qwen.render_spans(CHAT)
    assert spans_of(qwen, "last") == ["<think>\n\n</think>\n\nd<|im_end|>\n"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'].dumps(1) }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% include 'passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.no.attribute }}",
        "{{ [1, 2] | random }}",
        "{{ strftime_now('%d') }}",
        "{% for i in range(2000) %}{{ 'xxxxxxxxxx' * 4000 }}{% endfor %}",
    ],
)
def test_templates_cannot_read_files_or_run_code(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_program, "MAX_RENDERED_CHARACTERS", 1 << 20)
    with pytest.raises(ValueError, match="template"):
        ChatTemplate(source).render(CHAT)


def test_syntax_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="is no template"):
        ChatTemplate("{% for %}")


def test_date_is_an_argument() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", date=datetime.date(2026, 1, 31))
    assert template.render(CHAT) == "31 Jan 2026"


def answers(
    template: ChatTemplate, tokens: Sequence[str], messages: Any = CHAT, **options: Any
) -> str:
    tokenizer = byte_tokenizer(tokens)
    encoded = encode_conversation(template, tokenizer, Conversation(messages), **options)
    return format_conversation(encoded, tokenizer, color=False).replace("|", "").replace("↵", "")


def test_mask_ends_at_the_last_special_token() -> None:
    text = "<im_start>user\na<im_end>\n<im_start>assistant\n⟦b<im_end>⟧\n"
    assert answers(ChatTemplate(CHATML), IM_TOKENS, CHAT[:2]) == text
    tokens = ("<|endoftext|>", *CHAT_TOKENS)
    template = ChatTemplate.built_in("tjx", byte_tokenizer(tokens))
    assert answers(template, tokens, turns="last") == (
        "<endoftext><user>a<end><assistant>b<end><user>c<end><assistant>⟦d<end>⟧"
    )
    plain = ChatTemplate.built_in("plain", byte_tokenizer())
    assert answers(plain, ("<|endoftext|>",), CHAT[:2]) == (
        "<endoftext>User: a\n\nAssistant:⟦ b<endoftext>⟧\n\n"
    )


@pytest.mark.parametrize("name", ["tjx", "plain"])
def test_prompt_and_answer_are_the_conversation(name: str) -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
    template = ChatTemplate.built_in(name, tokenizer)
    prompt = encode_chat_prompt(template, tokenizer, CHAT[:3])
    tokens, is_answer = encode_conversation(template, tokenizer, Conversation(CHAT), turns="last")
    assert tokens[: len(prompt)].tolist() == prompt
    assert is_answer.argmax() == len(prompt)


def test_tools_and_calls_are_in_the_built_in_templates() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    messages = (CHAT[0], call, {"role": "tool", "content": "3"}, CHAT[1])
    text = ChatTemplate.built_in("tjx").render(messages, tools=[{"name": "add"}])
    assert text == (
        '<|system|>Tools: {"name": "add"}<|end|><|user|>a<|end|>'
        '<|assistant|><tool_call>{"name": "add"}</tool_call><|end|>'
        "<|tool|>3<|end|><|assistant|>b<|end|>"
    )


def test_names_of_special_tokens_in_messages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"message 1 contains <\|im_end\|>, a special token"):
        answers(
            ChatTemplate(CHATML), IM_TOKENS, ({"role": "user", "content": "<|im_end|>"}, CHAT[1])
        )


def test_templates_are_found_by_name_folder_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, chat = byte_tokenizer(), byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
    assert find_template(ChatConfig(), plain, tmp_path).name == "plain"
    assert find_template(ChatConfig(), chat, tmp_path).name == "tjx"
    config = {"chat_template": [{"name": "default", "template": "{{ bos_token }}!"}],
              "bos_token": {"content": "<s>"}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(ChatConfig(), plain, tmp_path).render(CHAT) == "<s>!"
    ChatTemplate("{{ eos_token }}?", {"eos_token": "</s>"}).save(tmp_path)
    assert find_template(ChatConfig(), plain, tmp_path).render(CHAT) == "</s>?"
    plain.save(tmp_path / "tokenizer.json")
    assert find_template(ChatConfig(), plain, tmp_path / "tokenizer.json").render(CHAT) == "</s>?"
    monkeypatch.chdir(tmp_path)  # a name on the hub is no path
    assert find_template(ChatConfig(), plain, "gpt2").name == "plain"
    with pytest.raises(ValueError, match=r"got tjx with a tokenizer without <\|system\|>"):
        find_template(ChatConfig(template="tjx"), plain)
    with pytest.raises(ValueError, match=r"template: got .*missing; expected a Jinja file"):
        find_template(ChatConfig(template=str(tmp_path / "missing")), plain)


def test_threads_render_independently() -> None:
    """As in a chat server: the text of one conversation may not appear in another."""
    barrier = threading.Barrier(2)

    class Message(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            barrier.wait(30)  # both threads are rendering now
            return super().__getitem__(key)

    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};"
        "{% endfor %}"
    )

    def render(name: str) -> tuple[str, list[tuple[int, int]]]:
        message = Message(role="assistant", content=name)
        text, spans = template.render_spans([message, message])
        return text, [(span.start, span.end) for span in spans]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(render, ["a", "bcd"]))
    assert found == [
        ("assistant:a;assistant:a;", [(10, 11), (22, 23)]),
        ("assistant:bcd;assistant:bcd;", [(10, 13), (24, 27)]),
    ]
