"""Verifier of JSON: a subset of JSON Schema."""

import json
from collections.abc import Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float),
    "integer": (int,), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_KEYWORDS = frozenset({
    "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "enum", "const", "minimum", "maximum", "title", "description",
})  # fmt: skip


def matches_schema(response: str, schema: str) -> bool:
    """Return whether a response is JSON that a schema describes.

    Parameters
    ----------
    response : str
        The whole response is parsed.
    schema : str
        JSON Schema as JSON, of the keywords type, properties, required, additionalProperties (true
        or false), items, minItems, maxItems, enum, const, minimum and maximum.

    Raises
    ------
    ValueError
        If the schema is not JSON or has another keyword.

    Examples
    --------
    >>> schema = '{"type": "object", "required": ["x"], "properties": {"x": {"type": "integer"}}}'
    >>> matches_schema('{"x": 3}', schema), matches_schema('{"x": "3"}', schema)
    (True, False)
    """
    described = json.loads(schema)
    _check_keywords(described)
    try:
        value = json.loads(response)
    except (ValueError, RecursionError):
        return False
    return _matches(value, described)


def _check_keywords(schema: Any) -> None:
    if not isinstance(schema, dict) or set(schema) - _KEYWORDS:
        given = sorted(set(schema) - _KEYWORDS) if isinstance(schema, dict) else schema
        raise ValueError(
            f"schema: got {given!r}; expected an object with keywords of "
            f"{', '.join(sorted(_KEYWORDS))}; remove the others"
        )
    for inner in [
        *schema.get("properties", {}).values(),
        *([schema["items"]] if "items" in schema else []),
    ]:
        _check_keywords(inner)


def _matches(value: Any, schema: Mapping[str, Any]) -> bool:
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_has_type(value, name) for name in names):
            return False
    if "enum" in schema and not any(_equal(value, each) for each in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if _has_type(value, "number") and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        return False
    if isinstance(value, list):
        count = len(value)
        return schema.get("minItems", 0) <= count <= schema.get("maxItems", count) and all(
            _matches(item, schema.get("items", {})) for item in value
        )
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not schema.get("additionalProperties", True) and set(value) - set(properties):
            return False
        return set(schema.get("required", ())) <= set(value) and all(
            _matches(value[name], inner) for name, inner in properties.items() if name in value
        )
    return True


def _has_type(value: Any, name: str) -> bool:
    # bool is a subclass of int; a float without fraction is an integer.
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _equal(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
