"""The embedded corpus: the documentation that every CPython carries.

The language reference topics behind ``help()`` and the docstrings of the standard library: English
about programming, on every machine that runs this code, with no network and no file of our own.
"""

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Tests, bundled programs and what others installed are not documentation of the library.
EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib-dynload", "lib2to3"}
    | {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
SHORTEST = 32  # characters; below that a docstring says little more than a name

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.stmt, ast.excepthandler)  # expressions hold no definitions
type _Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source() -> dict[str, str]:
    """Return what the corpus depends on: the Python that carries it."""
    return {"python": f"{platform.python_implementation()} {platform.python_version()}"}


@cache
def documents() -> tuple[str, ...]:
    """Return the corpus: topics first, then the modules in the order of their paths.

    A document is a topic, a module's docstring, or the docstrings of one top-level function or
    class with all its methods. Each docstring appears once, cleaned of its indentation. The
    sources are parsed, never imported; files that cannot be read or parsed are left out.

    Raises
    ------
    ValueError
        If this Python carries neither topics nor sources.
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
            f"corpus python-docs: this Python has no library sources under {root} and no pydoc "
            "topics; use --data.path FILE_OR_GLOB"
        )
    return tuple(texts)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it separately
        return []
    return [topics[name].strip() for name in sorted(topics)]


def _sources(root: Path) -> list[Path]:
    """List the library's modules, ordered by path so that no file system decides."""
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
            warnings.simplefilter("ignore")  # odd escapes in old modules are not our business
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """Yield the functions and classes right below a node, also those inside if and try."""
    pending = [*ast.iter_child_nodes(node)][::-1]
    while pending:
        child = pending.pop()
        if isinstance(child, _DEFINITIONS):
            yield child
        elif isinstance(child, _BLOCKS):
            pending += [*ast.iter_child_nodes(child)][::-1]


def _docstrings(node: _Documented) -> list[str | None]:
    texts = [ast.get_docstring(node)]
    for definition in _definitions(node):
        texts += _docstrings(definition)
    return texts


def _is_new(text: str, seen: set[str]) -> bool:
    """Tell whether a docstring is to be kept, and remember it."""
    if len(text) < SHORTEST or text in seen:
        return False
    seen.add(text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a literal with a lone surrogate
        return False
    return True
