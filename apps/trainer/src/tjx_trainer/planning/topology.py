"""Compile-only devices of accelerators that are not attached, from their compiler plugins."""

import importlib.util
import os
import re
from importlib import resources

import jax

from tjx_parallel.planning.chips import Chip

_TARGETS = {"a100": "sm_80", "h100": "sm_90a", "h200": "sm_90a"}  # in tjx_parallel/targets
_PLUGINS = {"cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",)}


class TargetUnavailableError(Exception):
    """The reason why a step cannot be compiled for a chip on this machine."""


def topology_devices(chip: Chip, count: int) -> list[jax.Device]:
    """Return compile-only devices of a chip.

    Parameters
    ----------
    chip : Chip
        The accelerator.
    count : int
        Number of devices.

    Returns
    -------
    list of jax.Device
        Devices for `jax.jit(...).lower(...).compile()`; nothing can run on them.

    Raises
    ------
    TargetUnavailableError
        If the compiler of the chip is not installed or does not know the chip.
    """
    if not any(map(_is_installed, _PLUGINS[chip.platform])):
        raise TargetUnavailableError(f"the compiler of {chip.name} is not installed")
    from jax.experimental import topologies

    # The checks would look for attached hardware.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    for name, value in {"SKIP_MDS_QUERY": "1", "WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(f"TPU_{name}", value)
    try:
        if chip.platform == "tpu":
            name = f"{chip.name}:{_torus(count, 3 if chip.name == 'v5p' else 2)}"
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.name,
            target_config=_target(chip),
            topology=f"1x{max(count // chip.fast_size, 1)}x{min(count, chip.fast_size)}",
        )
        return list(described.devices)
    except (ValueError, NotImplementedError, OSError, jax.errors.JaxRuntimeError) as error:
        raise TargetUnavailableError(
            f"it has no topology description ({str(error)[:90]})"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _target(chip: Chip) -> str:
    """Return XLA's target description of a GPU, with the chip's memory and bandwidth."""
    if chip.name not in _TARGETS:
        raise ValueError(f"no description of {chip.name}")
    file = resources.files("tjx_parallel") / "targets" / f"{_TARGETS[chip.name]}.txtpb"
    own = {"device_memory_size": chip.memory, "memory_bandwidth": int(chip.memory_bandwidth)}
    text = file.read_text()
    for name, value in own.items():
        text = re.sub(rf"\b{name}: \d+", f"{name}: {value}", text)
    return text


def _torus(count: int, dimensions: int) -> str:
    """Return the sides of a TPU torus as text, such as 4x8 or 2x2x1."""
    if count & (count - 1):
        raise ValueError(f"{count} is no power of two")
    power = count.bit_length() - 1
    sides = [2 ** ((power + n) // dimensions) for n in range(dimensions)]
    return "x".join(map(str, sides if dimensions == 2 else reversed(sides)))
