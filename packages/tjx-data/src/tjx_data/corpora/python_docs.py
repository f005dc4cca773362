"""Corpus ``python-docs``: the documentation in the CPython installation.

The language reference topics of ``help()`` and the docstrings of the standard library: English text
about programming that needs neither a network nor a data file.
"""

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Tests, bundled programs and installed packages are not library documentation.
EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib-dynload", "lib2to3"}
    | {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
MIN_CHARACTERS = 32
"""Shorter docstrings are left out: they say little more than a name."""

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.stmt, ast.excepthandler)  # expressions hold no definitions
type _DocumentedNode = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source() -> dict[str, str]:
    """Return the Python version, which determines the corpus."""
    return {"python": f"{platform.python_implementation()} {platform.python_version()}"}


@cache
def documents() -> tuple[str, ...]:
    """Return the documents of the corpus: topics, then modules sorted by path.

    A document is a topic, a module docstring, or the docstrings of one top-level function or class
    with all its methods. Each docstring occurs once, without its indentation. Sources are parsed,
    never imported; unreadable files are left out.

    Raises
    ------
    ValueError
        If this Python installation has neither topics nor sources.
    """
    seen: set[str] = set()
    texts = [text for text in _topics() if _is_new(text, seen)]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        tree = _parse(path)
        if tree is None:
            continue
        for parts in ([ast.get_docstring(tree)], *map(_docstrings, _definitions(tree))):
            kept = [part for part in parts if part is not None and _is_new(part, seen)]
            if kept:
                texts.append("\n\n".join(kept))
    if not texts:
        raise ValueError(
            f"corpus: got 'python-docs'; this Python has no library sources under {root} and no "
            "pydoc topics; use --data.path FILE_OR_GLOB"
        )
    return tuple(texts)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return []
    return [topics[name].strip() for name in sorted(topics)]


def _sources(root: Path) -> list[Path]:
    """List the library's modules sorted by path, independent of the file system."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        if not generated and EXCLUDED_FOLDERS.isdisjoint(parts):
            found.append((parts, path))
    return [path for _, path in sorted(found)]


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escape sequences
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _definitions(node: ast.AST) -> Iterator[_DocumentedNode]:
    """Yield the functions and classes directly below a node, also those inside if and try."""
    pending = [*ast.iter_child_nodes(node)][::-1]
    while pending:
        child = pending.pop()
        if isinstance(child, _DEFINITIONS):
            yield child
        elif isinstance(child, _BLOCKS):
            pending += [*ast.iter_child_nodes(child)][::-1]


def _docstrings(node: _DocumentedNode) -> list[str | None]:
    texts = [ast.get_docstring(node)]
    for definition in _definitions(node):
        texts += _docstrings(definition)
    return texts


def _is_new(text: str, seen: set[str]) -> bool:
    """Return whether a text is long enough and new, and add it to `seen`."""
    if len(text) < MIN_CHARACTERS or text in seen:
        return False
    seen.add(text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a literal with a lone surrogate
        return False
    return True
