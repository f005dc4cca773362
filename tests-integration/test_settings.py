"""Settings of the tests: coverage, and reasons of skipped tests."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

@pytest.mark.skip
def test_a(): ...

def test_b(): pytest.skip()

@pytest.mark.xfail
def test_c(): assert False

@pytest.mark.skip(reason="needs a GPU")
def test_d(): ...

def test_e(): pytest.skip("needs a GPU")

@pytest.mark.xfail(reason="known")
def test_f(): assert False

def test_g(): pytest.importorskip("no_such_module")
"""


def test_a_skip_needs_a_reason(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "conftest.py", tmp_path)
    (tmp_path / "test_reasons.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", "test_reasons.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    failed = [line.split("::")[1].split()[0] for line in lines if line[:5] in ("ERROR", "FAILE")]
    assert failed == ["test_a", "test_b", "test_c"], result.stdout
    assert "2 failed, 3 skipped, 1 xfailed, 1 error" in lines[-1]
    assert "without a reason: give reason=" in result.stdout
    assert "could not import 'no_such_module'" in result.stdout


def test_coverage_uses_python_s_monitoring() -> None:
    """The tracer makes tests 2.6 times as long."""
    settings = configparser.ConfigParser()
    if not settings.read(ROOT / ".coveragerc"):  # in a sandbox, Pants writes it for coverage only
        pytest.skip("tests run without coverage")
    assert settings["run"]["core"] == "sysmon"
