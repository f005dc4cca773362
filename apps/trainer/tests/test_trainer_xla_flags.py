"""XLA flags: accepted by the pinned jaxlib, set before JAX starts, never overriding the user's."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from tjx_core import ConfigError
from tjx_trainer.runtime import xla_flags
from tjx_trainer.runtime.xla_flags import (
    JAXLIB_VERSION,
    TABLES,
    expected_platform,
    request_determinism,
    set_flags,
)


def test_the_tables_are_for_the_jaxlib_that_is_installed() -> None:
    assert metadata.version("jaxlib") == JAXLIB_VERSION


def test_xla_accepts_every_flag_of_every_table() -> None:
    """An unknown flag ends the process. All platforms' flags are read by the CPU's XLA too."""
    words = [f"--{flag.name}={flag.value}" for table in TABLES.values() for flag in table]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(words)}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_flags_of_the_user_win() -> None:
    flag = TABLES["gpu"][0]
    environment = {"XLA_FLAGS": f"--{flag.name}=theirs --xla_other=1"}
    added = set_flags("gpu", environment)
    assert added == list(TABLES["gpu"][1:])
    found = dict(re.findall(r"--(\w+)=(\S+)", environment["XLA_FLAGS"]))
    assert found == {
        **{flag.name: flag.value for flag in added},
        flag.name: "theirs",
        "xla_other": "1",
    }


@pytest.mark.parametrize("given", ["", "--xla_other=1"])
def test_another_jaxlib_gets_no_flags(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(xla_flags, "JAXLIB_VERSION", "0.0.1")
    environment = {"XLA_FLAGS": given}
    assert set_flags("gpu", environment) == []
    assert environment == {"XLA_FLAGS": given}


def test_a_file_of_flags_is_left_alone() -> None:
    environment = {"XLA_FLAGS": "flags.txt"}
    assert set_flags("gpu", environment) == []
    with pytest.raises(ConfigError, match="the name of a file"):
        request_determinism(environment)
    assert environment == {"XLA_FLAGS": "flags.txt"}


def test_the_platform_is_known_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_flags, "_is_installed", lambda plugin: plugin == "xla_cuda13")
    assert expected_platform({}) == "gpu"
    assert expected_platform({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert expected_platform({"JAX_PLATFORMS": "cpu"}) == "cpu"
    monkeypatch.setattr(xla_flags, "_is_installed", lambda _: False)
    assert expected_platform({}) == "cpu"
