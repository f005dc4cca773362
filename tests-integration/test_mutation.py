"""Mutation test runner: mutations, the tests that it chooses, and its results."""

import ast
import doctest
import json
from pathlib import Path

import pytest
from mutation import mutations, run
from mutation.import_graph import ImportGraph
from mutation.mutations import KINDS, find_mutations

ROOT = Path(__file__).resolve().parents[1]
EVERY_KIND = b'''
"""Docstring with 1 + 1."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 3

def check(count: int | None, \xc3\xa9: float = 0.5) -> list[int]:
    if not count and \xc3\xa9 < 2:
        raise ValueError(f"got {count + 1}")
    return [count * 2]
'''
SIZE = "def is_large(n):\n    return n > 10\n\n\ndef half(n):\n    return n / 2\n"
TEST = "from tjx_a.size import half, is_large\n\n\ndef test_half():\n    assert half(6) == 3\n"


def texts(source: bytes) -> set[tuple[str, str, str]]:
    return {(found.kind, found.old, found.new) for found in find_mutations(source)}


def test_every_kind_is_found_outside_annotations_messages_and_docstrings() -> None:
    assert texts(EVERY_KIND) == {
        ("not", "not", ""),
        ("boolean", "and", "or"),
        ("comparison", "<", "<="),
        ("arithmetic", "*", "/"),
        ("constant", "0.5", "1.0"),
        ("constant", "2", "3"),
        ("removal", 'raise ValueError(f"got {count + 1}")', "pass"),
        ("return", "[count * 2]", "None"),
    }
    assert {kind for kind, _, _ in texts(EVERY_KIND)} == set(KINDS)


def test_operators_are_replaced_where_they_stand() -> None:
    assert texts(b"a is  not b") == {("comparison", "is  not", "is")}
    assert texts(b"(a) not in (b)") == {("comparison", "not in", "in")}
    assert texts(b"'%s' % a") == set()
    source = b"x = (a and\n     b and c)"
    assert [found.apply(source) for found in find_mutations(source)] == [
        b"x = (a or\n     b and c)",
        b"x = (a and\n     b or c)",
    ]
    assert doctest.testmod(mutations).failed == 0


def test_mutations_of_a_module_parse() -> None:
    source = (ROOT / "tools" / "release.py").read_bytes()
    found = find_mutations(source)
    assert len(found) > 50
    for mutation in found:
        ast.parse(mutation.apply(source))


@pytest.fixture(autouse=True)
def _plain_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start pytest without plugins, which import JAX."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def write_tree(root: Path) -> None:
    files = {
        "packages/tjx-a/src/tjx_a/__init__.py": "",
        "packages/tjx-a/src/tjx_a/__init__.pyi": "from .size import half as half\n",
        "packages/tjx-a/src/tjx_a/size.py": SIZE,
        "packages/tjx-a/src/tjx_a/user.py": "from .size import half\n",
        "packages/tjx-a/src/tjx_a/unused.py": "STEPS = 3\n",
        "packages/tjx-a/tests/test_size.py": TEST,
        "packages/tjx-a/tests/test_public.py": "from tjx_a import half\nimport tjx_a.user\n",
        "packages/tjx-a/tests/test_other.py": "import tjx_a.user\n",
        "packages/tjx-a/tests/test_named_size.py": "import tjx_a.user\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_nearest_tests_are_named_after_the_module_or_import_it_directly(tmp_path: Path) -> None:
    write_tree(tmp_path)
    graph = ImportGraph(tmp_path)
    source = tmp_path / "packages/tjx-a/src/tjx_a"

    def nearest(module: str, limit: int = 9) -> list[str]:
        return [file.stem for file in graph.nearest_tests(source / module, limit)]

    assert nearest("size.py") == ["test_size", "test_named_size", "test_public", "test_other"]
    assert nearest("size.py", 1) == ["test_size"]
    assert nearest("user.py") == ["test_named_size", "test_other", "test_public"]
    assert nearest("unused.py") == []


def test_a_run_tells_caught_from_uncaught_mutations_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "tree", tmp_path / "results.json"
    write_tree(root)
    command = ["--root", str(root), "--output", str(output), "--files", "1", "--count"]
    assert run.main([*command, "9", "--limit", "2"]) == 0
    assert len(json.loads(output.read_text())["rows"]) == 2
    assert run.main([*command, "9"]) == 0
    rows = json.loads(output.read_text())["rows"]
    found = {(row["old"], row["new"]): row["outcome"] for row in rows}
    assert found[("/", "*")] == "killed"
    assert found[("n / 2", "None")] == "killed"
    assert found[(">", ">=")] == "survived"
    assert found[("3", "4")] == "no test"
    assert "| packages/tjx-a/src/tjx_a/size.py | 6 | `/` to `*` | killed |" in (
        output.with_suffix(".md").read_text()
    )
    assert (root / "packages/tjx-a/src/tjx_a/size.py").read_text() == SIZE
    monkeypatch.setattr(run.Tree, "pytest", lambda *_: pytest.fail("ran a mutation again"))
    assert run.main([*command, "9"]) == 0
    assert "holds other mutations" not in capsys.readouterr().err
    assert run.main([*command, "3"]) == 2
    assert "holds other mutations" in capsys.readouterr().err


def test_caught_mutations_are_repeated_in_a_changed_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, before, after = tmp_path / "tree", tmp_path / "before.json", tmp_path / "after.json"
    write_tree(root)
    size = "packages/tjx-a/src/tjx_a/size.py"
    test = "packages/tjx-a/tests/test_size.py::test_half"
    rows = [
        run.Row(size, 6, "arithmetic", "/", "*", "killed", killed_by=test),
        run.Row(size, 6, "constant", "7", "8", "killed", killed_by=test),
        run.Row(size, 2, "comparison", ">", ">=", "survived"),
    ]
    about = {"count": 3, "seed": 0, "files": 1, "seconds": 60.0, "revision": "unknown"}
    run.write_results(before, rows, about)
    # The source has moved, and a later test file of the same module tests nothing.
    (root / "packages/tjx-a/src/tjx_a/parts").mkdir()
    (root / size).rename(root / "packages/tjx-a/src/tjx_a/parts/size.py")
    (root / size).write_text("# Moved.\nfrom tjx_a.parts.size import *\n")
    (root / "packages/tjx-a/tests/test_a_size.py").write_text("import tjx_a.parts.size\n")
    command = ["--root", str(root), "--repeat", str(before), "--output", str(after), "--files", "1"]
    assert run.main(command) == 0
    [row] = json.loads(after.read_text())["rows"]
    assert (row["module"], row["outcome"]) == ("packages/tjx-a/src/tjx_a/parts/size.py", "killed")
    assert row["tests"] == [test]
    assert "1 of 2 mutations, 1 of 1 caught" in after.with_suffix(".md").read_text()
    (root / test.partition("::")[0]).write_text("")
    after.unlink()
    assert run.main(command) == 0
    assert "0 of 1 caught" in capsys.readouterr().out


def test_slow_and_broken_tests_do_not_count(tmp_path: Path) -> None:
    write_tree(tmp_path)
    test = tmp_path / "packages/tjx-a/tests/test_size.py"
    graph = ImportGraph(tmp_path)
    file, mutation = run.draw(tmp_path, graph, 1, 0)[0]

    def outcome(text: str, seconds: float) -> str:
        test.write_text(text)
        row = run.Row("size.py", 1, mutation.kind, mutation.old, mutation.new)
        name = str(test.relative_to(tmp_path))
        run.examine(row, file, mutation, [name], run.Tree(tmp_path, seconds))
        return row.outcome

    assert outcome("def test_broken():\n    assert False\n", 60.0) == "unusable"
    assert outcome("import time\ntime.sleep(60)\n", 0.2) == "no test"
