"""Compilation target of a traced function: the mesh's abstract device or the default device."""

import os
from typing import Literal, NamedTuple

import jax
from jax.experimental.pallas import triton as plt

type Platform = Literal["cpu", "gpu", "tpu"]

# The first implies the second. Both make XLA select cuDNN's deterministic backward pass, avoid
# atomic additions in scatters and use the first configuration of an autotuned kernel.
DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")


class Target(NamedTuple):
    """Platform and architecture of a device.

    Attributes
    ----------
    platform
        "cpu", "gpu" or "tpu".
    architecture
        Compute capability of an NVIDIA GPU ("sm_90"), device kind of a TPU ("TPU v5 lite"), or "".
    """

    platform: Platform
    architecture: str


def current_target() -> Target:
    """Return the target that the function being traced will be compiled for.

    In order of precedence: the abstract device of the current abstract mesh (ahead-of-time
    compilation), `jax.default_device`, the first local device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or _default_device()
    if device.platform == "tpu":
        return Target("tpu", device.device_kind)
    if device.platform in ("gpu", "cuda"):
        capability = plt.get_gpu_info().compute_capability
        return Target("gpu", f"sm_{capability}" if capability else "")
    return Target("gpu", "") if device.platform == "rocm" else Target("cpu", "")


def deterministic_ops() -> bool:
    """Return whether XLA_FLAGS request bitwise reproducible results on GPUs.

    XLA reads the variable when JAX first uses a device; the last occurrence of a flag wins.

    Examples
    --------
    >>> import os
    >>> "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "")
    False
    >>> deterministic_ops()
    False
    """
    values = {
        name: value.lower()
        for name, _, value in (
            flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split()
        )
    }
    return any(values.get(name, "false") in ("", "true", "1") for name in DETERMINISTIC_FLAGS)


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]
