"""Conversations: formats of records, malformed records, and the order of roles."""

import json
from pathlib import Path
from typing import Any

import pytest

from tjx_data import (
    ChatConfig,
    parse_conversation,
    parse_preference,
    read_conversations,
    read_preferences,
)

QUESTION, ANSWER = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Add."}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, QUESTION, ANSWER], "id": 7},
        {"system": "Add.", "conversations": [
            {"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]},
        {"system": "Add.", "instruction": "1 + 2?", "input": "", "output": "3"},
        {"prompt": [SYSTEM, QUESTION], "completion": "3"},
    ],
    ids=["messages", "sharegpt", "alpaca", "completion"],
)  # fmt: skip
def test_formats_of_one_conversation_give_equal_messages(record: dict[str, Any]) -> None:
    assert parse_conversation(record).messages == (SYSTEM, QUESTION, ANSWER)


def test_alpaca_input_follows_the_instruction() -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert parse_conversation(record).messages[0]["content"] == "Add.\n\n1, 2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "is a JSON list; expected an object"),
        ({"text": "x"}, "expected one of 'messages'"),
        ({"messages": [QUESTION, ANSWER], "sistem": "x"}, "unknown key 'sistem'"),
        ({"messages": []}, "messages: got an empty list"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{**QUESTION, "role": "usr"}]}, "'usr'.*did you mean 'user'"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2: content is missing"),
        ({"messages": [QUESTION, {**ANSWER, "content": " \n"}]}, "message 2: content is empty"),
        ({"messages": [QUESTION, {**ANSWER, "content": 3}]}, "message 2: content is not a string"),
        ({"messages": [QUESTION, {**ANSWER, "content": "\ud800"}]}, "a lone surrogate"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 1}]}, "message 2 has the unknown key"),
        ({"messages": [ANSWER, QUESTION]}, "message 1 is by assistant at the start"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "message 2 is by user after user"),
        ({"messages": [QUESTION, SYSTEM, ANSWER]}, "message 2 is by system after user"),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, "its last message is by user"),
        ({"messages": [QUESTION, {**QUESTION, "tool_calls": [{}]}]}, "not an assistant's list"),
        ({"messages": [QUESTION, ANSWER], "tools": "add"}, "tools: expected a list"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 1 is from 'bot'"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "turn 1 has the unknown key 'text'"),
        ({"instruction": "", "output": "x"}, "instruction is empty"),
        ({"prompt": "x"}, "has the keys"),
        ({"completion": "x"}, "prompt: got NoneType"),
    ],
)  # fmt: skip
def test_malformed_records_raise_the_reason(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversation(record)


def test_ignored_keys_are_removed() -> None:
    record = {"messages": [QUESTION, {**ANSWER, "weight": 1}], "source": "x"}
    assert parse_conversation(record, ignored=["weight", "source"]).messages == (QUESTION, ANSWER)


def test_tool_calls_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "3"}
    found = parse_conversation({"messages": [QUESTION, call, result, result, ANSWER]})
    assert found.messages[1]["content"] == ""


def test_preferences_share_the_prompt() -> None:
    wrong = {**ANSWER, "content": "4"}
    given = [
        {"prompt": "1 + 2?", "chosen": "3", "rejected": "4"},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, wrong]},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [wrong]},
    ]
    for record in given:
        pair = parse_preference(record)
        assert (pair.prompt, pair.chosen, pair.rejected) == ((QUESTION,), (ANSWER,), (wrong,))
    assert pair.conversations()[1].messages == (QUESTION, wrong)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "chosen": "3", "rejected": "3"}, "equal chosen and rejected"),
        ({"prompt": "x", "chosen": "3"}, "rejected: got NoneType"),
        ({"chosen": [QUESTION, ANSWER], "rejected": [{**QUESTION, "content": "?"}, ANSWER]},
         "expected an answer by the assistant after the shared prompt"),
        ({"prompt": "x", "chosen": "3", "rejected": [ANSWER, QUESTION]}, "rejected: expected an"),
    ],
)  # fmt: skip
def test_malformed_preferences_raise_the_reason(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_preference(record)


def test_malformed_lines_are_listed_with_file_and_line_or_skipped(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    good = json.dumps({"messages": [QUESTION, ANSWER]})
    file.write_text(f'{good}\n\n{{"messages": [}}\n{{"a": 1, "a": 2}}\n{{"messages": []}}\n{good}')
    with pytest.raises(ValueError, match="3 of 5 records are malformed") as raised:
        read_conversations(file)
    for line in (3, 4, 5):
        assert f"{file}:{line}: " in str(raised.value)
    found, malformed = read_conversations(file, ChatConfig(skip_malformed=True))
    assert [each.location for each in found] == [f"{file}:1", f"{file}:6"]
    assert [(each.file, each.line) for each in malformed] == [(str(file), n) for n in (3, 4, 5)]


def test_arrays_are_read_and_other_files_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "x", "chosen": "3", "rejected": "4"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair], indent=1))
    found, _ = read_preferences(tmp_path / "pairs.json")
    assert [each.location[-2:] for each in found] == [":1", ":2"]
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: got a file of text; expected \.jsonl"):
        read_conversations(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"bad\.json: not a JSON array"):
        read_conversations(tmp_path / "bad.json")


def test_chat_config_names_every_invalid_value() -> None:
    with pytest.raises(ValueError, match="format: got 'x'") as raised:
        ChatConfig(format="x", truncation="cut", date="today", template="")  # type: ignore[arg-type]
    assert {problem.path for problem in raised.value.problems} == {  # type: ignore[attr-defined]
        "format", "truncation", "date", "template"
    }  # fmt: skip
