"""The build of the documentation finds docstrings that do not match their signatures."""

from pathlib import Path

import griffe
from docstring_check import docstring_problems
from docstring_groups import ParameterGroups

GOOD = '''
from dataclasses import dataclass

def scale(x, *rest, factor=2, **options) -> float:
    """Multiply.

    Parameters
    ----------
    x, factor
        Factors.
    *rest, **options
        Ignored.

    Returns
    -------
    float
        The product.

    Raises
    ------
    ValueError
        If x is negative.
    """
    if x < 0:
        raise ValueError("x")
    return x * factor

def forget(name) -> None:
    """Forget.

    Parameters
    ----------
    name
        What to forget.
    """
    def inner():
        raise ValueError("not by forget itself")

@dataclass
class Base:
    """Settings.

    Attributes
    ----------
    size, depth
        Two numbers.
    """

    size: int
    depth: int = 1

    @property
    def area(self) -> int:
        """The area."""
        return self.size**2

@dataclass
class Derived(Base):
    """The same with another default."""

    depth: int = 2
'''
BROKEN = {
    "x, factor\n": "x\n",
    "    *rest, **options": "    *rest, **choices",
    "    Returns\n    -------\n    float\n        The product.\n": "",
    "    ValueError\n        If x": "    TypeError\n        If x",
    "    size, depth\n": "    size\n",
    '    """Forget.\n\n': '    "".join([])\n    """Forget.\n\n',
}
EXPECTED = [
    "sample.scale: Parameters without factor",
    "sample.scale: Parameters without **options",
    "sample.scale: no section Returns or Yields",
    "sample.scale: no section Raises with ValueError",
    "sample.Base: Parameters without depth",
    "sample.forget: no docstring",
]


def problems(folder: Path, source: str) -> list[str]:
    """Return the problems of all names of a module."""
    (folder / "sample.py").write_text(source)
    module = griffe.load("sample", search_paths=[folder], docstring_parser="numpy")
    own = {name: each for name, each in module.members.items() if not each.is_alias}
    return [
        text for name, each in own.items() for text in docstring_problems(f"sample.{name}", each)
    ]


def test_every_difference_is_found(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD) == []
    for (old, new), expected in zip(BROKEN.items(), EXPECTED, strict=True):
        assert old in GOOD
        found = problems(tmp_path, GOOD.replace(old, new))
        assert expected in found, (expected, found)


def test_each_parameter_of_a_group_has_its_own_type(tmp_path: Path) -> None:
    (tmp_path / "grouped.py").write_text(
        'def f(a: int, b: str, *c: float) -> None:\n    """Do.\n\n    Parameters\n    ----------\n'
        '    a, b, *c\n        Values.\n    """\n'
    )
    module = griffe.load(
        "grouped",
        search_paths=[str(tmp_path)],
        docstring_parser="numpy",
        extensions=griffe.load_extensions(ParameterGroups),
    )
    (section,) = [
        section for section in module["f"].docstring.parsed if section.kind.value == "parameters"
    ]
    types = [(each.name, str(each.annotation), each.description) for each in section.value]
    assert types == [("a", "int", "Values."), ("b", "str", "Values."), ("*c", "float", "Values.")]
