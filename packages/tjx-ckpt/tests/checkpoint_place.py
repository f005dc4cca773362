"""Local and remote checkpoint directories for tests, and damage to their files."""

import os
from typing import Any

import fsspec
import numpy as np
import pytest

import tjx_ckpt.checkpointer
from tjx_ckpt import Checkpointer
from tjx_ckpt.store.backends import is_remote, open_storage
from tjx_ckpt.store.remote_folder import RemoteFolder
from tjx_ckpt.store.storage import Storage

STATE: dict[str, Any] = {
    "params": {"w": np.arange(600, dtype=np.float32).reshape(20, 30) / 7, "ids": np.arange(3)},
    "opt_state": {"mu": np.ones(8, np.float16)},
    "step": np.int32(0),
}
# The holder renews fast and others watch for long, so that slow machines lose no lease.
FAST, PATIENT = 0.02, 5.0


def state(step: int) -> dict[str, Any]:
    return {**STATE, "step": np.int32(step)}


class Place:
    """A checkpoint directory and changes to its files."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.store, self.root = fsspec.url_to_fs(directory, use_listings_cache=False)

    def checkpointer(self, *, period_s: float = FAST, **settings: Any) -> Checkpointer:
        def opened(directory: str) -> Storage:
            remote = is_remote(directory)
            return (
                RemoteFolder(directory, lease_period_s=period_s)
                if remote
                else open_storage(directory)
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tjx_ckpt.checkpointer, "open_storage", opened)
            return Checkpointer(self.directory, **settings)

    def save(self, *steps: int) -> None:
        with self.checkpointer(keep=10) as checkpointer:
            for step in steps:
                checkpointer.save(step, state(step))

    def names(self, folder: str = "") -> list[str]:
        """Return the files in a folder, without what says that there was a manifest."""
        place = f"{self.root}/{folder}".rstrip("/")
        found = [path.removeprefix(f"{place}/") for path in self.store.find(place)]
        return sorted(name for name in found if name not in ("committed", ".writer"))

    def read(self, name: str) -> bytes:
        return bytes(self.store.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        self.store.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)  # noqa: PTH120  a URL
        self.store.pipe_file(f"{self.root}/{name}", content)

    def remove(self, name: str) -> None:
        self.store.rm_file(f"{self.root}/{name}")

    def flip_bit(self, name: str) -> None:
        content = bytearray(self.read(name))
        content[len(content) // 2] ^= 1
        self.write(name, bytes(content))


def storage(place: Place) -> Storage:
    return open_storage(place.directory)
