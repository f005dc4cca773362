"""Compare the docstrings of public names with their signatures and bodies, as numpydoc does.

A public name is what a package exports: a function, or a class with its public methods. The sources
are parsed by griffe, not imported.
"""

import ast
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import griffe

# Annotations of functions without a result.
NOTHING = {"None", "NoReturn", "Never"}
HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
# The order of sections in numpydoc's format.
ORDER = (
    "Parameters", "Attributes", "Methods", "Returns", "Yields", "Other Parameters", "Raises",
    "Warns", "See Also", "Notes", "References", "Examples",
)  # fmt: skip
DESCRIBED = ("parameters", "attributes", "returns", "yields", "raises")


def docstring_problems(name: str, target: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Yield what the docstring of a public name, or of a method of a public class, lacks.

    Parameters
    ----------
    name
        Full name of the target.
    target
        What it names, with docstrings parsed as NumPy's.

    Yields
    ------
    str
        `name: problem`.
    """
    if isinstance(target, griffe.Function):
        yield from (f"{name}: {problem}" for problem in _function_problems(target))
    elif isinstance(target, griffe.Class):
        yield from (f"{name}: {problem}" for problem in _class_problems(target))
        for method in target.functions.values():
            if not method.name.startswith("_") and not _is_inherited(target, method):
                full_name = f"{name}.{method.name}"
                yield from (f"{full_name}: {problem}" for problem in _function_problems(method))
    elif target.docstring is None:
        yield f"{name}: no docstring"


def _class_problems(target: griffe.Class) -> Iterator[str]:
    if target.docstring is None:
        yield "no docstring"
        return
    sections = _sections(target.docstring)
    yield from _section_problems(target.docstring, sections)
    parameters, attributes = _names(sections, "parameters"), _names(sections, "attributes")
    if "dataclass" in target.labels:  # fields of base classes are described there
        inherited = {name for base in target.mro() for name in base.members}
        fields = [m.name for m in target.members.values() if _is_field(m)]
        fields = [name for name in fields if name not in inherited or name in attributes]
        yield from _difference(fields, [*parameters, *attributes])
    constructor = target.members.get("__init__")
    if isinstance(constructor, griffe.Function) and "dataclass" not in target.labels:
        yield from _difference(_taken(constructor), parameters, attributes)
        yield from _raise_problems(constructor, sections)


def _function_problems(function: griffe.Function) -> Iterator[str]:
    if function.docstring is None:
        yield "no docstring"
        return
    sections = _sections(function.docstring)
    yield from _section_problems(function.docstring, sections)
    taken = _taken(function)
    yield from _difference(taken, _names(sections, "parameters"))
    returned = str(function.returns) if function.returns is not None else "None"
    if returned not in NOTHING and taken and not sections.keys() & {"returns", "yields"}:
        yield "no section Returns or Yields"
    yield from _raise_problems(function, sections)


def _section_problems(docstring: griffe.Docstring, sections: dict[str, Any]) -> Iterator[str]:
    headings = HEADING.findall(docstring.value)
    if unknown := [heading for heading in headings if heading not in ORDER]:
        yield f"unknown section {', '.join(unknown)}"
    elif headings != sorted(set(headings), key=ORDER.index):
        yield f"sections in the order {', '.join(headings)}"
    for kind in DESCRIBED:
        for each in sections.get(kind, ()):
            if not each.description.strip():
                entry = getattr(each, "name", "") or each.annotation
                yield f"{kind.capitalize()} without a description of {entry}"


def _raise_problems(function: griffe.Function, sections: dict[str, Any]) -> Iterator[str]:
    tree = ast.parse(textwrap.dedent("\n".join(function.lines)))
    listed = {str(each.annotation) for each in sections.get("raises", ())}
    for node in _own_nodes(tree.body[0]):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = ast.unparse(node.exc.func)
            if error == "ValueError" and error not in listed:
                yield f"no section Raises with {error}"
                return


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_nodes(child)


def _is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Return whether a member of a dataclass is a public field."""
    if not isinstance(member, griffe.Attribute) or "property" in member.labels:
        return False
    annotation = str(member.annotation or "ClassVar")
    return not member.name.startswith("_") and "ClassVar" not in annotation


def _difference(
    taken: list[str], described: list[str], also: Collection[str] = ()
) -> Iterator[str]:
    if missing := [name for name in taken if name not in described and name not in also]:
        yield f"Parameters without {', '.join(missing)}"
    if unknown := [name for name in described if name not in taken]:
        yield f"Parameters with {', '.join(unknown)}, not in the signature"


def _taken(function: griffe.Function) -> list[str]:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    return [
        (stars.get(p.kind, "") if p.kind else "") + p.name
        for p in function.parameters
        if p.name not in ("self", "cls") and not p.name.startswith("_")
    ]


def _names(sections: dict[str, Any], kind: str) -> list[str]:
    # griffe separates names that share a description in Parameters only.
    return [name for each in sections.get(kind, ()) for name in each.name.split(", ")]


def _sections(docstring: griffe.Docstring) -> dict[str, Any]:
    return {section.kind.value: section.value for section in docstring.parsed}


def _is_inherited(owner: griffe.Class, method: griffe.Function) -> bool:
    """Return whether a method overrides one of a base class, which documents it."""
    return any(method.name in base.members for base in owner.mro())
