"""Settings that every test of every package shares: strict JAX, eight CPU devices, fixed seeds."""

import os
import random

# Before JAX is imported: tests are about ideas, not about hardware.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

for name, value in {
    "jax_num_cpu_devices": 8,
    # A forgotten axis is an error, not a silent broadcast.
    "jax_numpy_rank_promotion": "raise",
    # A transfer that nobody asked for is an error: use jax.device_put and jax.device_get.
    "jax_transfer_guard": "disallow",
}.items():
    jax.config.update(name, value)  # type: ignore[no-untyped-call]  # as jax is


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the legacy state is what forgetful code would use
