"""Wheels: each installs and imports alone, with its declared dependencies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from release import wheel_problems
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["ckpt", "core", "data", "kernels", "metrics", "nn", "optim", "parallel", "rl"]
# Packages that tjx-kernels may install.
ONLY_JAX = {"jax", "jaxlib", "ml-dtypes", "numpy", "opt-einsum", "scipy"}


def uv(*arguments: str | Path, cache: Path) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME") or name.startswith(("SSL_", "UV_", "PIP_"))
    }
    environment["UV_CACHE_DIR"] = str(cache)
    command = [find_uv_bin(), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one download cache between all environments."""
    return tmp_path_factory.mktemp("uv_cache")


@pytest.fixture(scope="module")
def wheels(cache: Path) -> Path:
    """Return the wheels that `./pants package` built, from the sandbox of this test."""
    found = sorted(ROOT.glob("*.whl"))
    assert {wheel.name.split("-")[0] for wheel in found} == {f"tjx_{name}" for name in PACKAGES}
    for wheel in found:
        assert not wheel_problems(wheel), wheel.name
    return ROOT


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_installs_and_imports_alone(
    package: str, wheels: Path, cache: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    uv("venv", "--python", sys.executable, environment, cache=cache)
    python = environment / "bin" / "python"
    uv(
        "pip", "install", f"tjx-{package}", "--python", python, "--find-links", wheels,
        "--constraints", ROOT / "tools" / "locks" / "cpu.txt",
        cache=cache,
    )  # fmt: skip

    program = (
        f"import tjx_{package} as package\n"
        "for name in package.__all__: getattr(package, name)\n"
        "print(package.__file__)"
    )
    result = subprocess.run(
        [python, "-I", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert str(environment) in result.stdout
    assert (Path(result.stdout.strip()).parent / "py.typed").is_file()

    listed = json.loads(uv("pip", "list", "--python", python, "--format", "json", cache=cache))
    installed = {entry["name"] for entry in listed}
    siblings = {name for name in installed if name.startswith("tjx-")} - {f"tjx-{package}"}
    if package == "nn":
        assert siblings == {"tjx-kernels"}
    else:
        assert siblings <= (set() if package == "kernels" else {"tjx-core"})
    if package == "core":
        assert installed == {"tjx-core"}
    if package == "kernels":
        assert installed - {"tjx-kernels"} <= ONLY_JAX
