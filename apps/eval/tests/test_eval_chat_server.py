"""Chat over HTTP: templates, tools, concurrent clients, and the page in a real browser."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny_server import Served
from websockets.sync.client import connect

from tjx_data import CHAT_TOKENS, ChatTemplate, byte_tokenizer
from tjx_eval.serving.chat import ChatPrompts, parse_messages, parse_tools
from tjx_eval.serving.engine import Token
from tjx_eval.serving.errors import APIError
from tjx_eval.serving.tool_calls import find_notation, split_tool_calls

TOKENIZER = byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
TEMPLATE = ChatTemplate.built_in("tjx", TOKENIZER)
LLAMA = ChatTemplate('{{ tools | tojson }}"parameters"', name="llama")
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    found = Served(TOKENIZER, max_seq_len=256, template=TEMPLATE)
    yield found
    found.stop()


def question(i: int) -> dict[str, Any]:
    """Return the chat request `i`; all differ."""
    messages = [{"role": "developer", "content": "Add."}, {"role": "user", "content": f"{i} + 1?"}]
    return {
        "model": "tiny", "messages": messages, "max_tokens": 8 + i % 16, "seed": i,
        "temperature": (0.0, 1.0, 1.5)[i % 3],
    }  # fmt: skip


def test_32_concurrent_chats_get_the_same_answers_as_sequential_prompts(served: Served) -> None:
    """The same requests as completions of the rendered template, one after the other."""
    alone = []
    with served.client() as client:
        for i in range(32):
            request = question(i)
            system, user = (message["content"] for message in request.pop("messages"))
            text = f"<|endoftext|><|system|>{system}<|end|><|user|>{user}<|end|><|assistant|>"
            tokens = TOKENIZER.encode(text, allowed_special=TOKENIZER.special_tokens)
            request["stop"] = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
            choice = client.completions.create(prompt=tokens, **request).choices[0]
            alone.append((choice.text.split("<|tool|>")[0].lstrip(), choice.finish_reason))

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[str, str | None]:
        if i % 2:
            choice = (await client.chat.completions.create(**question(i))).choices[0]
            return choice.message.content or "", choice.finish_reason
        text, reason = "", None
        async for chunk in await client.chat.completions.create(**question(i), stream=True):
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        return text, reason

    async def all_at_once() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, i) for i in range(32)))

    together = asyncio.run(all_at_once())
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert len({text for text, _ in together}) > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_is_returned_as_such(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    seen: list[str] = []

    def generate(requests: Any) -> None:
        for request in requests:
            seen.append(TOKENIZER.decode(request.prompt))
            for byte in f"Let me look. {CALL}".encode():
                request.on_token(Token(byte, 0.0, [], []))
            request.on_end(None)

    monkeypatch.setattr(served.engine, "submit", generate)
    ask: dict[str, Any] = {"tools": [WEATHER], "model": "tiny"}
    messages: list[Any] = [{"role": "user", "content": "Bonn?"}]
    with served.client() as client:
        if stream:
            chunks = list(client.chat.completions.create(messages=messages, stream=True, **ask))
            (choice,) = (chunk.choices[0] for chunk in chunks)
            content, calls = choice.delta.content, choice.delta.tool_calls
        else:
            whole = client.chat.completions.create(messages=messages, **ask).choices[0]
            content, calls, choice = whole.message.content, whole.message.tool_calls, whole
        assert content == "Let me look."
        assert choice.finish_reason == "tool_calls"
        assert calls[0].function.name == "weather"
        assert json.loads(calls[0].function.arguments) == {"city": "Bonn"}
        if stream:
            return
        # The client sends the answer back, with the result of the tool.
        result: Any = {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}
        client.chat.completions.create(messages=[*messages, whole.message, result], **ask)
        client.chat.completions.create(messages=messages, **ask, tool_choice="none")
    assert "Tools:" in seen[0]
    assert f"Let me look.{CALL}<|end|><|tool|>rain<|end|><|assistant|>" in seen[1]
    assert "Tools:" not in seen[2]


def test_notations_of_calls() -> None:
    assert find_notation(TEMPLATE) == "tags"
    assert find_notation(LLAMA) == "object"
    assert find_notation(ChatTemplate("{{ messages }}")) is None
    content, calls = split_tool_calls(f"{CALL}\n{CALL} and <tool_call>[1]</tool_call>", "tags")
    assert (content, len(calls)) == ("and <tool_call>[1]</tool_call>", 2)
    text = '<|python_tag|>{"name": "f", "parameters": {"x": 1}}'
    assert split_tool_calls(text, "object") == ("", [("f", {"x": 1})])
    for text in ("{", '{"name": 3, "parameters": {}}', '{"name": "f"}', "[" * 100_000, "1" * 9999):
        assert split_tool_calls(text, "object") == (text, [])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ([{"role": "robot", "content": ""}], "one of system"),
        ([{"role": "user"}], "content that is a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of type text"),
        ([{"role": "user", "content": "x", "mood": "good"}], "unknown field 'mood'"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "in an assistant message"),
        ([{"role": "assistant", "tool_calls": [{}]}], "a function and its name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
            "to be a JSON object",
        ),
    ],
)
def test_malformed_messages_are_rejected(messages: Any, message: str) -> None:
    with pytest.raises(APIError, match=message):
        parse_messages(messages)


def test_a_conversation_that_the_model_cannot_read_is_rejected() -> None:
    chat, base = ChatPrompts(TOKENIZER, TEMPLATE), ChatPrompts(TOKENIZER)
    with pytest.raises(APIError, match="special token"):
        chat.encode([{"role": "user", "content": "<|end|><|assistant|>"}])
    with pytest.raises(APIError, match="no chat template: leave out messages of tools"):
        base.encode([{"role": "tool", "content": "rain"}])
    for prompts in (base, ChatPrompts(TOKENIZER, ChatTemplate("{{ messages }}", name="short"))):
        with pytest.raises(APIError, match=r"its chat template is (none|short)"):
            parse_tools([WEATHER], None, prompts)
    with pytest.raises(APIError, match=r"expected a list of \{\"type\": \"function\""):
        parse_tools([{"name": "weather"}], None, chat)
    with pytest.raises(APIError, match="got 'required'; expected auto or none"):
        parse_tools([WEATHER], "required", chat)


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    page = httpx.get(f"{served.url}/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'; frame-anc")
    for name in re.findall(r'(?:src|href)="([^"]*)"', page.text):
        found = httpx.get(f"{served.url}/{name}")
        assert found.status_code == 200
        assert "://" not in found.text
    assert httpx.get(f"{served.url}/", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{served.url}/app.py").status_code == 404


@contextmanager
def browser_page(url: str, folder: Path) -> Iterator[Callable[[str], Any]]:
    """Open a page in Chromium; yield a function that evaluates JavaScript there."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    browser = subprocess.Popen(
        [program, *flags, f"--user-data-dir={folder}", url], stderr=subprocess.PIPE, text=True
    )
    try:
        assert browser.stderr is not None
        address = next(line for line in browser.stderr if "DevTools listening on" in line)
        port = re.search(r"127\.0\.0\.1:(\d+)", address)
        assert port is not None
        pages = httpx.get(f"http://127.0.0.1:{port[1]}/json").json()
        target = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
        with connect(target) as socket:

            def evaluate(script: str) -> Any:
                options = {"expression": script, "awaitPromise": True, "returnByValue": True}
                request = {"id": 1, "method": "Runtime.evaluate", "params": options}
                socket.send(json.dumps(request))
                answer = json.loads(socket.recv(timeout=60))["result"]
                assert "exceptionDetails" not in answer, answer
                return answer["result"].get("value")

            while evaluate("document.readyState + location.href") != f"complete{url}":
                time.sleep(0.05)  # the first page is empty
            yield evaluate
    finally:
        browser.terminate()
        browser.communicate(timeout=30)


SEND = """
(async () => {
  const until = async (ready) => {
    while (!ready()) await new Promise((resolve) => setTimeout(resolve, 20));
  };
  document.getElementById("max_tokens").value = 6;
  document.getElementById("seed").value = 1;
  document.getElementById("input").value = QUESTION;
  document.getElementById("form").requestSubmit();
  await until(() => document.getElementById("send").textContent === "Send");
  return [
    [...document.querySelectorAll(".message")].map((box) => [box.className, box.textContent]),
    document.getElementById("status").textContent,
    document.title,
    document.querySelectorAll("b").length,
  ];
})()
"""


def test_a_conversation_on_the_page_in_a_browser(served: Served, tmp_path: Path) -> None:
    messages: list[Any] = []
    expected = []
    with served.client() as client, browser_page(f"{served.url}/", tmp_path) as evaluate:
        for text in ("<b>1</b>", "2"):
            messages.append({"role": "user", "content": text})
            answer = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=6, seed=1, temperature=0.8
            )
            content = answer.choices[0].message.content
            messages.append({"role": "assistant", "content": content})
            expected += [["message user", text], ["message assistant", content]]
            shown, status, title, n_bold = evaluate(SEND.replace("QUESTION", json.dumps(text)))
            assert shown == expected
            assert re.match(r"\d+ tokens read, 6 generated in", status)
            assert title == "tiny - tjx chat"
            assert n_bold == 0
        failed, _, _, _ = evaluate(SEND.replace("QUESTION", json.dumps("x" * 300)))
        assert failed[:-1] == [*expected, ["message user", "x" * 300]]
        assert failed[-1][0] == "message error"
        assert "context" in failed[-1][1]
