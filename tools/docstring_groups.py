"""Griffe extension of the API reference: give each parameter of a group its own type.

A docstring describes several parameters together as `config, params` without types. Griffe would
give all of them the type of the first.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Parameters|Attributes)\n-+\n", re.MULTILINE)
NEXT_SECTION = re.compile(r"^\w.*\n---+\n", re.MULTILINE)
GROUP = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)+)\n((?:(?: +.*)?\n)*)", re.MULTILINE)


def split_groups(docstring: str) -> str:
    """Return a docstring with an entry for each parameter of a group without types.

    Parameters
    ----------
    docstring
        A cleaned docstring in NumPy form.

    Returns
    -------
    str
        The docstring; each entry of a group has the description of the group.
    """
    started = SECTION.search(docstring)
    if started is None:
        return docstring
    ended = NEXT_SECTION.search(docstring, started.end())
    end = ended.start() if ended else len(docstring)
    entries = docstring[started.end() : end].rstrip("\n") + "\n"
    entries = GROUP.sub(
        lambda group: "".join(f"{name}\n{group[2]}" for name in group[1].split(", ")), entries
    )
    return f"{docstring[: started.end()]}{entries}\n{docstring[end:]}"


class ParameterGroups(griffe.Extension):
    """Split groups in the docstrings of functions and classes."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that griffe has read."""
        if obj.docstring is not None and (obj.is_function or obj.is_class):
            obj.docstring.value = split_groups(obj.docstring.value)
