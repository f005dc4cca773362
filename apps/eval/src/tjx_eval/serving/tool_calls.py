"""Calls of functions in generated text: the notations of Qwen and Hermes, and of Llama 3."""

import json
import re
import secrets
from typing import Any, Literal, NamedTuple

from tjx_data import ChatTemplate
from tjx_data.bounded_io import parse_json

Notation = Literal["tags", "object"]

PYTHON_TAG = "<|python_tag|>"
_TAGS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ToolCall(NamedTuple):
    """A call of a function; `arguments` is a JSON object."""

    name: str
    arguments: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the call in OpenAI's format, where the arguments are a string."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def find_notation(template: ChatTemplate) -> Notation | None:
    """Return how a model with this template writes calls; None if the template has no tools.

    "tags" is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Qwen, Hermes, the
    built-in templates), "object" a text that is one object ``{"name": ..., "parameters": {...}}``
    (Llama 3), which ``<|python_tag|>`` may precede.
    """
    source = template.source
    if not re.search(r"\btools\b", source):
        return None
    if "<tool_call>" in source:
        return "tags"
    return "object" if '"parameters"' in source else None


def split_tool_calls(text: str, notation: Notation) -> tuple[str, list[ToolCall]]:
    """Split generated text into content and calls.

    Text that is not a valid call stays in the content.

    Parameters
    ----------
    text : str
        Text of an assistant message.
    notation : {"tags", "object"}
        Result of `find_notation`.

    Returns
    -------
    content : str
        The text without the calls.
    calls : list of ToolCall
        The calls in order.

    Examples
    --------
    >>> text = 'Let me look. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    >>> split_tool_calls(text, "tags")
    ('Let me look.', [ToolCall(name='add', arguments={'a': 1})])
    """
    if notation == "object":
        call = _parse(text.removeprefix(PYTHON_TAG))
        return (text, []) if call is None else ("", [call])
    calls: list[ToolCall] = []

    def replace(found: re.Match[str]) -> str:
        call = _parse(found[1])
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    content = _TAGS.sub(replace, text)
    return (content.strip() if calls else text), calls


def _parse(text: str) -> ToolCall | None:
    try:
        found = parse_json(text.encode())
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    return ToolCall(found["name"], arguments) if isinstance(arguments, dict) else None
