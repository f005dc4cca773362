"""Host memory allocator settings for runs on CPUs."""

import ctypes
import os

import jax

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1

_ASYNC_DISPATCH = "jax_cpu_enable_async_dispatch"


def retain_freed_memory() -> bool:
    """Configure glibc's malloc to retain freed memory between steps.

    A step allocates and frees the same large buffers each time. By default glibc maps them anew,
    and the kernel clears every page again: measured on two cores, 55,700 page faults and 140 to
    210 ms of CPU time in a step of 1.1 s of CPU time. The process keeps the size of its largest
    step, which it would reach again anyway. Buffers above 64 MiB are kept only if
    `run_cpu_programs_inline` was called.

    Returns
    -------
    bool
        Whether the setting was applied; False if the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def run_cpu_programs_inline() -> None:
    """Make JAX run programs for the CPU on the thread that calls them; before JAX uses a device.

    By default JAX runs them, and allocates their buffers, on threads of its own. glibc keeps
    freed memory of such threads in arenas of at most 64 MiB: larger buffers are mapped and cleared
    in every step. The environment variable JAX_CPU_ENABLE_ASYNC_DISPATCH takes precedence.
    """
    if _ASYNC_DISPATCH.upper() not in os.environ:
        jax.config.update(_ASYNC_DISPATCH, False)  # type: ignore[no-untyped-call]  # as jax is


def programs_run_inline() -> bool:
    """Return whether a program has ended when its call returns, as on CPUs in `train`."""
    asynchronous: bool = jax.config.read(_ASYNC_DISPATCH)  # type: ignore[no-untyped-call]
    return jax.default_backend() == "cpu" and not asynchronous
