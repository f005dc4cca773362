"""Every command in README and guides is accepted by its program; measured figures are right."""

import contextlib
import io
from pathlib import Path

import pytest
from guide_commands import PAGES, ROOT, Command, Figure, check, commands, figures

COMMANDS = [command for page in PAGES for command in commands(page)]
FIGURES = [figure for page in PAGES for figure in figures(page)]
# Commands of guides that show an error message.
WRONG = {"./pants run apps/eval -- loss quikstart --window 0 --staide 3"}


def problem(command: Command) -> str | None:
    """Return why a program does not accept a command, or None."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(printed):
        try:
            check(command.words)
        except (Exception, SystemExit) as error:  # a program raises or exits
            if isinstance(error, SystemExit) and not error.code:
                return None  # after --help
            return f"{command}\n    {error!r} {printed.getvalue()}"
    return None


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_programs_accept_every_command() -> None:
    pages = {command.page.name for command in COMMANDS}
    assert {"README.md", "quickstart.md", "fine_tuning.md", "positions.md"} <= pages
    assert len(COMMANDS) > 120
    found = {command.text for command in COMMANDS if problem(command)}
    rejected = [problem(command) for command in COMMANDS if command.text in found - WRONG]
    assert not rejected, "\n".join(map(str, rejected))
    assert found == WRONG


@pytest.mark.parametrize(
    "text",
    [
        "./pants run apps/trainer -- --config quickstart --model.n_layers 2",
        "./pants run apps/trainer -- --config quikstart",
        "./pants run apps/trainer -- sweep --optimizer.learning_rate 1e-3,x",
        "./pants run apps/trainer -- plan --chip h100 --mesh.sdp 8",
        "./pants run tools/campaigns/kills.py -- --kils 3",
        "./pants --pants-config-files=pants.rocm.toml run apps/trainer",
        "tjx-metrics plot runs/a --log_z",
        "tjx-optim schedule --name cosines --max_steps 9",
        "pip install 'tjx-nn[hugs]'",
        "python examples/none.py",
        "tjx-unknown",
    ],
)
def test_wrong_commands_are_found(text: str) -> None:
    assert problem(Command(ROOT / "README.md", text))


def test_measured_figures_equal_the_results() -> None:
    assert {figure.page.name for figure in FIGURES} >= {"README.md", "checkpoint_resume.md"}
    absent = [f"{figure.page.name}: {figure.text}" for figure in FIGURES if not figure.is_shown]
    assert absent == [], "listed but not on the page"
    wrong = [f"{f.page.name}: {f.text}, not {f.value}" for f in FIGURES if not f.is_right]
    assert wrong == []


def test_figures_are_rounded_to_their_digits() -> None:
    page = ROOT / "README.md"
    assert Figure(page, "8,225 MiB", 8224.5).is_right
    assert Figure(page, "1.46 s", 1.4648).is_right
    assert not Figure(page, "1.47 s", 1.4648).is_right
    assert not Figure(page, "12.3456 s of nothing", 12.3456).is_shown
