"""Host allocator settings: applied with glibc, and no error with another C library."""

import ctypes
import platform
import subprocess
import sys

import pytest

from tjx_trainer.runtime.allocator import retain_freed_memory

# A program whose temporary buffer is larger than an arena of a thread holds, 64 MiB.
_FAULTS = """
import resource

import jax
import jax.numpy as jnp
from jax import lax

from tjx_trainer.runtime.allocator import retain_freed_memory, run_cpu_programs_inline

run_cpu_programs_inline()
retain_freed_memory()
program = jax.jit(lambda x: lax.optimization_barrier(jnp.zeros((1 << 13, 1 << 12)) + x).sum(0))
x = jnp.ones(())
program(x).block_until_ready()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def test_glibc_takes_it() -> None:
    assert retain_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert retain_freed_memory() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory is retained")
def test_large_temporary_buffers_are_not_mapped_in_every_step() -> None:
    """The 128 MiB of the program are 32,768 pages, each a fault where they are mapped anew.

    A smaller buffer may take a part of the freed memory, so single steps do map.
    """
    command = [sys.executable, "-c", _FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3_000
