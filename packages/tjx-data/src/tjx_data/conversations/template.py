"""Chat templates: Jinja templates of Hugging Face tokenizers, rendered as transformers does."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tjx_data.bounded_io import read_bounded, read_json_object
from tjx_data.conversations.built_in_templates import BUILT_IN, CHAT_TOKENS
from tjx_data.conversations.config import ChatConfig, Turns
from tjx_data.conversations.records import Message
from tjx_data.conversations.template_program import Span, TemplateProgram
from tjx_data.tokenization.tokenizer import Tokenizer

MAX_TEMPLATE_BYTES = 1 << 20
MAX_CONFIG_BYTES = 64 << 20  # tokenizer_config.json lists every added token

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A chat template: from messages to the text that a model reads.

    It is rendered as by ``apply_chat_template`` of transformers 5: white space around blocks is
    trimmed, and ``raise_exception``, ``tojson``, ``strftime_now``, loop controls and
    ``{% generation %}`` are available. Jinja's random functions are not, as data must be
    reproducible. One template can render in several threads at once.

    Parameters
    ----------
    source : str
        Jinja source.
    special_tokens : Mapping[str, str]
        Variables of the template such as ``bos_token`` and ``eos_token``.
    date : date, optional
        What ``strftime_now`` returns; without it a template that calls it raises ValueError.
    name : str
        Name in messages.

    Raises
    ------
    ValueError
        If the source is not a Jinja template, or jinja2 is not installed.

    Examples
    --------
    >>> template = ChatTemplate.built_in("tjx")
    >>> template.render([{"role": "user", "content": "1 + 2?"}], add_generation_prompt=True)
    '<|user|>1 + 2?<|end|><|assistant|>'
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        date: datetime.date | None = None,
        name: str = "template",
    ) -> None:
        self.source, self.special_tokens = source, dict(special_tokens or {})
        self.date, self.name = date, name
        self._program = TemplateProgram(source, date=date, name=name)

    @classmethod
    def built_in(cls, name: str, tokenizer: Tokenizer | None = None) -> "ChatTemplate":
        """Return a built-in template, whose conversations start and end with the end-of-text token.

        Parameters
        ----------
        name : {"tjx", "plain"}
            Name of the template.
        tokenizer : Tokenizer, optional
            Its end-of-text token is used.

        Returns
        -------
        ChatTemplate
            The template.

        Raises
        ------
        ValueError
            If the name is unknown, or the tokenizer lacks the special tokens of the template.
        """
        if name not in BUILT_IN:
            raise ValueError(f"template: got {name!r}; expected one of {', '.join(BUILT_IN)}")
        tokens = {}
        if tokenizer is not None:
            missing = [token for token in CHAT_TOKENS if token not in tokenizer.special_tokens]
            if name == "tjx" and missing:
                raise ValueError(
                    f"template: got tjx with a tokenizer without {', '.join(missing)}; expected a "
                    "tokenizer with special_tokens tjx_data.CHAT_TOKENS; or give plain"
                )
            if tokenizer.eot_id is None and name == "plain":
                raise ValueError(
                    "template: got plain with a tokenizer without an end-of-text token, which ends "
                    "an answer; expected a tokenizer with <|endoftext|>"
                )
            by_id = {i: token for token, i in tokenizer.special_tokens.items()}
            if tokenizer.eot_id is not None:
                eot = by_id[tokenizer.eot_id]
                tokens = {"bos_token": eot, "eos_token": eot}
        return cls(BUILT_IN[name], tokens, name=name)

    @classmethod
    def load(cls, path: str | Path, *, date: datetime.date | None = None) -> "ChatTemplate":
        """Load the template of a tokenizer folder, of its tokenizer_config.json, or a Jinja file.

        Parameters
        ----------
        path : str or Path
            A folder with chat_template.jinja or tokenizer_config.json, or one of these files.
        date : date, optional
            As of the class.

        Returns
        -------
        ChatTemplate
            The template.

        Raises
        ------
        ValueError
            If there is no template, or it is malformed.
        """
        path = Path(path).expanduser()
        folder = path.parent if path.is_file() else path
        config: dict[str, Any] = {}
        try:
            if (folder / CONFIG_FILE).is_file():
                config = read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
            file = path if path.is_file() else folder / TEMPLATE_FILE
            if file.is_file() and file.name != CONFIG_FILE:
                source: str | None = read_bounded(file, MAX_TEMPLATE_BYTES).decode()
            else:
                file, source = folder / CONFIG_FILE, _template_in(config)
        except (OSError, ValueError) as error:
            raise ValueError(f"template: got {path}; {error}") from error
        if source is None:
            raise ValueError(
                f"template: got {path}; expected a Jinja file, {TEMPLATE_FILE}, or {CONFIG_FILE} "
                "with chat_template; give tjx or plain for a built-in template"
            )
        return cls(source, _named_tokens(config), date=date, name=str(file))

    def save(self, folder: Path) -> None:
        """Write chat_template.jinja and tokenizer_config.json, for `load` and for transformers.

        Parameters
        ----------
        folder : Path
            An existing folder.
        """
        (folder / TEMPLATE_FILE).write_text(self.source, encoding="utf-8")
        (folder / CONFIG_FILE).write_text(
            json.dumps(self.special_tokens, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Render messages to text.

        Parameters
        ----------
        messages : sequence of dict
            The messages.
        tools : sequence of dict
            JSON schemas of the tools.
        add_generation_prompt : bool
            Whether to append the start of an answer by the assistant.
        **variables
            Further variables of the template, such as ``enable_thinking``.

        Returns
        -------
        str
            The text, with the names of special tokens.

        Raises
        ------
        ValueError
            If the template raises an error, accesses what the sandbox forbids, or its output is too
            long.
        """
        return self._render(messages, tools, add_generation_prompt, variables)[0]

    def render_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        turns: Turns = "all",
    ) -> tuple[str, list[Span]]:
        """Render a conversation, and locate the characters that the assistant generates.

        Templates with ``{% generation %}`` mark them. For others the text of an assistant message
        is what it adds to the messages before it and the generation prompt; this requires that
        both are prefixes of the whole text, which is checked.

        Parameters
        ----------
        messages, tools
            As of `render`.
        turns : {"all", "last"}
            Messages of the assistant to locate.

        Returns
        -------
        text : str
            The rendered conversation.
        spans : list of (int, int)
            Start and end of each generated part, in characters of the text.

        Raises
        ------
        ValueError
            As `render`; also if a prefix differs from the whole text, as for templates that remove
            the reasoning of earlier messages.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers if turns == "all" else answers[-1:]
        text, spans = self._render(messages, tools, False, {})
        if self._marks_spans:
            if len(spans) != len(answers):
                raise ValueError(
                    f"the {self.name} marks {len(spans)} generations; expected one for each of "
                    f"{len(answers)} assistant messages"
                )
            return text, spans if turns == "all" else spans[-1:]
        spans = []
        for i in wanted:
            before = self.render(messages[:i], tools=tools, add_generation_prompt=True)
            until = text
            if i + 1 < len(messages):
                until = self.render(messages[: i + 1], tools=tools)
            if not (until.startswith(before) and text.startswith(until)):
                advice = "; train on the last message only (turns: last)" if turns == "all" else ""
                raise ValueError(
                    f"the {self.name} renders the messages before or until message {i + 1} "
                    "differently than in the whole conversation, so that its text cannot be "
                    f"located{advice}, or use a template with {{% generation %}}"
                )
            spans.append(Span(len(before), len(until)))
        return text, spans

    @property
    def _marks_spans(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, list[Span]]:
        return self._program.render(
            {
                **self.special_tokens,
                "messages": list(messages),
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            }
        )


def find_template(
    config: ChatConfig, tokenizer: Tokenizer, location: str | Path | None = None
) -> ChatTemplate:
    """Return the chat template that a configuration selects.

    Parameters
    ----------
    config : ChatConfig
        `template` and `date` are used.
    tokenizer : Tokenizer
        The tokenizer of the model.
    location : str or Path, optional
        Folder or file of the tokenizer, for the template "auto"; the template of a name on the hub
        is not downloaded.

    Returns
    -------
    ChatTemplate
        The template.

    Raises
    ------
    ValueError
        If there is no such template, or the tokenizer lacks its tokens.
    """
    name = config.template
    date = None if config.date is None else datetime.date.fromisoformat(config.date)
    if name in BUILT_IN:
        return ChatTemplate.built_in(name, tokenizer)
    if name != "auto":
        return ChatTemplate.load(name, date=date)
    if location is not None:
        path = Path(location).expanduser()
        folder = path.parent if path.is_file() else path
        if folder.is_dir() and has_template(folder):
            return ChatTemplate.load(folder, date=date)
    has_tokens = all(token in tokenizer.special_tokens for token in CHAT_TOKENS)
    return ChatTemplate.built_in("tjx" if has_tokens else "plain", tokenizer)


def has_template(folder: Path) -> bool:
    """Return whether a folder has a chat template."""
    """Return whether a folder has a chat template."""
    if (folder / TEMPLATE_FILE).is_file():
        return True
    file = folder / CONFIG_FILE
    return file.is_file() and "chat_template" in read_json_object(file, MAX_CONFIG_BYTES)


def _template_in(config: Mapping[str, Any]) -> str | None:
    """Return the template in a tokenizer_config.json; of several the one named "default"."""
    given = config.get("chat_template")
    if isinstance(given, list):
        named = [each for each in given if isinstance(each, dict)]
        given = {each.get("name"): each.get("template") for each in named}.get("default")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"chat_template is a {type(given).__name__}; expected a string")
    return given


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json: strings, or objects with "content"."""
    found = {}
    for name in _TOKEN_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found
