"""The most memory that a process has held so far."""

import sys

import jax


def peak_memory() -> dict[str, int]:
    """Read the peaks since the process began; it costs microseconds.

    Returns
    -------
    dict
        "device_peak_bytes": the largest peak of this process's devices, of what XLA's allocator
        gave out; missing where a device tells none, as a CPU does not. "host_peak_bytes": the
        largest resident set of the process; missing on Windows.

    Examples
    --------
    >>> sorted(peak_memory())  # on a CPU
    ['host_peak_bytes']
    """
    found = {"device_peak_bytes": device_peak_bytes(), "host_peak_bytes": host_peak_bytes()}
    return {name: size for name, size in found.items() if size is not None}


def device_peak_bytes() -> int | None:
    """Return the largest peak of the devices of this process, bytes; None where one tells none."""
    peaks = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats is None or "peak_bytes_in_use" not in stats:
            return None
        peaks.append(int(stats["peak_bytes_in_use"]))
    return max(peaks)


def host_peak_bytes() -> int | None:
    """Return the largest resident set that this process had, bytes; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
