"""XLA flags that the trainer sets, one table per platform. Standard library only.

XLA aborts on an unknown flag, and flags change between versions, so the tables apply to
`JAXLIB_VERSION` only. Flags in the environment variable XLA_FLAGS take precedence.
"""

import importlib.util
import os
import platform
import re
from collections.abc import Mapping, MutableMapping
from importlib import metadata
from typing import Literal, NamedTuple

from tjx_core import ConfigError

JAXLIB_VERSION = "0.11.2"
# XLA then uses deterministic cuDNN algorithms, sorts instead of atomic additions, and the first
# configuration of each autotuned kernel.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# LLVM fuses a product and a sum into one rounding where it finds both, which depends on the code
# around them and so on the mesh. AVX has no such instruction.
WITHOUT_FMA = "--xla_cpu_max_isa=AVX"

type Platform = Literal["cpu", "gpu"]


class Flag(NamedTuple):
    """An XLA flag with its value and the reason for it."""

    name: str
    value: str
    reason: str


# Chosen by estimates from the HLO compiled for sm_90a, not measured on a GPU. No CPU flag that was
# measured made a step faster: fast-math, vector widths, XNNPACK, oneDNN.
TABLES: Mapping[Platform, tuple[Flag, ...]] = {
    "cpu": (),
    "gpu": (
        Flag(
            "xla_gpu_enable_triton_gemm",
            "false",
            "cuBLASLt fuses bias and residual additions into its epilogue, a Triton GEMM does not; "
            "there are fewer kernels to compile and autotune",
        ),
        Flag(
            "xla_gpu_dot_merger_threshold_mb",
            "0",
            "query, key and value stay separate GEMMs with fused biases; a merged GEMM needs one "
            "more kernel each to split its result",
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
    """Add the flags of a platform to XLA_FLAGS. Call this before JAX initializes.

    Parameters
    ----------
    platform
        The platform; None for that of JAX.
    environment
        Source of JAX_PLATFORMS and XLA_FLAGS; XLA_FLAGS is extended.

    Returns
    -------
    list of Flag
        The added flags: none with another jaxlib version, none that XLA_FLAGS already sets, and
        none if XLA_FLAGS names a file.
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
    """Add XLA's flag for deterministic GPU operations to XLA_FLAGS, before JAX initializes.

    Raises
    ------
    ConfigError
        If XLA_FLAGS names a file.
    """
    _append("--train.deterministic: got true", [DETERMINISTIC], environment)


def request_reproducibility(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the flags of `train.reproducible mesh` to XLA_FLAGS, before JAX initializes.

    Raises
    ------
    ConfigError
        If XLA_FLAGS names a file.
    """
    # XLA reads the name of an instruction set on x86 only.
    flags = [WITHOUT_FMA] if platform.machine() in ("x86_64", "AMD64") else []
    _append("--train.reproducible: got mesh", [*flags, DETERMINISTIC], environment)


def _append(option: str, words: list[str], environment: MutableMapping[str, str]) -> None:
    """Append flags to XLA_FLAGS: the last occurrence of a flag wins."""
    given = environment.get("XLA_FLAGS", "").strip()
    if _names_file(given):
        problem = (
            f"{option} with XLA_FLAGS={given!r}, the name of a file; expected flags there; add "
            f"{' '.join(words)} to the file and leave the option out"
        )
        raise ConfigError([problem])
    flags = given.split()
    if flags[-len(words) :] != words:
        environment["XLA_FLAGS"] = " ".join([*flags, *words])


def expected_platform(environment: Mapping[str, str]) -> Platform:
    """Return the platform that JAX will use, without importing JAX: "gpu" with NVIDIA's plugin."""
    requested = environment.get("JAX_PLATFORMS", "")
    if requested and not {"cuda", "gpu"} & set(requested.split(",")):
        return "cpu"
    return "gpu" if any(map(_is_installed, ("xla_cuda13", "xla_cuda12"))) else "cpu"


def _names_file(flags: str) -> bool:
    return flags != "" and not flags.startswith("-")


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no jax_plugins package
        return False
