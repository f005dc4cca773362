"""Requirements of the GPU machine: packages, versions, disk space and wheels.

The packages are declared by the projects of this repository. The lock file gives the versions of
the wheels to download.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

# Distributions that GPU machines with JAX, flax and torch lack (seen 2026-11).
CARRIED = (
    "annotated-types", "beartype", "docstring-parser", "pydantic", "pydantic-core",
    "typing-inspection",
)  # fmt: skip
# Required by the kernel tests in addition to the declared requirements.
OTHERS = ("beartype", "jaxtyping>=0.3.0", "pytest")
PROJECTS = (
    *(f"packages/tjx-{name}" for name in
      ("core", "kernels", "nn", "optim", "parallel", "data", "ckpt", "metrics", "rl")),
    "apps/trainer",
)  # fmt: skip
TAGS = (
    "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
    "manylinux2014_x86_64", "manylinux1_x86_64",
)  # fmt: skip
DISK = 10 * 2**30  # bytes: corpus, compiled programs, and checkpoints of a few runs
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?(.*)")


def declared(root: Path) -> list[str]:
    """Return the requirements declared by all projects, without extras and tjx packages."""
    found = set(OTHERS)
    for project in PROJECTS:
        content = tomllib.loads((root / project / "pyproject.toml").read_text())
        found |= set(content["project"]["dependencies"])
    return sorted(line for line in found if not line.startswith("tjx-"))


def problem(requirement: str) -> str | None:
    """Return why a requirement such as ``jax>=0.11.2,<0.12`` is not satisfied, or None."""
    match = _REQUIREMENT.fullmatch(requirement)
    assert match is not None
    name, bounds = match[1], match[2]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    for bound in filter(None, bounds.split(",")):
        operator, limit = re.fullmatch(r"(>=|<)(.*)", bound.strip()).groups()  # type: ignore[union-attr]
        if (operator == ">=") != (_numbers(version) >= _numbers(limit)):
            return f"{name} is {version}; {requirement} is needed"
    return None


def check(root: Path, work: Path, *, disk: int = DISK) -> list[str]:
    """Return one line per missing requirement of this machine.

    Parameters
    ----------
    root : Path
        The repository.
    work : Path
        Existing output folder of the slices.
    disk : int
        Required free bytes in that folder.
    """
    problems = [found for line in declared(root) if (found := problem(line)) is not None]
    free = shutil.disk_usage(work).free
    if free < disk:
        problems.append(f"{work}: {free / 2**30:.1f} GiB are free; {disk / 2**30:.0f} are needed")
    return problems


def pinned(root: Path) -> list[str]:
    """Return the wheels to download, as ``name==version`` of the lock file."""
    lock = (root / "tools" / "locks" / "cpu.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", lock, re.MULTILINE))
    return [f"{name}=={pins[name]}" for name in CARRIED]


def download(root: Path, folder: Path) -> None:
    """Download the wheels for CPython 3.12 on Linux x86-64, with pip.

    Raises
    ------
    subprocess.CalledProcessError
        If pip fails; pip has printed why.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += [word for tag in TAGS for word in ("--platform", tag)]
    subprocess.run([*command, "--dest", str(folder), *pinned(root)], check=True)


def install(wheels: Path, target: Path) -> None:
    """Install downloaded wheels into a folder for PYTHONPATH, without network and dependencies.

    Raises
    ------
    ValueError
        If the folder holds no wheel.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(
            f"--wheels: got {wheels}; expected a folder with wheels; "
            f"run: python tools/bench/gpu.py --download-wheels {wheels}"
        )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target)]
    subprocess.run([*command, *map(str, files)], check=True)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    return (*numbers, *[0] * (3 - len(numbers)))
