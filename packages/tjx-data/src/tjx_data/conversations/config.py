"""Configuration of conversations: format, template, loss mask and truncation."""

import datetime
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_core import ConfigError, Problem

RecordFormat = Literal["auto", "messages", "sharegpt", "alpaca", "completion"]
Turns = Literal["all", "last"]
Truncation = Literal["error", "drop", "right", "left"]


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Format, chat template, loss mask and truncation of conversations.

    Attributes
    ----------
    format
        Format of the records: messages, sharegpt, alpaca, completion, or auto (by their keys).
    template
        Chat template: a file or folder of Hugging Face (chat_template.jinja, or chat_template in
        tokenizer_config.json), tjx (needs the tokens <|system|>, <|user|>, <|assistant|>, <|tool|>
        and <|end|>), plain (text, works with any tokenizer), or auto: that of the tokenizer's
        folder, else tjx if the tokenizer has its tokens, else plain.
    turns
        Assistant messages that are trained on: all, or the last of each conversation.
    truncation
        Conversations longer than a row: error, drop, right (keep the start) or left (keep the end).
    skip_malformed
        Leave malformed conversations out, counted and logged; by default they are an error.
    ignore_keys
        Names of further keys of records and messages to ignore, separated by commas.
    date
        Date that a template prints as today's (YYYY-MM-DD); required by such templates, so that a
        resumed run reads the same tokens.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    format: RecordFormat = "auto"
    template: str = "auto"
    turns: Turns = "all"
    truncation: Truncation = "error"
    skip_malformed: bool = False
    ignore_keys: str | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"got {value!r}; expected one of {', '.join(get_args(kind))}")
            for name, kind in (
                ("format", RecordFormat), ("turns", Turns), ("truncation", Truncation)
            )
            if (value := getattr(self, name)) not in get_args(kind)
        ]  # fmt: skip
        if self.ignore_keys is not None and not self.ignored:
            message = f"got {self.ignore_keys!r}; expected names such as source,weight, or none"
            problems.append(Problem("ignore_keys", message))
        if not self.template:
            problems.append(Problem("template", "got ''; expected auto, tjx, plain or a path"))
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                message = f"got {self.date!r}; expected a date such as 2026-01-31"
                problems.append(Problem("date", message))
        if problems:
            raise ConfigError(problems)

    @property
    def ignored(self) -> frozenset[str]:
        """The names in `ignore_keys`."""
        return frozenset(
            name.strip() for name in (self.ignore_keys or "").split(",") if name.strip()
        )
