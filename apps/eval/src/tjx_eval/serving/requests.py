"""Parse and validate request bodies of the OpenAI API.

Unknown and unsupported fields are rejected, never ignored.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tjx_core import did_you_mean
from tjx_eval.serving.errors import APIError
from tjx_nn.generation.continuous_batching import N_TOP_LOG_PROBS, SequenceOptions

DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000
_MAX_TOKEN_ID = 2**31 - 1
MAX_CHOICES = 128
_IGNORED = {"user", "metadata", "store", "safety_identifier", "service_tier"}
# Unsupported fields, with the values that have no effect.
_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
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
# Chat template: a base model was not trained on roles.
ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}

Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """A validated request.

    Attributes
    ----------
    prompts : list of str or list of int
        Prompts, each a text or token ids.
    n : int
        Completions per prompt.
    max_tokens : int or None
        Maximum tokens of each completion; None is as many as fit.
    options : SequenceOptions
        Sampling options without the seed.
    seed : int
        Seed of the first completion of each prompt; the next ones have consecutive seeds.
    stops : list of str
        Stop texts.
    stream, include_usage, echo : bool
        Whether to stream chunks, to end the stream with token counts, and to repeat the prompt.
    logprobs : int or None
        Number of top log-probabilities per token; None returns no log-probabilities.
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


def parse_completion(body: Any, model: str) -> CompletionRequest:
    """Parse the body of `/v1/completions`.

    Raises
    ------
    APIError
        If a field is invalid.
    """
    fields = _check_fields(body, _COMPLETION, model)
    logprobs = _int(fields, "logprobs", None, 0, N_TOP_LOG_PROBS)
    echo = _bool(fields, "echo")
    if echo and logprobs is not None:
        raise _invalid("logprobs", "not supported with echo; leave out one")
    n = _int(fields, "n", 1, 1, MAX_CHOICES)
    if fields.get("best_of") not in (None, n):
        raise _invalid("best_of", f"got {fields['best_of']}; expected n, {n}, or no value")
    max_tokens = _int(fields, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    return CompletionRequest(
        prompts=_prompts(fields.get("prompt", "")), max_tokens=max_tokens, echo=echo,
        **_shared(fields, logprobs),
    )  # fmt: skip


def parse_chat(body: Any, model: str) -> CompletionRequest:
    """Parse the body of `/v1/chat/completions`.

    Raises
    ------
    APIError
        If a field is invalid.
    """
    fields = _check_fields(body, _CHAT, model)
    top = _int(fields, "top_logprobs", 0, 0, N_TOP_LOG_PROBS)
    logprobs = _bool(fields, "logprobs")
    if top and not logprobs:
        raise _invalid("top_logprobs", "needs logprobs: true")
    new = _int(fields, "max_completion_tokens", _int(fields, "max_tokens", None, 1), 1)
    shared = _shared(fields, top if logprobs else None)
    turns = [f"\n\n{name}:" for name in dict.fromkeys(ROLES.values())]
    shared["stops"] = [*shared["stops"], *turns]
    return CompletionRequest(
        prompts=[_conversation(fields.get("messages"))], max_tokens=new, **shared
    )


def _shared(fields: Mapping[str, Any], logprobs: int | None) -> dict[str, Any]:
    options: SequenceOptions = {
        "temperature": _float(fields, "temperature", 1.0, 0.0, 2.0),
        "top_p": _float(fields, "top_p", None, 0.0, 1.0),
        "min_p": _float(fields, "min_p", None, 0.0, 1.0),
        "repetition_penalty": _float(fields, "repetition_penalty", None, 0.0, 100.0),
        "top_k": _int(fields, "top_k", None, 1),
        "log_probs": logprobs is not None,
    }
    stream = _bool(fields, "stream")
    stream_options = fields.get("stream_options")
    if stream_options is not None and (not isinstance(stream_options, dict) or not stream):
        raise _invalid("stream_options", "expected an object, and only with stream: true")
    if unknown := set(stream_options or {}) - {"include_usage", "include_obfuscation"}:
        raise _invalid("stream_options", f"got {sorted(unknown)}; expected include_usage")
    seed = _int(fields, "seed", None)
    return {
        "n": _int(fields, "n", 1, 1, MAX_CHOICES),
        "options": options,
        "seed": secrets.randbits(32) if seed is None else seed,
        "stops": _stops(fields.get("stop")),
        "stream": stream,
        "include_usage": _bool(stream_options or {}, "include_usage"),
        "logprobs": logprobs,
    }


def _check_fields(body: Any, known: set[str], model: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise APIError(400, "the body is not a JSON object")
    for name, value in body.items():
        if name in _NO_EFFECT and value not in _NO_EFFECT[name]:
            raise _invalid(name, f"got {_short(value)}, which is not supported; leave it out")
        if name not in known | _IGNORED | _NO_EFFECT.keys():
            raise _invalid(name[:60], f"unknown field{did_you_mean(name, sorted(known))}")
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
    raise _invalid("prompt", "expected a text, token ids, or a list of either, not empty")


def _are_tokens(given: Any) -> bool:
    if not (isinstance(given, list) and given and all(type(x) is int for x in given)):
        return False
    if not all(0 <= x <= _MAX_TOKEN_ID for x in given):
        raise _invalid("prompt", "got a number that is no token of this model")
    return True


def _conversation(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "expected a list of at least one message")
    return "".join(map(_message, messages)) + "Assistant:"


def _message(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise _invalid("messages", f"expected objects with a role: one of {', '.join(ROLES)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    given = [part.get("text") for part in parts if isinstance(part, dict)]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(parts):
        raise _invalid("messages", "expected content that is a text, or parts of type text")
    return f"{ROLES[role]}: {''.join(texts)}\n\n"


def _stops(given: Any) -> list[str]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
        raise _invalid("stop", "expected a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise _invalid("stop", f"got {len(stops)} texts; expected at most {MAX_STOPS}")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise _invalid(
            "stop", f"got {longest} characters; expected at most {MAX_STOP_CHARACTERS} per text"
        )
    return stops


def _int(
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
        raise _invalid(name, f"got {_short(value)}; expected a whole number {bound}")
    return value


def _float(fields: Mapping[str, Any], name: str, default: Any, least: float, most: float) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise _invalid(name, f"got {_short(value)}; expected a number from {least:g} to {most:g}")
    return float(value)


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False) or type(value) is int:
        raise _invalid(name, f"got {_short(value)}; expected true or false")
    return bool(value)


def _invalid(name: str, problem: str) -> APIError:
    return APIError(400, f"{name}: {problem}", param=name)


def _short(value: Any) -> str:
    return repr(value)[:60]
