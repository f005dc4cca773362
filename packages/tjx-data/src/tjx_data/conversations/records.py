"""Records of conversations in common formats, converted to messages and checked.

A message is a dict with the keys of OpenAI's and Hugging Face's chat formats: "role" (system, user,
assistant or tool) and "content", and for tool use "tool_calls", "tool_call_id" and "name".
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tjx_core import did_you_mean, nearest_name
from tjx_data.conversations.config import RecordFormat

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content",
}  # fmt: skip
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
# Keys of a record besides the keys that are always allowed, and the key that identifies the format.
_RECORD_KEYS: dict[str, tuple[str, set[str]]] = {
    "messages": ("messages", {"messages", "tools"}),
    "sharegpt": ("conversations", {"conversations", "system", "tools"}),
    "alpaca": ("instruction", {"instruction", "input", "output", "system"}),
    "completion": ("completion", {"prompt", "completion", "tools"}),
}
_PREFERENCE_KEYS = {"prompt", "chosen", "rejected", "tools"}
_ALWAYS_ALLOWED = {"id"}


class Conversation(NamedTuple):
    """A checked conversation.

    Attributes
    ----------
    messages : tuple of dict
        The messages in order.
    tools : tuple of dict
        JSON schemas of the tools that the assistant can call.
    location : str
        ``FILE:LINE`` of its record.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    location: str = ""


class PreferencePair(NamedTuple):
    """A prompt with a chosen and a rejected answer.

    Attributes
    ----------
    prompt : tuple of dict
        Messages that both have in common; the last one is not by the assistant.
    chosen, rejected : tuple of dict
        The messages that follow, from the assistant's on.
    tools : tuple of dict
        JSON schemas of the tools that the assistant can call.
    location : str
        ``FILE:LINE`` of its record.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    location: str = ""

    def conversations(self) -> tuple[Conversation, Conversation]:
        """Return the conversations with the chosen and with the rejected answer."""
        chosen, rejected = (
            Conversation(self.prompt + answer, self.tools, self.location)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def parse_conversation(
    record: Any,
    record_format: RecordFormat = "auto",
    *,
    ignored: Collection[str] = (),
    location: str = "",
) -> Conversation:
    """Convert a record to a conversation that ends with an assistant message.

    Parameters
    ----------
    record : object
        A value of JSON.
    record_format : str
        Format of the record; "auto" selects it by its keys.
    ignored : collection of str
        Further keys that records and messages may have.
    location : str
        Place of the record, stored in the conversation.

    Returns
    -------
    Conversation
        Messages and tools.

    Raises
    ------
    ValueError
        If the record is not of the format, has unknown keys, a message has no role or no content,
        or the order of the roles is wrong.

    Examples
    --------
    >>> parse_conversation({"instruction": "Add 1 and 2.", "output": "3"}).messages[1]
    {'role': 'assistant', 'content': '3'}
    """
    _check_object(record)
    kind = _format_of(record) if record_format == "auto" else record_format
    needed, known = _RECORD_KEYS[kind]
    _check_keys(record, {*known, *ignored}, "the record")
    if needed not in record:
        raise ValueError(f"has no key {needed!r}, which the format {kind} needs")
    if kind == "messages":
        messages = _messages(record["messages"], "messages", ignored)
    elif kind == "sharegpt":
        messages = _sharegpt(record, ignored)
    elif kind == "alpaca":
        messages = _alpaca(record)
    else:
        messages = (
            *_messages(record.get("prompt"), "prompt", ignored, role="user"),
            *_messages(record["completion"], "completion", ignored, role="assistant"),
        )
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"its last message is by {messages[-1]['role']}; expected an assistant message to "
            "train on"
        )
    return Conversation(messages, _tools(record), location)


def parse_preference(
    record: Any, *, ignored: Collection[str] = (), location: str = ""
) -> PreferencePair:
    """Convert a record with "chosen" and "rejected" to a preference pair.

    The values are texts or lists of messages. Without "prompt" both are whole conversations, and
    the prompt is their common start.

    Parameters
    ----------
    record, ignored, location
        As of `parse_conversation`.

    Returns
    -------
    PreferencePair
        The common prompt and both answers.

    Raises
    ------
    ValueError
        As `parse_conversation`; also if both answers are equal, or have no common prompt.
    """
    _check_object(record)
    _check_keys(record, {*_PREFERENCE_KEYS, *ignored}, "the record")
    prompt: tuple[Message, ...] = ()
    if "prompt" in record:
        prompt = _messages(record["prompt"], "prompt", ignored, role="user")
    chosen, rejected = (
        prompt + _messages(record.get(name), name, ignored, role="assistant")
        for name in ("chosen", "rejected")
    )
    for messages in (chosen, rejected):
        check_order(messages)
    n_shared = len(prompt)
    if not prompt:
        pairs = zip(chosen, rejected, strict=False)
        n_shared = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (chosen, rejected)))
        )
    answers = chosen[n_shared:], rejected[n_shared:]
    if answers[0] == answers[1]:
        raise ValueError("has equal chosen and rejected answers")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise ValueError(f"{name}: expected an answer by the assistant after the shared prompt")
    if not n_shared:
        raise ValueError("has no prompt, and its answers have no message in common")
    return PreferencePair(chosen[:n_shared], *answers, _tools(record), location)


def check_order(messages: Sequence[Message]) -> None:
    """Check the order of roles: system first, then user and assistant in turn, with tool results.

    Raises
    ------
    ValueError
        Naming the message, counted from 1.
    """
    after: dict[str, tuple[str, ...]] = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
    }
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in after[before]:
            raise ValueError(
                f"message {number} is by {role} {'after ' + before if before else 'at the start'}; "
                f"expected {' or '.join(after[before])}"
            )
        before = role


def _format_of(record: Mapping[str, Any]) -> str:
    for kind, (needed, _) in _RECORD_KEYS.items():
        if needed in record:
            return kind
    needed_keys = ", ".join(repr(needed) for needed, _ in _RECORD_KEYS.values())
    raise ValueError(f"has the keys {sorted(record)[:10]}; expected one of {needed_keys}")


def _check_object(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}; expected an object")


def _check_keys(values: Mapping[str, Any], known: Collection[str], what: str) -> None:
    unknown = [key for key in values if key not in known and key not in _ALWAYS_ALLOWED]
    if unknown:
        raise ValueError(
            f"{what} has the unknown key {unknown[0][:60]!r}{did_you_mean(unknown[0], known)}; "
            f"expected {', '.join(sorted(known))}; correct it, or list it in ignore_keys"
        )


def _messages(
    given: Any, name: str, ignored: Collection[str], role: str | None = None
) -> tuple[Message, ...]:
    """Return checked messages; a text is one message by `role`."""
    if isinstance(given, str) and role is not None:
        given = [{"role": role, "content": given}]
    if not isinstance(given, list) or not given:
        expected = "a list of messages" + (" or a text" if role is not None else "")
        found = "an empty list" if given == [] else type(given).__name__
        raise ValueError(f"{name}: got {found}; expected {expected}")
    return tuple(_message(each, number, ignored) for number, each in enumerate(given, start=1))


def _message(given: Any, number: int, ignored: Collection[str]) -> Message:
    if not isinstance(given, dict):
        raise ValueError(f"message {number} is a JSON {type(given).__name__}; expected an object")
    _check_keys(given, {*_MESSAGE_KEYS, *ignored}, f"message {number}")
    message = {key: value for key, value in given.items() if key not in ignored}
    role = message.get("role")
    if role is None:
        raise ValueError(f"message {number} has no role")
    if role not in ROLES:
        near = nearest_name(str(role), ROLES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(
            f"message {number} has the role {str(role)[:60]!r}; expected one of "
            f"{', '.join(ROLES)}{hint}"
        )
    if message.get("tool_calls") is not None:
        calls = message["tool_calls"]
        if role != "assistant" or not isinstance(calls, list) or not calls:
            raise ValueError(f"message {number} has tool_calls that are not an assistant's list")
        if message.get("content") in (None, ""):
            return {**message, "content": ""}
    for key in ("content", "reasoning_content"):
        if key in message or key == "content":
            _check_text(message.get(key), f"message {number}: {key}")
    return message


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {'missing' if text is None else 'not a string'}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate") from error


def _sharegpt(record: Mapping[str, Any], ignored: Collection[str]) -> tuple[Message, ...]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations: got {type(turns).__name__}; expected a list of turns")
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is a JSON {type(turn).__name__}; expected an object")
        _check_keys(turn, {"from", "value", *ignored}, f"turn {number}")
        if turn.get("from") not in _SHAREGPT_ROLES:
            raise ValueError(
                f"turn {number} is from {str(turn.get('from'))[:60]!r}; expected one of "
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return _messages(messages, "conversations", ())


def _alpaca(record: Mapping[str, Any]) -> tuple[Message, ...]:
    _check_text(record["instruction"], "instruction")
    question = record["instruction"]
    if record.get("input"):
        _check_text(record["input"], "input")
        question = f"{question}\n\n{record['input']}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record.get("output")},
    ]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return _messages(messages, "record", ())


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools: expected a list of JSON schemas")
    return tuple(tools)
