"""One of the eight devices of a test process, for runs whose mesh is not what a test is about.

Eight devices on two cores make every compilation and every step of a tiny model dearer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest

ALL_DEVICES = jax.devices()


@contextmanager
def only_one_device() -> Iterator[None]:
    """Let JAX name one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: ALL_DEVICES[:1])
        patch.setattr(jax, "device_count", lambda *_: 1)
        patch.setattr(jax, "local_device_count", lambda *_: 1)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    """Give the module that imports this fixture one device."""
    with only_one_device():
        yield
