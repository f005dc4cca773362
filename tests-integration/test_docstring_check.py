"""Docstrings match their signatures; elementary pieces have examples of at most three lines."""

import doctest
import operator
from pathlib import Path

import griffe
import pytest
from docstring_check import docstring_problems
from docstring_groups import ParameterGroups

import tjx_ckpt
import tjx_data
import tjx_kernels
import tjx_nn
import tjx_optim

# Pieces of a training program that users call on their own, by package.
ELEMENTARY = {
    tjx_ckpt: "save_tree",
    tjx_data: "TokenLoader.from_tokens",
    tjx_kernels: "flash_attention linear_cross_entropy",
    tjx_nn: "Attention Block LayerNorm Linear MLP RMSNorm SwiGLU apply_rope cross_entropy "
    "from_params gelu_erf gelu_tanh info_nce sample",
    tjx_optim: "global_norm make_schedule",
}
PIECES = [
    pytest.param(operator.attrgetter(name)(package), id=name)
    for package, names in ELEMENTARY.items()
    for name in names.split()
]

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
    "        Factors.\n": "",
    "        The product.\n": "",
    "        If x is negative.\n": "",
    "    Returns\n    -------\n    float": "    Result\n    ------\n    float",
    "    name\n        What to forget.\n": (
        "    name\n        What to forget.\n\n    Notes\n    -----\n    One.\n\n"
        "    Raises\n    ------\n    OSError\n        Never.\n"
    ),
}
EXPECTED = [
    "sample.scale: Parameters without factor",
    "sample.scale: Parameters without **options",
    "sample.scale: no section Returns or Yields",
    "sample.scale: no section Raises with ValueError",
    "sample.Base: Parameters without depth",
    "sample.forget: no docstring",
    "sample.scale: Parameters without a description of factor",
    "sample.scale: Returns without a description of float",
    "sample.scale: Raises without a description of ValueError",
    "sample.scale: unknown section Result",
    "sample.forget: sections in the order Parameters, Notes, Raises",
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


@pytest.mark.parametrize("piece", PIECES)
def test_an_elementary_piece_takes_three_lines(piece: object) -> None:
    """Examples are separated by prose; imports do not count. The tests of each package run them."""
    lines = [0]
    for part in doctest.DocTestParser().parse(piece.__doc__ or ""):
        if isinstance(part, str):
            lines += [0] if part.strip() else []
        elif not part.source.startswith(("import ", "from ")):
            lines[-1] += part.source.count("\n")
    assert 1 <= max(lines) <= 3, lines


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
