"""XLA flags that the trainer sets, one table for each platform; standard library only.

XLA ends the process at a flag that it does not know, and flags come and go with its versions. The
tables hold for `JAXLIB_VERSION` alone: with another version none are set. Flags in the environment
variable XLA_FLAGS take precedence over the tables.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from importlib import metadata
from typing import Literal, NamedTuple

from tjx_trainer.config.run_config import ConfigError

JAXLIB_VERSION = "0.11.2"
# XLA then takes cuDNN's deterministic algorithms, sorts what it would add by atomic operations, and
# takes the first configuration of an autotuned kernel in place of the one that was fastest today.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

type Platform = Literal["cpu", "gpu"]


class Flag(NamedTuple):
    """An XLA flag, its value, and why it has that value."""

    name: str
    value: str
    reason: str


# The gains are estimates from the HLO that the flags give for sm_90a; none is measured on a GPU.
# On CPUs no flag was found that makes a training step faster: fast-math, vector widths, XNNPACK and
# oneDNN were measured.
TABLES: Mapping[Platform, tuple[Flag, ...]] = {
    "cpu": (),
    "gpu": (
        Flag(
            "xla_gpu_enable_triton_gemm",
            "false",
            "cuBLASLt adds biases and the residual stream in its epilogue, where a Triton product "
            "leaves them to another kernel; there are fewer kernels to compile and to time",
        ),
        Flag(
            "xla_gpu_dot_merger_threshold_mb",
            "0",
            "query, key and value are products of their own, each with its bias in the epilogue; "
            "merged into one product they are cut apart by a kernel each",
        ),
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "collectives of several GPUs overlap with computation",
        ),
    ),
}


def set_flags(
    platform: Platform | None = None, environment: MutableMapping[str, str] = os.environ
) -> list[Flag]:
    """Add the flags of a platform to XLA_FLAGS; before JAX starts.

    Parameters
    ----------
    platform
        Whose table; None is the platform that JAX will use.
    environment
        To read JAX_PLATFORMS and XLA_FLAGS from; XLA_FLAGS is extended.

    Returns
    -------
    list of Flag
        The flags that were added: none of the table where jaxlib has another version, none that
        XLA_FLAGS sets already, and none where XLA_FLAGS names a file of flags.
    """
    given = environment.get("XLA_FLAGS", "").strip()
    if _names_file(given) or metadata.version("jaxlib") != JAXLIB_VERSION:
        return []
    own = set(re.findall(r"--(\w+)", given))
    table = TABLES[platform or expected_platform(environment)]
    added = [flag for flag in table if flag.name not in own]
    words = [f"--{flag.name}={flag.value}" for flag in added]
    if words:
        environment["XLA_FLAGS"] = " ".join([*words, given]).strip()
    return added


def request_determinism(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add XLA's flag for deterministic operations on GPUs to XLA_FLAGS; before JAX starts.

    It is added last, as XLA takes the last of a flag that is given twice.

    Raises
    ------
    ConfigError
        If XLA_FLAGS names a file of flags, to which nothing can be added.
    """
    given = environment.get("XLA_FLAGS", "").strip()
    if _names_file(given):
        problem = (
            f"--train.deterministic: got true with XLA_FLAGS={given!r}, the name of a file; "
            f"expected flags there; add {DETERMINISTIC} to the file and leave the option out"
        )
        raise ConfigError([problem])
    flags = given.split()
    if flags[-1:] != [DETERMINISTIC]:
        environment["XLA_FLAGS"] = " ".join([*flags, DETERMINISTIC])


def expected_platform(environment: Mapping[str, str]) -> Platform:
    """Return the platform that JAX will use, without importing it: "gpu" with NVIDIA's plugin."""
    asked = environment.get("JAX_PLATFORMS", "")
    if asked and not {"cuda", "gpu"} & set(asked.split(",")):
        return "cpu"
    return "gpu" if any(map(_is_installed, ("xla_cuda13", "xla_cuda12"))) else "cpu"


def _names_file(flags: str) -> bool:
    return flags != "" and not flags.startswith("-")


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False
