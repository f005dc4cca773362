"""The batch path: source files that one train step of a dense GPT executes on one device.

The path begins when a batch is requested and ends when the parameters are updated; it includes the
tracing of the jitted step. A file is on the path if the body of one of its functions runs.
"""

import ast
import inspect
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from one_device import only_one_device
from small_text import flags_of_sheep

import tjx_data
from tjx_data.loading import shard_reader
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import build_job

# The path may become shorter, not longer: lower these numbers when it does.
MAX_FILES = 29
MAX_LINES = 6480
MAX_EXECUTED_LINES = 2004  # of the functions that run, without docstrings and blank lines

ARCHITECTURE = Path(__file__).resolve().parents[3] / "docs" / "architecture.md"

# Sizes that no other test has, so that JAX has not traced these functions before.
FLAGS = """
--model.n_layer=3 --model.n_head=2 --model.d_model=20 --model.max_seq_len=13 --data.seq_len=13
--data.tokenizer=char --data.holdout=tail --train.max_steps=2 --train.batch_size=3
--train.sample_tokens=0 --mesh.data=1
""".split()  # noqa: SIM905  a list of words reads worse


# First lines and names of the functions of a file that run.
Functions = dict[int, str]


@contextmanager
def executed_functions(files: dict[Path, Functions]) -> Iterator[None]:
    """Add the functions of tjx that run in this thread and in threads it starts, by file."""
    seen: dict[int, CodeType] = {}  # by identity: hashing code is slow

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or id(code) in seen:
            return
        seen[id(code)] = code
        # Code of modules and classes, which imports run, is not optimized.
        is_function = code.co_flags & inspect.CO_OPTIMIZED and "<generic" not in code.co_name
        if is_function and "/tjx_" in code.co_filename and "/src/" in code.co_filename:
            functions = files.setdefault(Path(code.co_filename), {})
            functions[code.co_firstlineno] = code.co_name

    before = sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Functions]:
    """Files of the path, in order of their first execution, with their functions that run."""
    files: dict[Path, Functions] = {}
    with only_one_device(), pytest.MonkeyPatch.context() as patch:
        # On a busy machine the path would include the check of the shards that is made each second.
        patch.setattr(shard_reader, "_CHECK_INTERVAL", math.inf)
        config = resolve([*FLAGS, *flags_of_sheep(tmp_path_factory.mktemp("data"))])
        job = build_job(*open_task(config))
        state = job.initial_state()
        with (
            executed_functions(files),
            tjx_data.Prefetcher(
                lambda step: job.put(job.task.train_data.batch(step)), first=0
            ) as batches,
        ):
            job.train_step(state, batches.get(0))
    # Runs of earlier tests leave a listener to JAX's compilations registered in the process.
    return {file: names for file, names in files.items() if file.name != "compilation.py"}


def name_of(file: Path) -> str:
    return "/".join(file.parts[file.parts.index("src") + 1 :])


def executed_lines(source: str, functions: Functions) -> int:
    """Count the lines of functions that run, without docstrings and blank lines."""
    lines, counted = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        if first in functions:
            counted |= set(range(first, node.end_lineno + 1))
            if ast.get_docstring(node) is not None:
                counted -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(bool(lines[number - 1].strip()) for number in counted)


def test_the_batch_path_is_short(path: dict[Path, Functions]) -> None:
    sources = {file: file.read_text(encoding="utf-8") for file in path}
    lines = {name_of(file): len(source.splitlines()) for file, source in sources.items()}
    executed = {
        name_of(file): executed_lines(source, path[file]) for file, source in sources.items()
    }
    listing = "\n".join(f"{count:5} {executed[name]:5} {name}" for name, count in lines.items())
    total = (
        f"{len(lines)} files, {sum(lines.values())} lines, "
        f"{sum(executed.values())} of them in functions that run:\n{listing}"
    )
    assert len(lines) <= MAX_FILES, total
    assert sum(lines.values()) <= MAX_LINES, total
    assert sum(executed.values()) <= MAX_EXECUTED_LINES, total
    assert max(lines.values()) <= 400, total


def test_the_architecture_guide_lists_the_batch_path_in_order(path: dict[Path, Functions]) -> None:
    section = ARCHITECTURE.read_text(encoding="utf-8").split("## Batch path")[1].split("\n## ")[0]
    rows = re.findall(r"\[`(tjx_\w+/[\w/]+\.py)`\]\([^)]*\) \| (.*) \|", section)
    assert [name for name, _ in rows] == [name_of(file) for file in path]
    for (name, column), functions in zip(rows, path.values(), strict=True):
        named = set(re.findall(r"`(?:\w+\.)?(\w+)`", column))
        assert named, name
        assert named <= set(functions.values()), f"{name}: these functions do not run"
