"""Peak memory of the devices and of the process."""

import sys

import jax


def peak_memory() -> dict[str, int]:
    """Read peak memory since the start of the process; takes microseconds.

    Returns
    -------
    dict
        "device_peak_bytes": largest peak over the local devices, as counted by XLA's allocator;
        missing if a device does not report it (CPU). "host_peak_bytes": largest resident set size
        of the process; missing on Windows.

    Examples
    --------
    >>> sorted(peak_memory())  # on a CPU
    ['host_peak_bytes']
    """
    peaks = {"device_peak_bytes": device_peak_bytes(), "host_peak_bytes": host_peak_bytes()}
    return {name: size for name, size in peaks.items() if size is not None}


def device_peak_bytes() -> int | None:
    """Return the largest peak over the local devices in bytes; None if one does not report it."""
    peaks = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats is None or "peak_bytes_in_use" not in stats:
            return None
        peaks.append(int(stats["peak_bytes_in_use"]))
    return max(peaks)


def host_peak_bytes() -> int | None:
    """Return the largest resident set size of this process in bytes; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB
