"""The C library's memory settings: taken by glibc, and no error anywhere else."""

import ctypes
import platform

import pytest

from tjx_trainer.runtime.allocator import retain_freed_memory


def test_glibc_takes_it() -> None:
    assert retain_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert retain_freed_memory() is False
