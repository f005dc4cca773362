"""Release one package: version, changelog, bounds of its dependents, sdist, wheel and their tests.

    ./pants run tools/release.py -- tjx-kernels minor
    ./pants run tools/release.py -- tjx-kernels --rehearse

The first command edits the working tree, builds and tests, and prints the git commands that publish
the release; it uploads nothing. `--rehearse` builds and tests the version in the working tree and
edits nothing. The tests run outside the repository, in an empty environment with the wheel and its
siblings: once with the newest allowed versions, once with the oldest that were tagged.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from shutil import copy2, copytree

import api_diff
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("major", "minor", "patch")
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_UNRELEASED = re.compile(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class ReleaseError(Exception):
    """A release that must not be published, with the reason."""


@dataclass(frozen=True)
class Project:
    """A package or app of the repository.

    Attributes
    ----------
    name
        Distribution name, such as ``tjx-nn``.
    folder
        Its folder, which holds pyproject.toml, src and tests.
    """

    name: str
    folder: Path

    @property
    def init(self) -> Path:
        """The module that holds ``__version__``."""
        return self.folder / "src" / self.name.replace("-", "_") / "__init__.py"

    @property
    def version(self) -> str:
        """The version in the working tree."""
        found = _VERSION.search(self.init.read_text())
        if found is None:
            raise ReleaseError(f'{self.init}: expected a line __version__ = "X.Y.Z"')
        return found[1]

    def siblings(self) -> list[Requirement]:
        """Return the requirements on other packages of the repository, extras included."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        lines = project["dependencies"]
        lines += [
            line for extra in project.get("optional-dependencies", {}).values() for line in extra
        ]
        return [Requirement(line) for line in lines if line.startswith("tjx-")]


def read_projects(root: Path) -> dict[str, Project]:
    """Return all packages and apps of a checkout by distribution name."""
    files = [*root.glob("packages/*/pyproject.toml"), *root.glob("apps/*/pyproject.toml")]
    found = {}
    for file in sorted(files):
        name = tomllib.loads(file.read_text())["project"]["name"]
        found[name] = Project(name, file.parent)
    return found


def next_version(version: str, level: str) -> str:
    """Return the version after a release of the given level.

    >>> next_version("0.2.3", "minor"), next_version("0.2.3", "patch")
    ('0.3.0', '0.2.4')
    """
    parts = list(Version(version).release)
    index = LEVELS.index(level)
    return ".".join(map(str, [*parts[:index], parts[index] + 1, *[0] * (2 - index)]))


def release_changelog(text: str, version: str, date: datetime.date) -> str:
    """Turn the section of unreleased changes into the section of a version.

    Raises
    ------
    ReleaseError
        If there is no such section, or nothing in it.
    """
    section = _UNRELEASED.search(text)
    if section is None or not re.search(r"^- ", section[1], re.MULTILINE):
        raise ReleaseError(
            "CHANGELOG.md: got no entry under '## [Unreleased]'; expected at least one; "
            "describe what users of the package have to know"
        )
    heading = f"## [Unreleased]\n\n## [{version}] - {date.isoformat()}\n"
    return text[: section.start()] + heading + section[1] + text[section.end() :]


def raise_bounds(projects: dict[str, Project], name: str, version: str) -> list[Project]:
    """Make every dependent of a package accept its new version; return the changed ones.

    A bound such as ``~=0.2.0`` excludes 0.3.0: dependents of that version need a release too.
    """
    changed = []
    for project in projects.values():
        outdated = [
            str(requirement.specifier)
            for requirement in project.siblings()
            if requirement.name == name and not requirement.specifier.contains(version)
        ]
        if outdated:
            file = project.folder / "pyproject.toml"
            pattern = rf'"({name}(?:\[[^\]]*\])?){re.escape(outdated[0])}"'
            file.write_text(re.sub(pattern, rf'"\1~={version}"', file.read_text()))
            changed.append(project)
    return changed


def bump(projects: dict[str, Project], name: str, level: str) -> str:
    """Write the new version, the changelog and the bounds of dependents; return the version."""
    project = projects[name]
    version = next_version(project.version, level)
    changelog = project.folder / "CHANGELOG.md"
    today = datetime.datetime.now(datetime.UTC).date()
    released = release_changelog(changelog.read_text(), version, today)
    project.init.write_text(_VERSION.sub(f'__version__ = "{version}"', project.init.read_text()))
    changelog.write_text(released)
    for dependent in raise_bounds(projects, name, version):
        print(f"{dependent.name}: accepts {name} {version} now; release it too")
    return version


def uv(*words: str | Path) -> None:
    """Run uv; its output is shown.

    Raises
    ------
    ReleaseError
        If it fails.
    """
    from uv import find_uv_bin

    command = [find_uv_bin(), *map(str, words)]
    if subprocess.run(command, check=False).returncode:
        raise ReleaseError(f"failed: {' '.join(command)}")


def build(project: Project, folder: Path, *, sdist: bool = False) -> Path:
    """Build the wheel of a project, and its sdist, into a folder; return the wheel."""
    constraints = ROOT / "tools" / "locks" / "build.txt"
    kinds = ["--wheel", "--sdist"] if sdist else ["--wheel"]
    uv(
        "build", "-q", *kinds, project.folder, "--out-dir", folder, "--python", sys.executable,
        "--build-constraint", constraints,
    )  # fmt: skip
    return folder / f"{project.name.replace('-', '_')}-{project.version}-py3-none-any.whl"


def wheel_problems(wheel: Path) -> list[str]:
    """Return what a wheel lacks: license, readme, type marker, classifiers, bounds of siblings."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(metadata_file))
    problems = []
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        problems.append("no LICENSE; list it under license-files")
    if not any(name.endswith("/py.typed") for name in names):
        problems.append("no py.typed; add the empty file beside __init__.py")
    if metadata["License-Expression"] != "Apache-2.0":
        problems.append(f"license: got {metadata['License-Expression']}; expected Apache-2.0")
    if metadata["Description-Content-Type"] != "text/markdown" or not metadata.get_payload():
        problems.append("no README; set readme in pyproject.toml")
    if "Typing :: Typed" not in metadata.get_all("Classifier", []):
        problems.append("no classifier 'Typing :: Typed'")
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        operators = [specifier.operator for specifier in requirement.specifier]
        if requirement.name.startswith("tjx-") and operators != ["~="]:
            problems.append(f"{line}: expected a compatible-release bound, such as ~=0.2.0")
    return problems


def oldest_allowed(requirement: Requirement, tags: Sequence[str]) -> str | None:
    """Return the tag of the oldest release that a bound allows; None if none was tagged.

    >>> tags = ["tjx-nn-v0.2.0", "tjx-nn-v0.2.3", "tjx-nn-v0.2.1"]
    >>> oldest_allowed(Requirement("tjx-nn~=0.2.1"), tags)
    'tjx-nn-v0.2.1'
    """
    prefix = f"{requirement.name}-v"
    versions = [Version(tag.removeprefix(prefix)) for tag in tags if tag.startswith(prefix)]
    allowed = sorted(version for version in versions if requirement.specifier.contains(version))
    return f"{prefix}{allowed[0]}" if allowed else None


def git(*words: str) -> str:
    """Run git in the repository and return what it prints."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    ).stdout


def required_siblings(projects: dict[str, Project], name: str) -> dict[str, Requirement]:
    """Return the bounds on all siblings that a package needs, directly or through others."""
    found: dict[str, Requirement] = {}
    for requirement in projects[name].siblings():
        found[requirement.name] = requirement
        for indirect, bound in required_siblings(projects, requirement.name).items():
            found.setdefault(indirect, bound)
    return found


def build_oldest(projects: dict[str, Project], name: str, folder: Path) -> bool:
    """Build the oldest allowed siblings from their tags; return whether any is not the newest."""
    tags = git("tag", "--list").split()
    older = False
    for sibling, bound in required_siblings(projects, name).items():
        tag = oldest_allowed(bound, tags)
        if tag is None or tag == f"{sibling}-v{projects[sibling].version}":
            build(projects[sibling], folder)
            continue
        older = True
        with tempfile.TemporaryDirectory() as checkout:
            git("worktree", "add", "--detach", checkout, tag)
            try:
                build(read_projects(Path(checkout))[sibling], folder)
            finally:
                git("worktree", "remove", "--force", checkout)
    return older


def test_wheel(project: Project, wheels: Path, words: Sequence[str]) -> None:
    """Run a package's tests against wheels, in an empty environment and outside the repository.

    Raises
    ------
    ReleaseError
        If an installation or a test fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outside = Path(scratch)
        for file in ("conftest.py", "pyproject.toml"):
            copy2(ROOT / file, outside / file)
        here = outside / project.folder.relative_to(ROOT)
        copytree(project.folder / "tests", here / "tests")
        for page in (*project.folder.glob("*.md"), project.folder / "pyproject.toml"):
            copy2(page, here)
        python = outside / "environment" / "bin" / "python"
        locks = ROOT / "tools" / "locks"
        uv("venv", "-q", "--python", sys.executable, python.parents[1])
        uv(
            "pip", "install", "-q", "--python", python, "--find-links", wheels,
            "--constraints", locks / "cpu.txt", f"{project.name}=={project.version}",
            "-r", locks / "requirements.txt", "-r", locks / "pytest.in",
        )  # fmt: skip
        tests = here.relative_to(outside) / "tests"
        command = [str(python), "-m", "pytest", "-q", *words, str(tests)]
        if subprocess.run(command, cwd=outside, check=False).returncode:
            raise ReleaseError(f"tests of {project.name} {project.version} failed with its wheel")


def check_api(project: Project) -> None:
    """Compare the public names of a package with those of its last release.

    Versions follow Semantic Versioning: a breaking change needs a major release, and before 1.0 a
    minor one.

    Raises
    ------
    ReleaseError
        If the version promises compatibility that the package does not keep, or a deprecated name
        is past its last version.
    """
    if project.folder.parent.name != "packages":
        return  # apps have commands and flags, no public names
    if late := api_diff.overdue(project.init, project.version):
        raise ReleaseError("; ".join(late))
    tag = api_diff.last_tag(git("tag", "--list").split(), project.name, before=project.version)
    if tag is None:
        print(f"== {project.name}: no earlier tag to compare the public names with")
        return
    changes = api_diff.changes_since(ROOT, tag, project.folder) or []
    print(f"== {project.name}: {len(changes)} breaking changes of public names since {tag}")
    print("\n".join(changes))
    if changes and not allows_breaking(tag.removeprefix(f"{project.name}-v"), project.version):
        raise ReleaseError(
            f"{project.name} {project.version}: breaks public names of {tag}; release a "
            "higher level, or keep the old names with tjx_core.deprecated_names"
        )


def allows_breaking(old: str, new: str) -> bool:
    """Return whether a version may break users of an older one.

    >>> allows_breaking("0.2.0", "0.3.0"), allows_breaking("0.2.0", "0.2.1")
    (True, False)
    >>> allows_breaking("1.2.0", "1.3.0"), allows_breaking("1.2.0", "2.0.0")
    (False, True)
    """
    before, after = Version(old), Version(new)
    return after.major > before.major or (before.major == 0 and after.minor > before.minor)


def check_release(projects: dict[str, Project], name: str, words: Sequence[str]) -> None:
    """Compare public names, build and check the wheel, test with newest and oldest siblings.

    Parameters
    ----------
    projects
        All projects of the repository.
    name
        The package.
    words
        More arguments of pytest.

    Raises
    ------
    ReleaseError
        With the first thing that is wrong.
    """
    project, out = projects[name], ROOT / "dist" / name
    check_api(project)
    wheel = build(project, out, sdist=True)
    if problems := wheel_problems(wheel):
        raise ReleaseError(f"{wheel.name}: " + "; ".join(problems))
    with tempfile.TemporaryDirectory() as newest, tempfile.TemporaryDirectory() as oldest:
        for folder in map(Path, (newest, oldest)):
            copy2(wheel, folder)
        for sibling in required_siblings(projects, name):
            build(projects[sibling], Path(newest))
        print(f"== {name} {project.version}: tests with the newest siblings", flush=True)
        test_wheel(project, Path(newest), words)
        if build_oldest(projects, name, Path(oldest)):
            print(f"== {name} {project.version}: tests with the oldest siblings", flush=True)
            test_wheel(project, Path(oldest), words)
        else:
            print("== no older release of a sibling is tagged that the bounds allow")


def main(words: Sequence[str] | None = None) -> int:
    """Release a package; return the exit code."""
    projects = read_projects(ROOT)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("package", choices=sorted(projects))
    parser.add_argument("level", nargs="?", choices=LEVELS, help="part of the version to raise")
    parser.add_argument("--rehearse", action="store_true", help="build and test; edit nothing")
    parser.add_argument("--pytest_args", default="", help="more arguments of pytest")
    arguments = parser.parse_args(words)
    if (arguments.level is None) != arguments.rehearse:
        parser.error("give either a level or --rehearse")
    try:
        if not arguments.rehearse:
            if git("status", "--porcelain").strip():
                raise ReleaseError("the working tree has changes; commit them first")
            bump(projects, arguments.package, arguments.level)
        check_release(projects, arguments.package, arguments.pytest_args.split())
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    tag = f"{arguments.package}-v{projects[arguments.package].version}"
    if arguments.rehearse:
        print(f"rehearsed {tag}; nothing was changed")
    else:
        print(
            f"publish with:\n  git commit -am 'release: {tag}'\n  git tag {tag}\n  git push --tags"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
