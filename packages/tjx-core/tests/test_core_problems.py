"""Structured configuration errors."""

import pickle

from tjx_core import ConfigError, Problem, problems_of


def test_an_error_has_a_line_for_each_problem() -> None:
    error = ConfigError([Problem("a.b", "got 1; expected 2"), "no data"])
    assert str(error) == "a.b: got 1; expected 2\nno data"
    assert isinstance(error, ValueError)


def test_an_error_survives_pickling_with_its_problems() -> None:
    """Worker processes send their exceptions to the parent."""
    error = ConfigError([Problem("a", "got 1", ("b",)), "no data"])
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301  # made in the line above
    assert copied.problems == error.problems
    assert str(copied) == str(error)


def test_sections_prefix_every_path() -> None:
    problem = Problem("b", "contradicts", ("c",)).within("a").within("top")
    assert problem.paths == ("top.a.b", "top.a.c")
    assert Problem("", "is empty").within("data").paths == ("data",)


def test_other_errors_give_a_problem_for_each_line() -> None:
    assert [p.message for p in problems_of(ValueError("one\ntwo"))] == ["one", "two"]
    assert problems_of(ValueError()) == (Problem("", "ValueError"),)
