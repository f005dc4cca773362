"""Validation of an index from an untrusted source.

The hash in an index detects accidental damage only. Therefore each field is checked, and all file
sizes are checked to follow from the counts, before any of them is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from tjx_data.corpora.documents import Holdout, SplitName

_Check = Callable[[Any], bool]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MAX_COUNT = 1 << 62  # beyond any disk; sums of such numbers still fit in uint64


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_file_name(value: Any) -> bool:
    """Return whether a value is a file name that cannot leave the folder."""
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None


def _is_file(value: Any) -> bool:
    return not [*_wrong_fields(value, _FILE, "")]


_FILE: dict[str, tuple[_Check, str]] = {
    "name": (_is_file_name, "the name of a file in the folder"),
    "n_bytes": (_is_count, "a number of bytes"),
    "sha256": (_is_hash, "a SHA-256"),
}
_A_FILE = "the name, n_bytes and sha256 of a file in the folder"
_SPLIT: dict[str, tuple[_Check, str]] = {
    "n_tokens": (_is_count, "a count"),
    "n_documents": (_is_count, "a count"),
    "n_text_bytes": (_is_count, "a count"),
    "shards": (lambda v: isinstance(v, list) and all(map(_is_file, v)), f"a list: {_A_FILE}"),
    "starts": (_is_file, _A_FILE),
}
_INDEX: dict[str, tuple[_Check, str]] = {
    "dtype": (lambda v: v in ("uint16", "uint32"), "uint16 or uint32"),
    "shard_tokens": (lambda v: _is_count(v) and v > 0, "a count above 0"),
    "vocab_size": (lambda v: _is_count(v) and 0 < v <= 1 << 32, "a count from 1 to 2**32"),
    "eot_id": (lambda v: v is None or _is_count(v), "a token or null"),
    "tokenizer_fingerprint": (_is_hash, "a SHA-256"),
    "tokenizer": (_is_file, _A_FILE),
    "holdout": (lambda v: v in get_args(Holdout), " or ".join(get_args(Holdout))),
    "holdout_fraction": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "n_empty_documents": (_is_count, "a count"),
    "n_malformed": (_is_count, "a count"),
    "malformed": (lambda v: v is None or _is_file(v), f"null, or {_A_FILE}"),
    "source": (
        lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values()),
        "an object of strings",
    ),
    "splits": (
        lambda v: isinstance(v, dict) and v.keys() == set(get_args(SplitName)),
        " and ".join(get_args(SplitName)),
    ),
}


def validate_index(content: Mapping[str, Any], header_bytes: int) -> list[str]:
    """Return one line for each field of an index that is invalid or contradicts another.

    Parameters
    ----------
    content : Mapping
        The index as JSON, without its hash and format.
    header_bytes : int
        Size of a shard's header.

    Returns
    -------
    list of str
        Empty for a valid index.
    """
    problems = [*_wrong_fields(content, _INDEX, "")]
    if problems:
        return problems
    for name, split in content["splits"].items():
        problems += _wrong_fields(split, _SPLIT, f"splits.{name}.")
    return problems or [*_contradictions(content, header_bytes)]


def _wrong_fields(
    given: Any, rules: Mapping[str, tuple[_Check, str]], prefix: str
) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{prefix.rstrip('.')}: expected an object with {', '.join(rules)}"
        return
    for name in given.keys() - rules:
        yield f"{prefix}{name[:40]!r}: unknown field"
    for name, (check, rule) in rules.items():
        if name not in given:
            yield f"{prefix}{name}: missing"
        elif not check(given[name]):
            yield f"{prefix}{name}: expected {rule}"


def _contradictions(content: Mapping[str, Any], header_bytes: int) -> Iterator[str]:
    token_bytes = 2 if content["dtype"] == "uint16" else 4
    if token_bytes != (2 if content["vocab_size"] <= 1 << 16 else 4):
        yield f"dtype: {content['dtype']} contradicts vocab_size {content['vocab_size']}"
    if content["eot_id"] is not None and content["eot_id"] >= content["vocab_size"]:
        yield f"eot_id: got {content['eot_id']}; expected below vocab_size {content['vocab_size']}"
    shared = [content["tokenizer"], *([content["malformed"]] if content["malformed"] else [])]
    names = [entry["name"] for entry in shared]
    for name, split in content["splits"].items():
        names += [entry["name"] for entry in (*split["shards"], split["starts"])]
        yield from _wrong_sizes(name, split, content["shard_tokens"], token_bytes, header_bytes)
    if len(set(names)) < len(names):
        yield "two entries name the same file"


def _wrong_sizes(
    name: str, split: Mapping[str, Any], shard_tokens: int, token_bytes: int, header_bytes: int
) -> Iterator[str]:
    """Yield the files whose sizes do not follow from the counts."""
    n_tokens, n_shards = split["n_tokens"], len(split["shards"])
    if n_shards != max(1, -(-n_tokens // shard_tokens)):
        yield f"{name}: {n_shards} shards of {shard_tokens} tokens for {n_tokens} tokens"
        return
    for number, entry in enumerate(split["shards"]):
        tokens = min(shard_tokens, n_tokens - number * shard_tokens)
        if entry["n_bytes"] != header_bytes + tokens * token_bytes:
            yield f"{name}: {entry['name']} has {entry['n_bytes']} bytes for {tokens} tokens"
    if split["starts"]["n_bytes"] != 8 * split["n_documents"]:
        yield f"{name}: starts: expected 8 bytes for each of {split['n_documents']} documents"
    if split["n_documents"] and not split["n_tokens"]:
        yield f"{name}: {split['n_documents']} documents without a token"
