"""The server, tested with OpenAI's client over a socket."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tiny_server import Served

from tjx_data import byte_tokenizer
from tjx_eval.serving import connections

TOKENIZER = byte_tokenizer()
LONG = 40


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    found = Served(TOKENIZER)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as found:
        yield found


def options(i: int) -> dict[str, Any]:
    """Return the options of request `i`; all differ."""
    extra = {"top_k": 20 + i} if i % 3 == 0 else {}
    return {
        "model": "tiny", "prompt": f"request {i}", "max_tokens": 8 + i % 24, "seed": i,
        "temperature": (0.0, 1.0, 1.5)[i % 3], "top_p": 0.8 if i % 4 == 1 else 1.0,
        "extra_body": extra,
    }  # fmt: skip


def test_32_concurrent_requests_get_the_same_texts_as_sequential_ones(
    served: Served, client: openai.OpenAI
) -> None:
    alone = [client.completions.create(**options(i)) for i in range(32)]

    async def one(asking: openai.AsyncOpenAI, i: int) -> tuple[str, str, int]:
        if i % 2:
            answer = await asking.completions.create(**options(i))
            assert answer.usage is not None
            choice = answer.choices[0]
            return choice.text, choice.finish_reason, answer.usage.completion_tokens
        text, reason, used = "", "", 0
        stream = await asking.completions.create(
            **options(i), stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.text
                reason = choice.finish_reason or reason
            used = chunk.usage.completion_tokens if chunk.usage else used
        return text, reason, used

    async def all_at_once() -> list[tuple[str, str, int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as asking:
            return await asyncio.gather(*(one(asking, i) for i in range(32)))

    together = asyncio.run(all_at_once())
    for i, answer in enumerate(alone):
        choice = answer.choices[0]
        assert answer.usage is not None
        expected = (choice.text, choice.finish_reason, answer.usage.completion_tokens)
        assert together[i] == expected, i
    assert len({text for text, _, _ in together}) > 28
    assert served.engine.state()["running"] == served.engine.state()["waiting"] == 0


def test_lists_of_prompts_tokens_and_several_continuations(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 5, "temperature": 1.0}
    answer = client.completions.create(prompt=["one", "two"], n=2, echo=True, **ask)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert texts[0] != texts[1]
    alone = client.completions.create(prompt="two", **ask)
    assert texts[2] == "two" + alone.choices[0].text
    tokens = [TOKENIZER.eot_id or 0, *TOKENIZER.encode("two")]
    assert client.completions.create(prompt=tokens, **ask).choices == alone.choices
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == len(tokens)
    assert {model.id for model in client.models.list()} == {"tiny"}
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stop_text_ends_the_completion_and_is_not_returned(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny", "prompt": "x", "max_tokens": LONG, "seed": 1, "temperature": 1.2,
    }  # fmt: skip
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[7:9]
    cut = client.completions.create(**ask, stop=["never there", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = [c.choices[0].text for c in client.completions.create(**ask, stop=stop, stream=True)]
    assert "".join(pieces) == cut.text


def test_every_token_has_log_probabilities(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model="tiny", prompt="ab", max_tokens=5, temperature=0, logprobs=3
    ).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 5
    for log_prob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert log_prob == pytest.approx(max(top.values()), rel=1e-5)  # greedy
        assert log_prob < 0
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2, seed=0,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [len(each.top_logprobs) for each in content.content] == [2] * 4


def test_chat_uses_the_documented_template(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "seed": 4, "temperature": 1.0}
    answer = client.chat.completions.create(messages=messages, **ask).choices[0]
    plain = client.completions.create(
        prompt="System: Be brief.\n\nUser: Hi\n\nAssistant:", **ask, stop=["\n\nUser:"]
    ).choices[0]
    assert answer.message.role == "assistant"
    assert answer.message.content == plain.text.lstrip()
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **ask))
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.message.content


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"max_tokens": 64}, 400, "context is 64 tokens"),
        ({"prompt": "x" * 80}, 400, "the prompt has 81"),
        ({"prompt": [999]}, 400, "expected 0 to"),
        ({"prompt": []}, 400, "prompt: expected a text"),
        ({"prompt": [2**70]}, 400, "no token of this model"),
        ({"prompt": [-1]}, 400, "no token of this model"),
        ({"prompt": "\ud800"}, 400, "surrogate pair"),
        ({"stop": "\udfff"}, 400, "surrogate pair"),
        ({"stop": "x" * 1001}, 400, "expected at most 1000 per text"),
        ({"temperature": 3}, 400, "temperature: got 3"),
        ({"temperature": float("nan")}, 400, "NaN is not JSON"),
        ({"max_tokens": True}, 400, "max_tokens: got True"),
        ({"top_p": 0}, 400, "top_p: got 0.0"),
        ({"stop": [""]}, 400, "none of them empty"),
        ({"n": 100}, 400, "expected at most 64"),
        ({"frequency_penalty": 1}, 400, "not supported"),
        ({"temprature": 1}, 400, "did you mean temperature?"),
        ({"model": "gpt-4"}, 404, "there is 'tiny'"),
        ({"echo": True, "logprobs": 1}, 400, "not supported with echo"),
        ({"stream_options": {}}, 400, "only with stream"),
        ([], 400, "not a JSON object"),
    ],
)
def test_invalid_requests_are_rejected_in_the_openai_format(
    served: Served, body: Any, status: int, message: str
) -> None:
    content = json.dumps({"prompt": "a", "max_tokens": 2, **body} if body else body)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, message in error["message"]) == (status, True), error
    assert error["type"] in ("invalid_request_error", "not_found_error")


def test_only_this_machine_and_json_are_accepted(served: Served) -> None:
    url, body = f"{served.url}/v1/completions", b'{"prompt": "a"}'

    def code(**options: Any) -> int:
        return httpx.post(url, **{"content": body, **options}).status_code

    kind = {"content-type": "application/json"}
    assert code(headers=kind) == 200
    assert code(headers={"content-type": "text/plain"}) == 415
    assert code(headers={**kind, "host": "evil.example:80"}) == 403
    assert code(headers={**kind, "host": "127.0.0.1.evil.example"}) == 403
    assert code(headers={**kind, "host": "localhost:1"}) == 200
    assert code(content=b'{"prompt": ' * 9, headers=kind) == 400
    assert code(content=b"[" * 200_000, headers=kind) == 400
    assert code(content=b'{"prompt": "a", "prompt": "b"}', headers=kind) == 400
    assert code(content=b" " * (1 << 20) + body, headers=kind) == 413
    assert code(content=iter([b" " * (1 << 20), body]), headers=kind) == 413
    answer = httpx.get(f"{served.url}/v1/nothing")
    assert (answer.status_code, "error" in answer.json()) == (404, True)
    assert httpx.get(url).status_code == 405
    answer = httpx.get(f"{served.url}/health", headers={"origin": "https://evil.example"})
    assert answer.json()["status"] == "ok"
    assert "access-control-allow-origin" not in answer.headers


def test_too_many_completions_are_rejected_before_encoding(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_arguments: Any) -> Any:
        raise AssertionError("encoded before the check")

    monkeypatch.setattr(type(TOKENIZER), "encode_prompt", encode)
    body = {"prompt": ["a"] * 2000, "n": 128, "max_tokens": 1}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "256000 completions" in answer.json()["error"]["message"]


def test_idle_connections_do_not_block_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "max_connections", lambda: 4)
    address = served.socket.getsockname()[:2]
    silent = [socket.create_connection(address, timeout=30) for _ in range(9)]
    try:
        assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
        closed = 0
        for one in silent[:5]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            closed += 1
        assert closed == 5
    finally:
        for one in silent:
            one.close()
    # A connection with an incomplete request is closed too.
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    with socket.create_connection(address, timeout=30) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) == b""


def wait_until(true: Any) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("timeout")


def test_a_disconnect_frees_the_slot_and_a_full_queue_rejects() -> None:
    served = Served(TOKENIZER, slots=1, max_waiting=2, api_key="secret key")
    # Block the steps, so that requests are still running when the test checks them.
    gate = threading.Event()
    step = served.engine.decoder.step

    def slow(active: Any) -> Any:
        gate.wait(30)
        return step(active)

    served.engine.decoder.step = slow  # type: ignore[method-assign]
    body = {"prompt": "a", "max_tokens": 50, "stream": True}
    headers = {"authorization": "Bearer secret key"}
    url = f"{served.url}/v1/completions"
    try:
        assert httpx.post(url, json=body).status_code == 401
        wrong = {"authorization": "Bearer secret kez"}
        assert httpx.post(url, json=body, headers=wrong).json()["error"]["code"] == (
            "invalid_api_key"
        )
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        state = served.engine.state
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60):
            wait_until(lambda: state()["running"] == 1)
            two = {**body, "n": 2}
            with httpx.stream("POST", url, json=two, headers=headers, timeout=60):
                wait_until(lambda: state()["waiting"] == 2)
                answer = httpx.post(url, json=body, headers=headers, timeout=60)
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "1"
                assert httpx.get(f"{served.url}/health").json()["waiting"] == 2
            wait_until(lambda: state()["waiting"] == 0)
        wait_until(lambda: state()["running"] == 0)
        gate.set()
        # The slot is free for the next request.
        short = {"prompt": "a", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(url, json=short, headers=headers, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        gate.set()
        served.stop()


def test_stopping_ends_running_requests_within_the_grace_period() -> None:
    served = Served(TOKENIZER, slots=1)
    gate = threading.Event()
    step = served.engine.decoder.step

    def slow(active: Any) -> Any:
        gate.wait(30)
        return step(active)

    served.engine.decoder.step = slow  # type: ignore[method-assign]
    url = f"{served.url}/v1/completions"
    body = {"prompt": "a", "max_tokens": 50, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as running:
        wait_until(lambda: served.engine.state()["running"] == 1)
        served.engine.stop(0.0)
        assert httpx.post(url, json=body, timeout=60).status_code == 503
        assert httpx.get(f"{served.url}/health").json()["status"] == "stopping"
        gate.set()
        lines = [line for line in running.iter_lines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["message"] == "the server has stopped"
    served.stop()
    assert served.engine.state()["status"] == "failed"
