"""Parse and validate request bodies of the OpenAI API.

Unknown and unsupported fields are rejected, never ignored.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tjx_core import did_you_mean
from tjx_eval.serving.chat import ChatPrompts, parse_messages, parse_tools
from tjx_eval.serving.errors import APIError, invalid
from tjx_eval.serving.tool_calls import Notation
from tjx_nn.generation.batch_sampling import N_TOP_LOG_PROBS, SequenceOptions

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
_CHAT = _SHARED | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls",
}  # fmt: skip

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
    tool_notation : str or None
        How calls of tools are written in the completion; None does not look for any.
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
    tool_notation: Notation | None = None


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
        raise invalid("logprobs", "not supported with echo; leave out one")
    n = _int(fields, "n", 1, 1, MAX_CHOICES)
    if fields.get("best_of") not in (None, n):
        raise invalid("best_of", f"got {fields['best_of']}; expected n, {n}, or no value")
    max_tokens = _int(fields, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    return CompletionRequest(
        prompts=_prompts(fields.get("prompt", "")), max_tokens=max_tokens, echo=echo,
        **_shared(fields, logprobs),
    )  # fmt: skip


def parse_chat(body: Any, model: str, prompts: ChatPrompts) -> CompletionRequest:
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
        raise invalid("top_logprobs", "needs logprobs: true")
    new = _int(fields, "max_completion_tokens", _int(fields, "max_tokens", None, 1), 1)
    shared = _shared(fields, top if logprobs else None)
    shared["stops"] = [*shared["stops"], *prompts.stops]
    messages = parse_messages(fields.get("messages"))
    tools = parse_tools(fields.get("tools"), fields.get("tool_choice"), prompts)
    return CompletionRequest(
        prompts=[prompts.encode(messages, tools)],
        max_tokens=new,
        tool_notation=prompts.notation if tools else None,
        **shared,
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
        raise invalid("stream_options", "expected an object, and only with stream: true")
    if unknown := set(stream_options or {}) - {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", f"got {sorted(unknown)}; expected include_usage")
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
        if name in _NO_EFFECT.keys() - known and value not in _NO_EFFECT[name]:
            raise invalid(name, f"got {_short(value)}, which is not supported; leave it out")
        if name not in known | _IGNORED | _NO_EFFECT.keys():
            raise invalid(name[:60], f"unknown field{did_you_mean(name, sorted(known))}")
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
    raise invalid("prompt", "expected a text, token ids, or a list of either, not empty")


def _are_tokens(given: Any) -> bool:
    if not (isinstance(given, list) and given and all(type(x) is int for x in given)):
        return False
    if not all(0 <= x <= _MAX_TOKEN_ID for x in given):
        raise invalid("prompt", "got a number that is no token of this model")
    return True


def _stops(given: Any) -> list[str]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
        raise invalid("stop", "expected a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"got {len(stops)} texts; expected at most {MAX_STOPS}")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise invalid(
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
        raise invalid(name, f"got {_short(value)}; expected a whole number {bound}")
    return value


def _float(fields: Mapping[str, Any], name: str, default: Any, least: float, most: float) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise invalid(name, f"got {_short(value)}; expected a number from {least:g} to {most:g}")
    return float(value)


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False) or type(value) is int:
        raise invalid(name, f"got {_short(value)}; expected true or false")
    return bool(value)


def _short(value: Any) -> str:
    return repr(value)[:60]
