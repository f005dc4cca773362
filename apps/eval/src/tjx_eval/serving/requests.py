"""What a request asks for: the fields of OpenAI's bodies, each read with its bounds.

What is not known or cannot be done is refused, never passed over.
"""

import difflib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tjx_eval.serving.errors import APIError
from tjx_nn.generation.continuous_batching import N_TOP_LOG_PROBS, SequenceOptions

DEFAULT_MAX_TOKENS = 16
MOST_STOPS = 4
MOST_STOP_CHARACTERS = 1000
_MOST_TOKEN_ID = 2**31 - 1
MOST_CHOICES = 128
_HARMLESS = {"user", "metadata", "store", "safety_identifier", "service_tier"}
# Fields that may be there as long as they ask for nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "response_format": ({"type": "text"}, None),
}
_SHARED = {
    "model", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "stop", "seed", "stream", "stream_options", "logprobs",
}  # fmt: skip
_COMPLETION = _SHARED | {"prompt", "echo", "best_of"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
# A base model knows no roles: this is how a conversation is written for it.
ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}

Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """A request, read.

    Attributes
    ----------
    prompts : list of str or list of int
        What to go on from, each a text or tokens.
    n : int
        Continuations of each.
    max_tokens : int or None
        Tokens of each; None is all that fit.
    options : SlotOptions
        How they are chosen, without the seed.
    seed : int
        Of the first continuation of a prompt; the next ones count on.
    stops : list of str
        Texts that end a continuation.
    echo, stream, include_usage : bool
        Whether the prompt comes first; whether pieces are sent; whether their number comes last.
    logprobs : int or None
        How many of the likeliest tokens are told in each place; None tells nothing.
    """

    prompts: list[Prompt]
    n: int
    max_tokens: int | None
    options: SequenceOptions
    seed: int
    stops: list[str]
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool = False


def read_completion(body: Any, model: str) -> CompletionRequest:
    """Read the body of `/v1/completions`.

    Raises
    ------
    RefusedError
        If a field is wrong.
    """
    fields = _fields(body, _COMPLETION, model)
    logprobs = _whole(fields, "logprobs", None, 0, N_TOP_LOG_PROBS)
    echo = _flag(fields, "echo")
    if echo and logprobs is not None:
        raise _wrong("logprobs", "with echo is not done here: leave out one")
    n = _whole(fields, "n", 1, 1, MOST_CHOICES)
    if fields.get("best_of") not in (None, n):
        raise _wrong("best_of", f"is {fields['best_of']} and n is {n}: give the same, or leave out")
    given = _whole(fields, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    return CompletionRequest(
        prompts=_prompts(fields.get("prompt", "")), max_tokens=given, echo=echo,
        **_shared(fields, logprobs),
    )  # fmt: skip


def read_chat(body: Any, model: str) -> CompletionRequest:
    """Read the body of `/v1/chat/completions`.

    Raises
    ------
    RefusedError
        If a field is wrong.
    """
    fields = _fields(body, _CHAT, model)
    top = _whole(fields, "top_logprobs", 0, 0, N_TOP_LOG_PROBS)
    wants = _flag(fields, "logprobs")
    if top and not wants:
        raise _wrong("top_logprobs", "needs logprobs: true")
    new = _whole(fields, "max_completion_tokens", _whole(fields, "max_tokens", None, 1), 1)
    shared = _shared(fields, top if wants else None)
    turns = [f"\n\n{name}:" for name in dict.fromkeys(ROLES.values())]
    shared["stops"] = [*shared["stops"], *turns]
    return CompletionRequest(
        prompts=[_conversation(fields.get("messages"))], max_tokens=new, **shared
    )


def _shared(fields: Mapping[str, Any], logprobs: int | None) -> dict[str, Any]:
    options: SequenceOptions = {
        "temperature": _number(fields, "temperature", 1.0, 0.0, 2.0),
        "top_p": _number(fields, "top_p", None, 0.0, 1.0),
        "min_p": _number(fields, "min_p", None, 0.0, 1.0),
        "repetition_penalty": _number(fields, "repetition_penalty", None, 0.0, 100.0),
        "top_k": _whole(fields, "top_k", None, 1),
        "log_probs": logprobs is not None,
    }
    stream = _flag(fields, "stream")
    wanted = fields.get("stream_options")
    if wanted is not None and (not isinstance(wanted, dict) or not stream):
        raise _wrong("stream_options", "is an object, and only for stream: true")
    if unknown := set(wanted or {}) - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", f"has {sorted(unknown)}: give include_usage")
    seed = _whole(fields, "seed", None)
    return {
        "n": _whole(fields, "n", 1, 1, MOST_CHOICES),
        "options": options,
        "seed": secrets.randbits(32) if seed is None else seed,
        "stops": _stops(fields.get("stop")),
        "stream": stream,
        "include_usage": _flag(wanted or {}, "include_usage"),
        "logprobs": logprobs,
    }


def _fields(body: Any, known: set[str], model: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise APIError(400, "the body is no JSON object")
    for name, value in body.items():
        if name in _NOTHING and value not in _NOTHING[name]:
            raise _wrong(name, f"is {_short(value)}: that is not done here; leave it out")
        if name not in known | _HARMLESS | _NOTHING.keys():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise _wrong(name[:60], f"is no field of this request{hint}")
    if body.get("model", model) != model:
        raise APIError(
            404,
            f"there is no model {_short(body['model'])} here; there is {model!r}",
            param="model",
            code="model_not_found",
        )
    return body


def _prompts(given: Any) -> list[Prompt]:
    if isinstance(given, str) or _are_tokens(given):
        return [given]
    if (
        isinstance(given, list)
        and given
        and all(isinstance(x, str) or _are_tokens(x) for x in given)
    ):
        return given
    raise _wrong("prompt", "is a text, tokens, or a list of several of these, and not empty")


def _are_tokens(given: Any) -> bool:
    if not (isinstance(given, list) and given and all(type(x) is int for x in given)):
        return False
    if not all(0 <= x <= _MOST_TOKEN_ID for x in given):
        raise _wrong("prompt", "has a number that is no token of this model")
    return True


def _conversation(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "is a list of at least one message")
    return "".join(map(_message, messages)) + "Assistant:"


def _message(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong("messages", f"have objects with a role: one of {', '.join(ROLES)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    said = [text for text in texts if isinstance(text, str)]
    if len(said) < len(parts):
        raise _wrong("messages", "have content that is a text, or parts of type text")
    return f"{ROLES[role]}: {''.join(said)}\n\n"


def _stops(given: Any) -> list[str]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
        raise _wrong("stop", "is a text or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise _wrong("stop", f"has {len(stops)} texts: give at most {MOST_STOPS}")
    if (longest := max(map(len, stops), default=0)) > MOST_STOP_CHARACTERS:
        raise _wrong(
            "stop", f"has {longest} characters: give at most {MOST_STOP_CHARACTERS} in each text"
        )
    return stops


def _whole(
    fields: Mapping[str, Any],
    name: str,
    default: Any,
    least: int = -(2**63),
    most: int = 2**63 - 1,
) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        bound = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
        raise _wrong(name, f"is {_short(value)}: give a whole number {bound}")
    return value


def _number(fields: Mapping[str, Any], name: str, default: Any, least: float, most: float) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise _wrong(name, f"is {_short(value)}: give a number from {least:g} to {most:g}")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False) or type(value) is int:
        raise _wrong(name, f"is {_short(value)}: give true or false")
    return bool(value)


def _wrong(name: str, problem: str) -> APIError:
    return APIError(400, f"{name} {problem}", param=name)


def _short(value: Any) -> str:
    return repr(value)[:60]
