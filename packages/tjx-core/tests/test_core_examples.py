"""The examples in docstrings and README run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "module", ["command_line", "deprecation", "files", "problems", "suggestions", "text"]
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_core.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[1] / "README.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(readme), "exec"), {})  # noqa: S102  # our own README
    assert (tmp_path / "config.txt").read_text() == "optimizer: adamw\n"
