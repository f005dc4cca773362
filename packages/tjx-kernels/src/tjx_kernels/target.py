"""What a program is compiled for: the device of the mesh in use, or JAX's default device."""

import os
from typing import Literal, NamedTuple

import jax
from jax.experimental.pallas import triton as plt

type Platform = Literal["cpu", "gpu", "tpu"]

# The first implies the second. Both make XLA choose cuDNN's deterministic backward pass, remove
# atomic additions from scatters and take the first configuration of an autotuned kernel.
DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")


class Target(NamedTuple):
    """A kind of device.

    Attributes
    ----------
    platform
        "cpu", "gpu" (NVIDIA's; a GPU of another maker has no architecture) or "tpu".
    architecture
        Of a GPU its compute capability as "sm_90", of a TPU the kind as "TPU v5 lite", else "".
    """

    platform: Platform
    architecture: str


def current_target() -> Target:
    """Find what a function that is being traced will be compiled for.

    An abstract mesh with an abstract device (for compiling without the hardware) goes before
    `jax.default_device`, and that before the first local device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or _default_device()
    if device.platform == "tpu":
        return Target("tpu", device.device_kind)
    if device.platform in ("gpu", "cuda"):
        capability = plt.get_gpu_info().compute_capability
        return Target("gpu", f"sm_{capability}" if capability else "")
    return Target("gpu", "") if device.platform == "rocm" else Target("cpu", "")


def deterministic_ops() -> bool:
    """Tell whether XLA_FLAGS ask for the same bits in every run on a GPU.

    XLA reads the variable when JAX first uses a device; of a flag given twice the last counts.

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
