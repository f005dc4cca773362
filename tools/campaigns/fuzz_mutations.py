"""Mutations of JSON and YAML trees, bytes and files.

All choices use the given `random.Random`: a case is a function of its seed.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

_NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
    2**64, 10**12, 10**30, -(2**63), 0.5, -0.5, 1e-9, 1e18, 1e308, 1e-320, math.nan, math.inf,
    -math.inf, True, False,
]  # fmt: skip
_TEXTS: list[str] = [
    "", " ", "0", "1e9999", "none", "null", "true", "nan", "..", ".", "/", "../../../etc/passwd",
    "/etc/passwd", "/dev/zero", "/proc/self/mem", "~root", "\x00", "a\x00b", "\ud800", "\u202e",
    "\U0001f600", "e\u0301", "\ufeff", "a\nb", "%s%n", "{0}", "${HOME}", "$(id)", "`id`", "-1",
    "__class__", "constructor", "O", "object", "V0", "float128", "f4,f4", "<U9", "M8", "int4",
    "tensor", "9" * 5000, "a" * 100_000, "[" * 5000, "C:\\x", "http://127.0.0.1:9/", "file:///etc",
    "s3://x/y", "!!python/object/apply:os.system ['true']",
]  # fmt: skip


def draws(name: str) -> Random:
    """Return a random generator seeded by a name."""
    return Random(name)  # noqa: S311  cases, not secrets


def hostile(random: Random) -> Any:
    """Return an unexpected value."""
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(_NUMBERS)
    if kind < 6:
        return random.choice(_TEXTS)
    if kind == 6:
        return random.choice([None, [], {}, [None], [[]], {"a": 1}, [0, 1, 2], [2**62, 2**62]])
    return nested(random.choice([3, 50, 250]), random)


def nested(depth: int, random: Random) -> Any:
    """Return deeply nested lists or objects."""
    value: Any = 1
    as_list = random.random() < 0.5
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def mutate_tree(tree: Any, random: Random) -> Any:
    """Return a copy of a tree of lists, dicts and values with one mutation."""
    try:
        tree = copy.deepcopy(tree)
    except RecursionError:  # an earlier mutation nested it too deeply
        return hostile(random)
    places = list(_places(tree))
    if not places:
        return hostile(random)
    holder, key = random.choice(places)
    random.choice(_CHANGES)(holder, key, random)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """List all (container, key) pairs of a tree up to a maximum depth."""
    if not isinstance(tree, dict | list):
        return []
    found: list[tuple[Any, Any]] = []
    pending = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list) and depth < 20:
                pending.append((node[key], depth + 1))
    return found


def _replace(holder: Any, key: Any, random: Random) -> None:
    holder[key] = hostile(random)


def _delete(holder: Any, key: Any, _: Random) -> None:
    del holder[key]


def _near(holder: Any, key: Any, random: Random) -> None:
    """Change a value slightly, or convert it to another type."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = random.choice(["yes", 1, 0, not value, str(value)])
    elif isinstance(value, int | float):
        holder[key] = random.choice(
            [value + 1, value - 1, -value, value * 2, value * 1000, value * 2**20, str(value),
             float(value) if abs(value) < 1e300 else value, [value], value + 0.5]
        )  # fmt: skip
    elif isinstance(value, str):
        holder[key] = random.choice(
            [value.upper(), value + " ", value[:-1], value * 3, [value], value.encode().hex(),
             "../" + value, "/" + value, value + "\x00", value + "/../" + value]
        )  # fmt: skip
    elif isinstance(value, list):
        holder[key] = random.choice([value[1:], value + value, value[::-1], value[:1], str(value)])
    else:
        holder[key] = random.choice([list(value.items()), list(value), str(value), {}])


def _exchange(holder: Any, key: Any, random: Random) -> None:
    other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def _add(holder: Any, _: Any, random: Random) -> None:
    if isinstance(holder, dict):
        holder[random.choice([*_TEXTS[:20], "unknown"])] = hostile(random)
    else:
        holder.insert(random.randrange(len(holder) + 1), hostile(random))


def _rename(holder: Any, key: Any, random: Random) -> None:
    if isinstance(holder, dict):
        holder[random.choice([key + "s", key.upper(), *_TEXTS[:25]])] = holder.pop(key)


def _repeat(holder: Any, key: Any, random: Random) -> None:
    """Repeat a value to a large size."""
    count = random.choice([2, 100, 3000])
    if isinstance(holder, list):
        holder.extend([holder[key]] * count)
    else:
        holder |= {f"{key}{number}": holder[key] for number in range(count)}


_CHANGES: list[Callable[[Any, Any, Random], None]] = [
    _replace, _replace, _replace, _delete, _near, _near, _near, _exchange, _add, _rename, _repeat,
]  # fmt: skip


def render(tree: Any, random: Random) -> bytes:
    """Serialize a tree as JSON, occasionally with syntax errors."""
    try:
        text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    except RecursionError:
        text = "[" * 100_000
    kind = random.randrange(20)
    if kind == 0:  # a repeated key
        place = text.find("{")
        end = text.find(",", place)
        if place >= 0 and end > 0:
            text = text[: end + 1] + text[place + 1 : end + 1] + text[end + 1 :]
    elif kind == 1:
        text = random.choice(["\ufeff" + text, text + text, text + "}", text[:-1], text + "//"])
    elif kind == 2:
        text = text.replace(":", random.choice([":-", ": 0", ":1e9999,"]), 1)
    elif kind == 3:  # deeper than Python can copy a tree
        depth = random.choice([900, 5000, 100_000])
        text = text.replace(": ", f": {'[' * depth}{']' * depth}, " + '"more": ', 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with one mutation: bits, a range, or the length."""
    if not data:
        return random.randbytes(random.choice([1, 8, 64]))
    at = random.randrange(len(data))
    length = min(random.choice([1, 2, 4, 8, 64, 1000]), len(data) - at)
    rest = data[at + length :]
    kind = random.randrange(9)
    if kind <= 1:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + b"\0" * length + rest
    if kind == 4:
        return data[:at] + random.randbytes(length) + rest
    if kind == 5:
        return data[:at] + data[at : at + length] * random.choice([2, 50]) + rest
    if kind == 6:
        return data[:at] + rest
    if kind == 7:
        return data + random.randbytes(random.choice([1, 8, 5000]))
    size = random.choice([0, 7, 2**20, 2**31, 2**40, 2**60, 2**63, 2**64 - 1])
    return size.to_bytes(8, random.choice(["little", "big"])) + data[8:]


LARGEST_OF_OURS = 1 << 24  # bytes; only mutated files are larger


def is_small_file(path: Path) -> bool:
    """Return whether a file is small enough to be read and mutated."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < LARGEST_OF_OURS


def spoil_file(path: Path, random: Random, *, may_be_large: bool = True) -> None:
    """Replace a file by nothing, a folder, a pipe, a link or a sparse file."""
    kind = random.randrange(6 if may_be_large else 5)
    path.unlink(missing_ok=True)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(random.choice(["/dev/zero", "/dev/null", "/proc/self/maps", path.name]))
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:  # a large sparse file
        with path.open("wb") as file:
            file.truncate(2**40)
