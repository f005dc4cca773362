"""Fixtures of the fault tests: an undisturbed reference run, and copies and variations of it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns.fork_server import ForkServer
from campaigns.outcome import Outcome, outcome
from campaigns.tiny_run import TINY, TRAINER_MODULES, TinyRun, clean_environment, write_text


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRun]:
    """A completed run of 60 steps with a checkpoint every 10; runs derived from it are forked.

    It starts a new interpreter, so that its string hashes differ from those of forked runs.
    """
    text = tmp_path_factory.mktemp("text") / "rhyme.txt"
    write_text(text, lines=400)
    run = TinyRun(
        folder=tmp_path_factory.mktemp("undisturbed"),
        environment=clean_environment(tmp_path_factory.mktemp("home")),
        flags={**TINY, "data.path": str(text)},
    )
    run.finish()
    server = ForkServer(run.environment, TRAINER_MODULES)
    yield replace(run, server=server)
    server.stop()


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
def copy_of_finished(
    undisturbed: TinyRun, new_run: Callable[..., TinyRun]
) -> Callable[..., TinyRun]:
    """Return a function that copies the finished run, so that the copy can be damaged."""

    def copy(name: str = "damaged") -> TinyRun:
        run = new_run(name)
        shutil.copytree(undisturbed.run_dir, run.run_dir)
        return run

    return copy
