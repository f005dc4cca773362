"""Messages of chat requests: checked, and rendered to the prompt of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tjx_data
from tjx_data.bounded_io import parse_json
from tjx_eval.serving.errors import invalid
from tjx_eval.serving.tool_calls import PYTHON_TAG, Notation, find_notation

# Names of the roles for a model without a template: a base model was not trained on roles.
_BASE_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatPrompts:
    """Converts the messages of chat requests to prompts.

    Attributes
    ----------
    tokenizer : tjx_data.Tokenizer
        Tokenizer of the model.
    template : tjx_data.ChatTemplate or None
        Chat template of the model; None writes a transcript (``User: ...``), for base models.
    """

    tokenizer: tjx_data.Tokenizer
    template: tjx_data.ChatTemplate | None = None

    @cached_property
    def notation(self) -> Notation | None:
        """How the model writes calls of tools; None if it cannot call tools."""
        return None if self.template is None else find_notation(self.template)

    @cached_property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        if self.template is None:
            return [f"\n\n{name}:" for name in _BASE_ROLES.values()]
        return [name for name in self.tokenizer.special_tokens if name != PYTHON_TAG]

    def encode(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Return the token ids of messages and of the start of the assistant's answer.

        Parameters
        ----------
        messages, tools
            Results of `parse_messages` and `parse_tools`.

        Raises
        ------
        APIError
            400, if the template rejects the messages, or they contain a special token.
        """
        try:
            if self.template is None:
                return self.tokenizer.encode_prompt(_transcript(messages))
            return tjx_data.encode_chat_prompt(self.template, self.tokenizer, messages, tools=tools)
        except ValueError as error:
            raise invalid("messages", str(error)) from error


def parse_messages(given: Any) -> list[Message]:
    """Check the messages of a request, and convert them to those of chat templates.

    Parts of texts are joined, arguments of tool calls parsed, and the role developer becomes
    system.

    Raises
    ------
    APIError
        400, if one is malformed.
    """
    if not isinstance(given, list) or not given:
        raise invalid("messages", "expected a list of at least one message")
    return [_parse_message(message) for message in given]


def parse_tools(given: Any, choice: Any, prompts: ChatPrompts) -> list[Message]:
    """Check the tools of a request; the result is empty if `choice` is "none".

    Raises
    ------
    APIError
        400, if they are malformed, or the model cannot call tools.
    """
    tools = given or []
    if not isinstance(tools, list) or not all(map(_is_function, tools)):
        raise invalid("tools", 'expected a list of {"type": "function", "function": {"name": ...}}')
    if choice not in (None, "auto", "none"):
        raise invalid("tool_choice", f"got {choice!r:.60}; expected auto or none")
    if not tools or choice == "none":
        return []
    if prompts.notation is None:
        name = "none" if prompts.template is None else prompts.template.name
        raise invalid(
            "tools",
            f"this model cannot call tools: its chat template is {name}; leave them out",
        )
    return tools


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return (
        isinstance(function, dict)
        and tool.get("type") == "function"
        and isinstance(function.get("name"), str)
    )


def _parse_message(given: Any) -> Message:
    role = given.get("role") if isinstance(given, dict) else None
    if role not in _ROLES:
        raise invalid("messages", f"expected objects with a role: one of {', '.join(_ROLES)}")
    # Clients return answers with empty fields, such as refusal: null.
    message = {key: value for key, value in given.items() if value not in (None, [], {})}
    if unknown := sorted(message.keys() - _KEYS):
        raise invalid("messages", f"unknown field {unknown[0][:60]!r}; expected {sorted(_KEYS)}")
    message["role"] = "system" if role == "developer" else role
    if "tool_calls" in message:
        if role != "assistant" or not isinstance(message["tool_calls"], list):
            raise invalid("messages", "expected tool_calls to be a list in an assistant message")
        message["tool_calls"] = [_parse_call(call) for call in message["tool_calls"]]
        message.setdefault("content", "")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    given_texts = [part.get("text") for part in parts if isinstance(part, dict)]
    texts = [text for text in given_texts if isinstance(text, str)]
    if len(texts) < len(parts):
        raise invalid("messages", "expected content that is a text, or parts of type text")
    return {**message, "content": "".join(texts)}


def _parse_call(call: Any) -> Message:
    """Convert a call in OpenAI's format to that of templates, whose arguments are an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("messages", "expected tool_calls with a function and its name")
    arguments = function.get("arguments") or "{}"
    try:
        arguments = parse_json(arguments.encode()) if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid("messages", "expected the arguments of a tool call to be a JSON object")
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


def _transcript(messages: Sequence[Message]) -> str:
    for message in messages:
        if message["role"] not in _BASE_ROLES or "tool_calls" in message:
            raise ValueError("this model has no chat template: leave out messages of tools")
    lines = [f"{_BASE_ROLES[message['role']]}: {message['content']}\n\n" for message in messages]
    return "".join(lines) + "Assistant:"
