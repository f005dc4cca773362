"""Fixtures of the fault tests: undisturbed reference runs, and copies and variations of them.

Faults of storage, signals, data and exit codes disturb a run with NumPy computations
(`campaigns.numpy_trainer`); the fixtures whose names contain ``compiled`` are real runs.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns.fork_server import ForkServer
from campaigns.outcome import Outcome, outcome
from campaigns.tiny_run import (
    NUMPY_TRAINER,
    TINY,
    TRAINER_MODULES,
    TinyRun,
    clean_environment,
    write_text,
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRun]:
    """A run of 60 steps with a checkpoint every 10, not started; its processes are forked."""
    text = tmp_path_factory.mktemp("text") / "rhyme.txt"
    write_text(text, lines=400)
    environment = clean_environment(tmp_path_factory.mktemp("home"))
    server = ForkServer(environment, TRAINER_MODULES)
    yield TinyRun(
        folder=tmp_path_factory.mktemp("compiled"),
        environment=environment,
        flags={**TINY, "data.path": str(text)},
        server=server,
    )
    server.stop()


@pytest.fixture(scope="session")
def expected_compiled(compiled: TinyRun) -> Outcome:
    """Outcome of the undisturbed real run."""
    compiled.finish()
    return outcome(compiled.run_dir)


@pytest.fixture(scope="session")
def undisturbed(compiled: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The same run with NumPy computations, completed.

    It starts a new interpreter, so that its string hashes differ from those of forked runs.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    run = replace(compiled, folder=folder, module=(NUMPY_TRAINER,))
    replace(run, server=None).finish()
    return run


@pytest.fixture(scope="session")
def expected(undisturbed: TinyRun) -> Outcome:
    """Outcome of the undisturbed run."""
    return outcome(undisturbed.run_dir)


@pytest.fixture
def new_run(undisturbed: TinyRun, tmp_path: Path) -> Callable[..., TinyRun]:
    """Return a function that creates the same run in a new folder, optionally with other flags."""

    def begin(name: str = "disturbed", **flags: Any) -> TinyRun:
        return undisturbed.elsewhere(tmp_path / name, **flags)

    return begin


@pytest.fixture
def new_compiled_run(compiled: TinyRun, tmp_path: Path) -> Callable[..., TinyRun]:
    """Return a function that creates the real run in a new folder, optionally with other flags."""

    def begin(name: str = "disturbed", **flags: Any) -> TinyRun:
        return compiled.elsewhere(tmp_path / name, **flags)

    return begin


@pytest.fixture
def copy_of_finished(
    undisturbed: TinyRun, new_run: Callable[..., TinyRun]
) -> Callable[..., TinyRun]:
    """Return a function that copies the finished run, so that the copy can be damaged."""

    def copy(name: str = "damaged") -> TinyRun:
        run = new_run(name)
        shutil.copytree(undisturbed.run_dir, run.run_dir)
        return run

    return copy
