"""What a program is compiled for: the device of the mesh in use, or JAX's default device."""

from typing import Literal, NamedTuple

import jax
from jax.experimental.pallas import triton as plt

type Platform = Literal["cpu", "gpu", "tpu"]


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


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]
