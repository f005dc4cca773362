"""Resolve or check the lock files of the repository.

`python tools/lock.py` resolves the locks whose input changed; `--upgrade` resolves all to the
newest versions; `--check` lists locks that are older than their input and changes nothing.

The input of the main lock is the union of the dependencies (with extras) in the pyproject.toml of
packages and apps, and those of tests (tools/locks/test.in). The same requirements with JAX's CUDA
13 or TPU extra give the locks for accelerators. Locks hold hashes and name no index, so that any
mirror works. `uv` resolves them.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "tools" / "locks"
REQUIREMENTS = LOCKS / "requirements.txt"
PYTHON = "3.12"
DIGEST_PREFIX = "# input sha256: "

# Lock file -> additional requirements.
ACCELERATORS = {"cpu": (), "cuda13": ("jax[cuda13]",), "tpu": ("jax[tpu]",)}
# Tools have separate environments.
TOOLS = ("pytest", "mypy", "ruff", "build", "compile", "docs", "s3", "pip")
# Lock file -> locks that constrain its versions, if not the main lock only.
CONSTRAINTS: dict[str, tuple[str, ...]] = {"compile": ("cpu", "cuda13", "tpu"), "pip": ()}


def read_requirements(path: Path) -> list[str]:
    """Return the requirement lines of a file, without comments and blank lines."""
    lines = (line.split("#", 1)[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def declared_dependencies(root: Path) -> list[str]:
    """Return every third-party requirement that a package or app declares, extras included."""
    found: list[str] = []
    for file in sorted(root.glob("packages/*/pyproject.toml")) + sorted(
        root.glob("apps/*/pyproject.toml")
    ):
        project = tomllib.loads(file.read_text())["project"]
        found += project.get("dependencies", [])
        for extra in project.get("optional-dependencies", {}).values():
            found += extra
    return [requirement for requirement in found if not requirement.startswith("tjx-")]


def merge(requirements: list[str]) -> list[str]:
    """Join requirements of the same distribution into one line each, sorted by name.

    >>> merge(["jax>=0.11", "numpy", "jax>=0.11,<1"])
    ['jax<1,>=0.11', 'numpy']
    """
    specifiers: dict[str, set[str]] = {}
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+(?:\[[^\]]+\])?)\s*([^;]*)", requirement)
        if match is None:
            raise ValueError(
                f"requirement {requirement!r} is not of the form NAME[EXTRA]VERSIONS; environment "
                "markers are not used in this repository"
            )
        name = match.group(1).lower().replace("_", "-")
        versions = {part.strip() for part in match.group(2).split(",")} - {""}
        specifiers.setdefault(name, set()).update(versions)
    return [name + ",".join(sorted(versions)) for name, versions in sorted(specifiers.items())]


def repository_requirements() -> list[str]:
    """Return the input of the main lock."""
    return merge(declared_dependencies(ROOT) + read_requirements(LOCKS / "test.in"))


def lock_inputs() -> dict[str, list[str]]:
    """Return lock name -> its input lines."""
    main = repository_requirements()
    inputs = {name: [*main, *extra] for name, extra in ACCELERATORS.items()}
    inputs.update({tool: read_requirements(LOCKS / f"{tool}.in") for tool in TOOLS})
    return inputs


def digest(lines: list[str]) -> str:
    """Return the SHA-256 of a lock's input."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stale_locks() -> list[str]:
    """Return one line for each generated file that is older than its input."""
    problems = []
    header = f"{DIGEST_PREFIX}{digest(repository_requirements())}"
    if not REQUIREMENTS.is_file() or header not in REQUIREMENTS.read_text().splitlines():
        problems.append("tools/locks/requirements.txt is older than the packages' pyproject.toml")
    for name, lines in lock_inputs().items():
        path = LOCKS / f"{name}.txt"
        header = f"{DIGEST_PREFIX}{digest(lines)}"
        if not path.is_file() or header not in path.read_text().splitlines()[:5]:
            problems.append(f"tools/locks/{name}.txt is older than its input")
    return problems


def find_uv() -> list[str]:
    """Return the command that starts uv."""
    if found := shutil.which("uv"):
        return [found]
    if subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True).returncode:
        sys.exit("lock.py needs uv: pip install uv")
    return [sys.executable, "-m", "uv"]


def resolve(name: str, lines: list[str], *, upgrade: bool) -> None:
    """Write one lock file; compatible versions of the previous lock are kept."""
    path = LOCKS / f"{name}.txt"
    command = [
        *find_uv(), "pip", "compile", "-", "--quiet", "--universal", f"--python-version={PYTHON}",
        "--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate",
        f"--output-file={path}",
    ]  # fmt: skip
    for other in CONSTRAINTS.get(name, ("cpu",)):
        if other != name:
            command += ["--constraints", str(LOCKS / f"{other}.txt")]
    if upgrade:
        command.append("--upgrade")
    subprocess.run(command, input="\n".join(lines), text=True, check=True, cwd=ROOT)
    header = f"# Made by tools/lock.py; do not edit.\n{DIGEST_PREFIX}{digest(lines)}\n"
    path.write_text(header + path.read_text())


def write_locks(*, upgrade: bool) -> None:
    """Write the requirements that Pants reads, then every stale lock."""
    main = repository_requirements()
    REQUIREMENTS.write_text(
        "# Made by tools/lock.py from the packages' pyproject.toml; do not edit.\n"
        f"{DIGEST_PREFIX}{digest(main)}\n" + "\n".join(main) + "\n"
    )
    stale = " ".join(stale_locks())
    for name, lines in lock_inputs().items():
        if upgrade or f"/{name}.txt" in stale:
            print(f"resolving tools/locks/{name}.txt")
            resolve(name, lines, upgrade=upgrade)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="list stale locks only")
    parser.add_argument("--upgrade", action="store_true", help="resolve to the newest versions")
    arguments = parser.parse_args()
    if arguments.check:
        if problems := stale_locks():
            sys.exit("\n".join([*problems, "run: python tools/lock.py"]))
        return
    write_locks(upgrade=arguments.upgrade)


if __name__ == "__main__":
    main()
