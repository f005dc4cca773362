"""Determinism on GPUs: what XLA is told before JAX starts. Nothing here imports JAX."""

import os

# XLA then takes cuDNN's deterministic algorithms, sorts what it would add by atomic operations, and
# takes the first configuration of an autotuned kernel in place of the one that was fastest today.
FLAG = "--xla_gpu_deterministic_ops=true"


def request_determinism() -> None:
    """Add XLA's flag to XLA_FLAGS; of a flag given twice XLA takes the last.

    Call it before JAX first uses a device: XLA reads the variable then.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flags[-1:] != [FLAG]:
        os.environ["XLA_FLAGS"] = " ".join([*flags, FLAG])
