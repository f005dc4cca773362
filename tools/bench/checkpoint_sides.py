"""Workers of the checkpoint benchmark, selected by name; see checkpoint.py."""

import importlib
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from turns import Json, serve

# Like parameters and two moments of a GPT: few large arrays, stacked over layers.
LAYERS, WIDTH = 12, 768
Restored = Callable[[], Any]


def save_tjx(folder: Path, step: int, state: Any) -> tuple[float, Restored]:
    """Save with tjx-ckpt; return the blocking seconds and a restore function."""
    import tjx_ckpt

    checkpointer = tjx_ckpt.Checkpointer(folder, keep=1)
    begin = time.perf_counter()
    checkpointer.save(step, state)
    blocked = time.perf_counter() - begin
    checkpointer.close()
    return blocked, lambda: tjx_ckpt.Checkpointer(folder).restore(state)


def save_orbax(
    folder: Path, step: int, state: Any, *, compressed: bool = True
) -> tuple[float, Restored]:
    """Save with Orbax's API v1 and, if compressed, its defaults."""
    ocp: Any = importlib.import_module("orbax.checkpoint").v1  # optional peer dependency
    path = folder / str(step)
    context = ocp.Context()
    context.array.saving.use_compression = compressed
    begin = time.perf_counter()
    with context:
        response = ocp.save_async(path, state)
    blocked = time.perf_counter() - begin
    response.result()
    abstract_array: Any = jax.ShapeDtypeStruct  # JAX gives no types
    abstract = jax.tree.map(lambda x: abstract_array(x.shape, x.dtype, sharding=x.sharding), state)
    return blocked, lambda: ocp.load(path, abstract)


SAVES: dict[str, Callable[[Path, int, Any], tuple[float, Restored]]] = {
    "tjx": save_tjx,
    "orbax": save_orbax,
    "orbax uncompressed": lambda *given: save_orbax(*given, compressed=False),
}


class Side:
    """Worker that saves and restores a state."""

    def __init__(self, name: str) -> None:
        self._save = SAVES[name]

    def prepare(self, folder: str, bytes: float) -> Json:  # noqa: A002  name of the request field
        """Create the state."""
        self._folder = Path(folder)
        self._folder.mkdir()
        shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH),
                  "down": (4 * WIDTH, WIDTH)}  # fmt: skip
        a_layer = 4 * 3 * sum(a * b for a, b in shapes.values())
        layers = max(1, round(bytes / a_layer))
        rng = np.random.default_rng(0)
        state = {
            part: {
                name: rng.standard_normal((layers, *shape), np.float32)
                for name, shape in shapes.items()
            }
            for part in ("params", "mu", "nu")
        }
        self._state = jax.device_put(state)
        return {
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "leaves": len(jax.tree.leaves(state)),
            "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        }

    def save_and_restore(self, step: int) -> Json:
        """Save and restore once; check equality and return the seconds."""
        begin = time.perf_counter()
        blocked, restore = self._save(self._folder, step, self._state)
        saved = time.perf_counter()
        restored = restore()
        for leaf in jax.tree.leaves(restored):
            leaf.block_until_ready()
        seconds = {
            "blocking": blocked,
            "save": saved - begin,
            "restore": time.perf_counter() - saved,
        }
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(self._state), strict=True):
            assert np.array_equal(a, b)
        shutil.rmtree(self._folder / str(step))
        return seconds


if __name__ == "__main__":
    side = Side(sys.argv[1])
    serve({"prepare": side.prepare, "save_and_restore": side.save_and_restore})
