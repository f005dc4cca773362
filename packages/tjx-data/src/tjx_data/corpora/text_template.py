"""Text of a record: one of its fields, or a template of several."""

import string
from collections.abc import Mapping
from functools import cache
from typing import Any

from tjx_core import ConfigError, Problem

_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@cache
def record_fields(text_field: str) -> tuple[str, ...]:
    """Return the fields that make the text of a record.

    Parameters
    ----------
    text_field : str
        Name of a field, or a template with names in braces; ``{{`` and ``}}`` are braces.

    Raises
    ------
    ConfigError
        If it is no valid template, or selects attributes, items, formats or conversions.

    Examples
    --------
    >>> record_fields("text"), record_fields("{title}: {body}")
    (('text',), ('title', 'body'))
    """
    if "{" not in text_field and "}" not in text_field:
        return (text_field,)
    try:
        parsed = list(string.Formatter().parse(text_field))
    except ValueError as error:
        raise _invalid(text_field, str(error)) from error
    names = []
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if not name or form or conversion or set(name) & set(".[]"):
            raise _invalid(text_field, "braces hold more than the name of a field")
        names.append(name)
    if not names:
        raise _invalid(text_field, "it has no field")
    return tuple(dict.fromkeys(names))


def record_text(record: Mapping[str, Any], text_field: str) -> str:
    r"""Return the text of a record.

    Parameters
    ----------
    record : Mapping
        The record.
    text_field : str
        As of `record_fields`. In a template the characters ``\n`` are a newline; fields can hold
        strings and numbers.

    Raises
    ------
    ValueError
        If a field is missing or has another type, as a reason without the name of the file.

    Examples
    --------
    >>> record_text({"title": "A", "body": 1}, "{title}: {body}")
    'A: 1'
    """
    fields = record_fields(text_field)
    is_template = fields != (text_field,)
    values = {}
    for field in fields:
        if field not in record:
            raise ValueError(f"has no field {field!r}; it has {', '.join(record) or 'none'}")
        value = record[field]
        is_number = is_template and isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) or is_number):
            found = _TYPES.get(type(value), f"a {type(value).__name__}")
            raise ValueError(f"field {field!r} holds {found}, not a string")
        if isinstance(value, str) and not _is_unicode(value):
            raise ValueError(f"field {field!r} holds a lone surrogate")
        values[field] = value
    if not is_template:
        return str(values[text_field])
    return text_field.replace("\\n", "\n").format_map(values)


def type_name(value: object) -> str:
    """Return a name of the type of a JSON value: "an object"."""
    return _TYPES[type(value)]


def _invalid(text_field: str, reason: str) -> ConfigError:
    message = (
        f"got {text_field!r} ({reason}); expected the name of a field, or a template such as "
        "'{title}\\n{text}'"
    )
    return ConfigError([Problem("text_field", message)])


def _is_unicode(text: str) -> bool:
    r"""Return whether a string has UTF-8; JSON can hold lone surrogates such as ``"\ud800"``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
