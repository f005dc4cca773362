"""Chat templates in Jinja's sandbox.

A template is part of a model of unknown origin: it runs without access to files or Python's
internals, and its output is limited.
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_RENDERED_CHARACTERS = 1 << 26
"""Most characters that one conversation may be rendered to."""


class Span(NamedTuple):
    """Characters ``start`` to ``end - 1`` of a rendered text that the assistant generates."""

    start: int
    end: int


@dataclass
class _Progress:
    """Progress of one rendering."""

    n_characters: int = 0
    spans: list[Span] = field(default_factory=list)


# Of each thread: a server renders the conversations of several users at once.
_progress: ContextVar[_Progress] = ContextVar("_progress")


class TemplateProgram:
    """A compiled chat template.

    Parameters
    ----------
    source : str
        Jinja source.
    date : date or None
        What ``strftime_now`` returns; None raises ValueError.
    name : str
        Name in messages.

    Raises
    ------
    ValueError
        If the source is not a Jinja template, or jinja2 is not installed.
    """

    def __init__(self, source: str, *, date: datetime.date | None, name: str) -> None:
        self._date, self._name = date, name
        self._template = self._compile(source)

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """Render a text, and return it with the spans of ``{% generation %}``.

        Raises
        ------
        ValueError
            If the template raises an error, accesses what the sandbox forbids, or its output is too
            long.
        """
        blocks: list[str] = []
        progress = _Progress()
        token = _progress.set(progress)
        try:
            for block in self._template.generate(**variables):
                blocks.append(block)
                progress.n_characters += len(block)
                if progress.n_characters > MAX_RENDERED_CHARACTERS:
                    raise ValueError(f"rendered more than {MAX_RENDERED_CHARACTERS} characters")
        except Exception as error:  # the template can raise anything
            raise ValueError(
                f"the {self._name} rejects the messages: {str(error) or type(error).__name__}"
            ) from error
        finally:
            _progress.reset(token)
        return "".join(blocks), progress.spans

    def _compile(self, source: str) -> Any:
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError as error:
            raise ValueError("chat templates need: pip install 'tjx-data[chat]'") from error

        class Generation(jinja2.ext.Extension):
            """The tag ``{% generation %}``, which records where its content is."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                call = self.call_method("_record")
                return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

            def _record(self, caller: Any) -> str:
                content: str = caller()
                progress = _progress.get()
                start = progress.n_characters
                progress.spans.append(Span(start, start + len(content)))
                return content

        class Namespace(jinja2.utils.Namespace):
            """Namespace without attributes that start with an underscore."""

            def __setitem__(self, name: str, value: Any) -> None:
                if name.startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"{name}: names may not start with _")
                super().__setitem__(name, value)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        for random in (environment.filters.pop("random"), environment.globals.pop("lipsum")):
            assert callable(random)
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": self._strftime,
            "namespace": Namespace,
            "dict": lambda *args, **values: dict(*args, **values),
        }
        try:
            return environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(
                f"template: got {self._name}, which is no template: {error}"
            ) from error

    def _strftime(self, form: str) -> str:
        if self._date is None:
            raise ValueError("it prints today's date; give the date to print (chat.date)")
        return self._date.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump JSON without escaping HTML, unlike Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> Iterator[None]:
    raise ValueError(message)
