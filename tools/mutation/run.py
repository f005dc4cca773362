"""Mutation test: change the source in one place at a time and see whether a test fails.

    PYTHONPATH=tools python -m mutation.run --count 100 --seed 0

A seed draws mutations over the source of packages and apps. Each is applied in a copy of the
tree, where the test files that import the mutated module run until the first failure, nearest
files first. A test that fails counts only if it passes without the mutation.

Results are written to `results.json` and `results.md` after each mutation. The same command
continues an interrupted run. A larger `--files` runs more test files against mutations that
survived; `--limit` stops after that many mutations. The score is a lower bound: test files beyond
the nearest may catch more.

    PYTHONPATH=tools python -m mutation.run --repeat tools/mutation/results.json --output again.json

repeats in the present tree the mutations that an earlier run caught, as far as their source still
exists. The test that caught one runs first.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

from mutation.import_graph import ImportGraph
from mutation.mutations import KINDS, Mutation, find_mutations

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
NOT_COPIED = (".git", ".pants.d", ".venv", ".wheels", "__pycache__", "dist", "runs")
# Exit codes of pytest: all passed, or all tests of the file are deselected.
PASSED = (0, 5)
# A mutation can make a loop endless: limit the memory of its tests too.
MEMORY_BYTES = 12 << 30
OUTCOMES = ("killed", "timeout", "survived", "no test", "unusable")

Drawn = tuple[Path, Mutation]


@dataclass
class Row:
    """The result of one mutation.

    Attributes
    ----------
    module, line, kind, old, new
        The mutation; `module` is relative to the root.
    outcome
        One of `OUTCOMES`. ``unusable``: its tests fail without the mutation too.
    seconds
        Wall time of its tests.
    tests
        Test files that ran.
    killed_by
        The test that failed, or the file that could not be imported.
    """

    module: str
    line: int
    kind: str
    old: str
    new: str
    outcome: str = "no test"
    seconds: float = 0.0
    tests: list[str] = field(default_factory=list)
    killed_by: str = ""


def draw(root: Path, graph: ImportGraph, count: int, seed: int) -> list[Drawn]:
    """Return `count` mutations of a tree, the same for the same tree and seed."""
    found = [
        (file, mutation)
        for file in graph.source_files()
        for mutation in find_mutations(file.read_bytes())
    ]
    found.sort(key=lambda drawn: (drawn[0].relative_to(root), drawn[1]))
    return random.Random(seed).sample(found, min(count, len(found)))  # noqa: S311  no secrets


def find_again(root: Path, row: Row, text: str) -> Drawn | None:
    """Return the mutation of a row in another tree; None if it is gone.

    The module may have moved within its package, and the line within the module: the nearest line
    with the same `text` counts, without indentation, and without one the nearest line.
    """
    module = Path(row.module)
    moved = (root / Path(*module.parts[:3])).rglob(module.name)
    for file in [root / module, *sorted(moved)]:
        if not file.exists():
            continue
        lines = file.read_text().splitlines()
        same = [
            (lines[mutation.line - 1].strip() != text, abs(mutation.line - row.line), mutation)
            for mutation in find_mutations(file.read_bytes())
            if (mutation.kind, mutation.old, mutation.new) == (row.kind, row.old, row.new)
        ]
        if same:
            return file, min(same)[2]
    return None


class Tree:
    """A copy of a tree in which tests run.

    Parameters
    ----------
    root : Path
        The copy.
    seconds : float
        Time limit of one pytest process.
    """

    def __init__(self, root: Path, seconds: float) -> None:
        self.root = root
        self.seconds = seconds
        self._passes: dict[str, bool] = {}
        self._slow: set[str] = set()
        folders = [*root.glob("packages/*/src"), *root.glob("apps/*/src"), root / "tools"]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}

    def pytest(self, *words: str) -> tuple[int | None, str]:
        """Run pytest; return its exit code (None after the time limit) and its output."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", *words]
        with subprocess.Popen(
            command, cwd=self.root, env=self._environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
            try:
                output, _ = process.communicate(timeout=self.seconds)
            except subprocess.TimeoutExpired:
                output = ""
            finally:
                # Children of the tests too.
                _kill_group(process.pid)
            timed_out = process.wait() == -signal.SIGKILL
        return (None if timed_out else process.returncode), output

    def passes(self, test: str) -> bool:
        """Return whether a test passes, or a test file can be imported, in this tree."""
        if test not in self._passes:
            words = [test] if "::" in test else ["--collect-only", test]
            self._passes[test] = self.pytest(*words)[0] in PASSED
        return self._passes[test]

    def is_fast(self, file: str) -> bool:
        """Return whether a test file ends within the time limit in this tree, now."""
        if file not in self._slow and self.pytest(file)[0] not in PASSED:
            self._slow.add(file)
        return file not in self._slow


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def examine(row: Row, file: Path, mutation: Mutation, tests: Sequence[str], tree: Tree) -> None:
    """Run test files against a mutation, one after the other, and write the outcome to its row."""
    original = file.read_bytes()
    mutated = mutation.apply(original)
    ast.parse(mutated)
    start = time.perf_counter()
    for test in tests:
        try:
            _write(file, mutated)
            code, output = tree.pytest(test)
        finally:
            _write(file, original)
        row.tests.append(test)
        if code in PASSED:
            row.outcome = "survived"
        elif code is not None:
            row.killed_by = _first_failure(output) or test
            row.outcome = "killed" if tree.passes(row.killed_by) else "unusable"
            break
        elif tree.is_fast(test):
            row.outcome, row.killed_by = "timeout", test
            break
    row.seconds = round(row.seconds + time.perf_counter() - start, 1)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    # Python compares whole seconds and sizes: bytecode of the other version may look current.
    Path(cache_from_source(str(file))).unlink(missing_ok=True)


def _first_failure(output: str) -> str | None:
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    return found[1] if found else None


def report(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Return the table of all mutations, after a summary by kind, in Markdown."""
    counts = Counter(row.outcome for row in rows)
    draw_flags = f"--count {about['count']} --seed {about['seed']}"
    if "repeat" in about:
        draw_flags = f"--repeat {about['repeat']}"
    lines = [
        "# Mutation test",
        "",
        f"`PYTHONPATH=tools python -m mutation.run {draw_flags} "
        f"--files {about['files']} --seconds {about['seconds']:g}`: {len(rows)} of "
        f"{about['count']} mutations, {score(rows)}. Source: commit {about['revision']}.",
        "",
        "| kind | " + " | ".join(OUTCOMES) + " |",
        "|---|" + "---:|" * len(OUTCOMES),
    ]
    for kind in KINDS:
        row_counts = Counter(row.outcome for row in rows if row.kind == kind)
        lines.append(_cells(kind, *(row_counts[outcome] for outcome in OUTCOMES)))
    lines.append(_cells("all", *(counts[outcome] for outcome in OUTCOMES)))
    lines += [
        "",
        "| module | line | mutation | outcome | s | test |",
        "|---|---:|---|---|---:|---|",
    ]
    for row in sorted(rows, key=lambda row: (OUTCOMES.index(row.outcome), row.module, row.line)):
        old = " ".join(row.old.split())
        change = f"`{old[:50]}` to `{row.new}`" if row.new else f"`{old[:50]}` removed"
        test = row.killed_by.rpartition("/")[2]
        cells = (row.module, row.line, change, row.outcome, row.seconds, test)
        lines.append(_cells(*(str(cell).replace("|", "\\|") for cell in cells)))
    return "\n".join(lines) + "\n"


def score(rows: Sequence[Row]) -> str:
    """Return the share of mutations that a test or the time limit caught, as text."""
    counts = Counter(row.outcome for row in rows)
    caught, usable = counts["killed"] + counts["timeout"], len(rows) - counts["unusable"]
    return f"{caught} of {usable} caught ({caught / max(usable, 1):.0%})"


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def read_rows(path: Path, about: dict[str, Any]) -> list[Row]:
    """Return the rows of an earlier run of the same draw, or none.

    Raises
    ------
    ValueError
        If the file has the results of another count, seed or source.
    """
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    same = ("count", "seed", "source")
    if any(stored["about"][key] != about[key] for key in same):
        raise ValueError(
            f"--output: got {path}, which holds other mutations (count, seed or source differ); "
            "expected those of this command; delete the file or name another"
        )
    return [Row(**row) for row in stored["rows"]]


def run(root: Path, arguments: argparse.Namespace) -> list[Row]:
    """Examine the drawn mutations of a tree and write the results after each.

    Parameters
    ----------
    root : Path
        The tree; it is not changed.
    arguments : argparse.Namespace
        The command line.

    Returns
    -------
    list of Row
        In the order of the draw.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "tree"
        copytree(root, copy, ignore=ignore_patterns(*NOT_COPIED))
        tree, graph = Tree(copy, arguments.seconds), ImportGraph(copy)
        about = {key: getattr(arguments, key) for key in ("count", "seed", "files", "seconds")}
        if arguments.repeat:
            caught = _caught_rows(arguments.repeat, root)
            found = [(row.killed_by, find_again(copy, row, text)) for row, text in caught]
            drawn = [again for _, again in found if again]
            first_tests = [test for test, again in found if again]
            about |= {"count": len(caught), "repeat": arguments.repeat.name}
        else:
            drawn = draw(copy, graph, arguments.count, arguments.seed)
            first_tests = [""] * len(drawn)
        about |= {"source": _digest(copy, drawn), "revision": _revision(root)}
        rows = read_rows(arguments.output, about)
        for index, (file, mutation) in enumerate(drawn[: arguments.limit]):
            module = str(file.relative_to(copy))
            if index == len(rows):
                rows.append(Row(module, mutation.line, mutation.kind, mutation.old, mutation.new))
            row = rows[index]
            nearest = graph.nearest_tests(file, arguments.files)
            tests = [str(test.relative_to(copy)) for test in nearest]
            if first_tests[index] and tree.passes(first_tests[index]):
                tests.insert(0, first_tests[index])
            tests = [test for test in tests if test not in row.tests]
            if row.outcome in ("survived", "no test") and tests:
                examine(row, file, mutation, tests, tree)
            write_results(arguments.output, rows, about)
            print(f"{index + 1}/{len(drawn)} {row.outcome}: {module}:{row.line}", flush=True)
    return rows


def _caught_rows(path: Path, root: Path) -> list[tuple[Row, str]]:
    """Return the caught mutations of an earlier run, each with the text of its line then."""
    stored = json.loads(path.read_text())
    rows = [Row(**row) for row in stored["rows"]]
    found = []
    for row in rows:
        if row.outcome in ("killed", "timeout"):
            lines = _git(root, "show", f"{stored['about']['revision']}:{row.module}").splitlines()
            found.append((row, lines[row.line - 1].strip() if lines else ""))
    return found


def _digest(root: Path, drawn: Sequence[Drawn]) -> str:
    """Return what tells draws apart: a checksum of the drawn mutations."""
    text = repr([(str(file.relative_to(root)), mutation) for file, mutation in drawn])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _revision(root: Path) -> str:
    """Return the first digits of the checked-out commit, or "unknown" outside of git."""
    return _git(root, "rev-parse", "--short=12", "HEAD").strip() or "unknown"


def _git(root: Path, *words: str) -> str:
    """Return the output of a git command, nothing if it fails."""
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def write_results(output: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write the rows as JSON and, beside it, as Markdown."""
    content = {"about": about, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(content, indent=1) + "\n")
    output.with_suffix(".md").write_text(report(rows, about))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--count", type=int, default=100, help="mutations to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="examine the first N of the drawn only")
    parser.add_argument("--repeat", type=Path, help="JSON file of a run whose catches to repeat")
    parser.add_argument("--files", type=int, default=3, help="most test files per mutation")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a test file")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to mutate a copy of")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file of the results")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = parse(words)
    try:
        rows = run(arguments.root.resolve(), arguments)
    except ValueError as error:
        print(f"mutation: {error}", file=sys.stderr)
        return 2
    print(score(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
