"""Releases of single packages: versions, changelogs, bounds between siblings, wheels."""

import datetime
import doctest
import shutil
import tomllib
from pathlib import Path

import pytest
import release
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = release.read_projects(ROOT)
TODAY = datetime.date(2026, 11, 22)


def copy_projects(folder: Path) -> dict[str, release.Project]:
    """Copy what a release edits, and return the projects of the copy."""
    for project in PROJECTS.values():
        copy = folder / project.folder.relative_to(ROOT)
        for file in (project.init, project.folder / "pyproject.toml"):
            target = copy / file.relative_to(project.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        (copy / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A.\n")
    return release.read_projects(folder)


def test_examples() -> None:
    assert doctest.testmod(release).failed == 0
    assert len(PROJECTS) == 11


@pytest.mark.parametrize("project", PROJECTS.values(), ids=lambda project: project.name)
def test_every_project_can_be_released(project: release.Project) -> None:
    assert Version(project.version) >= Version("0.2.0")
    assert (project.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    pyproject = tomllib.loads((project.folder / "pyproject.toml").read_text())
    assert pyproject["project"]["requires-python"] == ">=3.12"  # pip names an older Python by it
    assert "\n## [Unreleased]\n" in (project.folder / "CHANGELOG.md").read_text()
    for sibling in project.siblings():
        assert [bound.operator for bound in sibling.specifier] == ["~="]
        assert sibling.specifier.contains(PROJECTS[sibling.name].version)


def test_a_minor_release_raises_the_bounds_of_all_dependents(tmp_path: Path) -> None:
    projects = copy_projects(tmp_path)
    before = {name: project.version for name, project in projects.items()}
    version = release.bump(projects, "tjx-kernels", "minor")
    assert Version(version) > Version(before["tjx-kernels"])
    assert projects["tjx-kernels"].version == version
    bounds = {
        name: str(sibling.specifier)
        for name, project in projects.items()
        for sibling in project.siblings()
        if sibling.name == "tjx-kernels"
    }
    assert bounds == dict.fromkeys(["tjx-nn", "tjx-trainer"], f"~={version}")
    changelog = (projects["tjx-kernels"].folder / "CHANGELOG.md").read_text()
    assert f"## [Unreleased]\n\n## [{version}] - " in changelog
    unchanged = {name: project.version for name, project in projects.items()}
    assert unchanged == {**before, "tjx-kernels": version}


def test_a_patch_release_changes_no_dependent(tmp_path: Path) -> None:
    projects = copy_projects(tmp_path)
    files = {name: (project.folder / "pyproject.toml") for name, project in projects.items()}
    before = {name: file.read_text() for name, file in files.items()}
    release.bump(projects, "tjx-kernels", "patch")
    assert {name: file.read_text() for name, file in files.items()} == before


@pytest.mark.parametrize(
    "text", ["# Changelog\n", "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-22\n\n- A.\n"]
)
def test_a_release_without_an_entry_in_the_changelog_is_an_error(text: str) -> None:
    with pytest.raises(release.ReleaseError, match="Unreleased"):
        release.release_changelog(text, "0.3.0", TODAY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tjx-kernels", "tjx-nn"])
def test_the_wheels_pass_their_tests_outside_the_repository(name: str) -> None:
    release.check_release(PROJECTS, name, [])
