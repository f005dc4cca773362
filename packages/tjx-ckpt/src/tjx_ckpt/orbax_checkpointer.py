"""`Checkpointer` with ``format="orbax"``: the locks, renames and retention of tjx, files of Orbax.

A step has the layout of ``orbax.checkpoint.CheckpointManager`` with one unnamed item: the state in
``default``, the metrics in ``metrics``, and the metadata as Orbax's custom metadata.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from tjx_ckpt.checkpointer import Checkpointer
from tjx_ckpt.errors import UnreadableError
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.lookup import require
from tjx_ckpt.orbax_format import check_not_empty, import_orbax, orbax_specs, read_leaves
from tjx_ckpt.store.backends import is_remote
from tjx_ckpt.store.manifest import MANIFEST_NAME, Manifest
from tjx_ckpt.writer import PendingCheckpoint
from tjx_core import ConfigError, Problem, fsync_path

_METRICS = "metrics"


class OrbaxCheckpointer(Checkpointer):
    """Saves and restores checkpoints of Orbax; opened by ``Checkpointer(..., format="orbax")``.

    Parameters
    ----------
    directory, **settings
        As for `Checkpointer`.

    Raises
    ------
    ConfigError
        If the directory is a URL, the run has several processes, or a number is out of range.
    """

    def __init__(self, directory: str | Path, **settings: Any) -> None:
        advice = "use the default format, and tjx-ckpt export --format orbax to convert"
        if is_remote(directory):
            text = f"got 'orbax' with the URL {directory}; expected a local folder; {advice}"
            raise ConfigError([Problem("format", text)])
        if jax.process_count() > 1:
            text = f"got 'orbax' with {jax.process_count()} processes; expected one; {advice}"
            raise ConfigError([Problem("format", text)])
        import_orbax()
        super().__init__(directory, **settings)
        self._folder = Path(directory).absolute()

    def verify(self, step: int) -> NoReturn:
        """Raise ValueError, as Orbax stores no checksums."""
        raise ValueError(
            f"format: got 'orbax' and verify({step}); expected the default format, as Orbax stores "
            "no checksums; restore the step to see whether Orbax can read it"
        )

    def manifest(self, step: int) -> Manifest:
        """Raise ValueError, as Orbax writes no manifest."""
        raise ValueError(
            f"format: got 'orbax' and manifest({step}); expected the default format, as Orbax "
            "writes no manifest; tjx_ckpt.orbax_specs returns shapes and dtypes"
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint; {} if another program wrote it."""
        require(self._storage, step)
        with _orbax() as checkpointer:
            found = checkpointer.metadata(self._folder / str(step))
        return dict(found.custom_metadata or {})

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of a checkpoint; {} if it has none."""
        require(self._storage, step)
        if not (self._folder / str(step) / _METRICS).is_dir():
            return {}
        ocp = import_orbax()
        arguments = ocp.args.Composite(metrics=ocp.args.JsonRestore())
        with _orbax() as checkpointer:
            found = checkpointer.restore(self._folder / str(step), args=arguments)
        return dict(found[_METRICS])

    def _check_format(self) -> None:
        if (self._folder / str(self.latest_step()) / MANIFEST_NAME).exists():
            raise ValueError(
                f"format: got 'orbax', and {self._folder} holds checkpoints of the format 'tjx'; "
                "expected another directory; use another one, or format='tjx'"
            )

    def _stage(self, state: Any, pending: PendingCheckpoint) -> Callable[[], int]:
        check_not_empty(pending.leaves)
        # NumPy arrays are copied, as the caller may change them in place after the save returns.
        copied = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.Array) else leaf.copy(), state
        )
        host = jax.tree.map(np.asarray, jax.device_get(copied))
        return lambda: self._write(host, pending)

    def _write(self, state: Any, pending: PendingCheckpoint) -> int:
        ocp = import_orbax()
        self._storage.abandon(pending.step)
        temporary = self._folder / f"{pending.step}.tmp"
        items = {"default": ocp.args.PyTreeSave(state)}
        if pending.metrics:
            items[_METRICS] = ocp.args.JsonSave(dict(pending.metrics))
        try:
            with _orbax() as checkpointer:
                checkpointer.save(
                    temporary,
                    args=ocp.args.Composite(**items),
                    custom_metadata=dict(pending.metadata),
                )
            for folder, _, names in os.walk(temporary):
                for name in (*names, "."):
                    fsync_path(Path(folder, name))
            if pending.before_commit is not None:
                pending.before_commit()
            self._storage.commit(pending.step)
        except BaseException:
            self._storage.abandon(pending.step)
            raise
        return sum(spec.size_bytes for spec in pending.leaves.values())

    def _read(
        self,
        step: int,
        abstract: Mapping[str, Any],
        check: Callable[[int, Mapping[str, LeafSpec]], None],
    ) -> dict[str, Any]:
        folder = self._folder / str(step)
        try:
            specs = orbax_specs(folder)
        except Exception as error:  # Orbax's errors have no common class
            raise UnreadableError(str(folder), error) from error
        check(step, specs)
        try:
            return read_leaves(folder, abstract)
        except Exception as error:
            raise UnreadableError(str(folder), error) from error

    def _stored_metrics(self, step: int) -> Mapping[str, float]:
        try:
            return self.metrics(step)
        except Exception:  # it can be one of the newest, not one of the best
            return {}


def _orbax() -> Any:
    """Return Orbax's checkpointer of a step."""
    ocp = import_orbax()
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            default=ocp.PyTreeCheckpointHandler(),
            metrics=ocp.JsonCheckpointHandler(filename=_METRICS),
        )
    )
