"""Memory of a CPU run: kept between steps instead of returned to the system."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def retain_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next step.

    A step allocates and frees the same large buffers each time. By default glibc maps them afresh,
    and the kernel clears every page again: measured on two cores, a quarter of the time of a small
    model's step. The process keeps the size of its largest step, which it would reach again anyway.

    Returns
    -------
    bool
        Whether the C library took it; others than glibc are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
