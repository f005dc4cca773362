"""Background saves and verified restores of the state of a run.

The order of a save is: arrays -> fsync -> manifest with checksums -> rename -> prune. A folder is
named after a step only if the checkpoint is complete; checksums detect later damage.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax

from tjx_ckpt import multihost
from tjx_ckpt.device_placement import restore_leaves
from tjx_ckpt.directory_lock import take_lock
from tjx_ckpt.errors import ClaimError, MismatchError, SaveError
from tjx_ckpt.host_staging import stage
from tjx_ckpt.leaf_spec import LeafSpec, differences
from tjx_ckpt.lookup import require, require_manifest
from tjx_ckpt.pytree import describe, flatten
from tjx_ckpt.restore_fallback import read_newest, read_step
from tjx_ckpt.retention import Pruner, Retention
from tjx_ckpt.store import manifest as manifest_file
from tjx_ckpt.store.backends import open_storage
from tjx_ckpt.store.checkpoint_reader import CheckpointReader
from tjx_ckpt.store.verification import problems
from tjx_ckpt.writer import PendingCheckpoint, SaveReport, write_checkpoint
from tjx_core import ConfigError, unknown_name

MAX_DIFFERENCES = 100
"""Differences between a checkpoint and the requested state that an error lists."""

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the checkpoints of one run in one directory.

    Opening and reading do not write. The first `save` or `claim` locks the directory, deletes
    leftovers of killed saves and renames damaged checkpoints. In multi-process runs every process
    calls every method, with a directory on a shared file system.

    Parameters
    ----------
    directory
        Local or shared folder, or an fsspec URL such as s3://bucket/run; created by the first
        save.
    keep
        Number of newest checkpoints to keep.
    keep_every
        Checkpoints of steps that are multiples of this are kept permanently.
    keep_best
        Number of best checkpoints to keep.
    best_metric, best_mode
        Name of the metric that ranks checkpoints; whether "min" or "max" is best.
    format
        "tjx": safetensors files with checksums. "orbax": the files of Orbax, for programs that
        read them; one process, a local folder, no empty arrays and no `verify` or `manifest`,
        since Orbax stores no checksums. Needs the extra ``orbax``.

    Attributes
    ----------
    last_save : SaveReport or None
        Duration and size of the last durable save.

    Raises
    ------
    ConfigError
        If a number is out of range, or the format is unknown or not possible here.

    Examples
    --------
    >>> import jax, numpy as np, tempfile
    >>> state = {"w": jax.device_put(np.arange(3.0))}
    >>> abstract = jax.eval_shape(lambda state: state, state)
    >>> with tempfile.TemporaryDirectory() as directory, Checkpointer(directory) as checkpointer:
    ...     checkpointer.save(10, state, metadata={"seed": 1})
    ...     checkpointer.wait()
    ...     restored = checkpointer.restore(abstract)
    ...     print(restored["w"], checkpointer.latest_step(), checkpointer.metadata(10))
    [0. 1. 2.] 10 {'seed': 1}
    """

    def __new__(cls, *_: Any, format: Literal["tjx", "orbax"] = "tjx", **__: Any) -> Self:  # noqa: A002
        """Return an instance of the class of the format."""
        if format not in ("tjx", "orbax"):
            raise ConfigError([unknown_name("format", format, ("tjx", "orbax"))])
        chosen: Any = cls
        if format == "orbax":
            from tjx_ckpt.orbax_checkpointer import OrbaxCheckpointer  # derives from this class

            chosen = OrbaxCheckpointer
        instance: Self = super().__new__(chosen)
        return instance

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        best_metric: str = "eval/loss",
        best_mode: Literal["min", "max"] = "min",
        format: Literal["tjx", "orbax"] = "tjx",  # noqa: A002
    ) -> None:
        del format  # `__new__` chose the class
        retention = Retention(
            keep=keep, every=keep_every, best=keep_best, metric=best_metric, mode=best_mode
        )
        self._storage = open_storage(directory)
        self._pruner = Pruner(self._storage, retention, self._stored_metrics)
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._saves = 0
        self._skipped: list[int] = []
        self.last_save: SaveReport | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        prune: bool = True,
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Start a background save; return as soon as the buffers of the state may be donated.

        Waits for the previous save, so that at most one is in progress.

        Parameters
        ----------
        step
            Step of the checkpoint, 0 or more, larger than all existing ones.
        state
            Pytree of numeric jax.Arrays or NumPy arrays.
        metadata
            JSON-serializable values, returned by `metadata`.
        metrics
            Metrics of this step, which rank the best checkpoints.
        prune
            Whether to delete checkpoints that are not kept after the save. A failed deletion is
            logged and retried after the next save; it does not fail the save.
        before_commit
            Called in the background on process 0 after all files are on disk and before the
            rename, to flush records that must not be older than the checkpoint. If it raises, the
            save fails.

        Raises
        ------
        SaveError
            If the previous save failed or the directory cannot be written.
        DirectoryInUseError
            If another process saves into this directory.
        ValueError
            If the step is not larger than all existing ones, a leaf is not a numeric array, or
            the metadata is not JSON-serializable.
        """
        self.wait()
        begin = time.perf_counter()
        leaves = flatten(state)
        specs = describe(leaves)
        plain = manifest_file.plain_json(metadata or {})
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if not self._skipped:
            self._check_step(step)
        try:
            self._take_lock()
        except ClaimError as error:
            raise SaveError(step, error) from error
        self._check_step(step)
        pending = PendingCheckpoint(step, specs, (), plain, values, before_commit)
        if self._saves == 0:
            self._check_format()
        write = self._stage(state, pending)
        self._saves += 1
        blocking = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._finish, args=(write, pending, begin, blocking, prune), name=f"save-{step}"
        )
        self._thread.start()

    def claim(self) -> None:
        """Create and lock the directory now instead of at the first save.

        Raises
        ------
        DirectoryInUseError
            If another process saves into this directory.
        ClaimError, StorageError
            If the directory cannot be created, locked or written.
        """
        self._take_lock()

    def check(self) -> None:
        """Raise the error of a finished background save; never blocks.

        Raises
        ------
        SaveError
            If the save failed. The next method called raises it, once.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Block until the save in progress is durable.

        Raises
        ------
        SaveError
            If the save failed. The next method called raises it, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        partial: bool = False,
        cast: bool = False,
    ) -> Any:
        """Read and verify a saved state, with the shardings of ``abstract_state``.

        Parameters
        ----------
        abstract_state
            Pytree of jax.ShapeDtypeStructs (or jax.Arrays) with the shapes and dtypes of the saved
            state, and shardings for any mesh and any number of devices and processes. A leaf
            without sharding is placed on the default device; for a NumPy array a NumPy array is
            returned.
        step
            Step to restore; None: the newest intact one, with a warning for each newer damaged
            one. Damaged ones are renamed to ``N.corrupt`` if this object has locked the directory,
            otherwise by the next `save` or `claim`. Nothing is renamed if all are damaged.
        partial
            Whether `abstract_state` may be a part of the saved state: ``{"params": ...}`` reads
            only the parameters.
        cast
            Whether to convert floating-point leaves that were saved in another dtype.

        Returns
        -------
        pytree
            The state, structured like `abstract_state`.

        Raises
        ------
        NoCheckpointError
            If there is no checkpoint, or none of this step.
        CorruptCheckpointError
            If the requested step is damaged; lists the bad files.
        AllCheckpointsCorruptError
            If ``step`` is None and every checkpoint is damaged.
        MismatchError
            If keys, shapes or dtypes differ; lists the first 100 differences and their number.
        UnreadableError
            If a checkpoint cannot be read after several attempts. Nothing is renamed.
        """
        self.wait()
        abstract = flatten(abstract_state)
        wanted = describe(abstract)

        def check(step: int, saved: Mapping[str, LeafSpec]) -> None:
            lines = differences(wanted, saved, partial=partial, cast=cast)
            if lines:
                header = f"checkpoint of step {step} does not fit the requested state:"
                rest = len(lines) - MAX_DIFFERENCES
                more = [f"... and {rest:,} more differences"] if rest > 0 else []
                raise MismatchError("\n".join([header, *lines[:MAX_DIFFERENCES], *more]))

        def read(step: int) -> dict[str, Any]:
            return self._read(step, abstract, check)

        if step is None:
            leaves, self._skipped = read_newest(self._storage, read)
        else:
            leaves = read_step(self._storage, step, read)
        structure = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(structure, [leaves[key] for key in abstract])

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        return self._storage.steps()

    def latest_step(self) -> int | None:
        """Return the largest step with a complete, possibly damaged, checkpoint, or None."""
        return max(self.steps(), default=None)

    def verify(self, step: int) -> list[str]:
        """Read every byte of a checkpoint; return a line for each bad file.

        Parameters
        ----------
        step
            Step of the checkpoint.

        Returns
        -------
        list of str
            The lines; empty if the checkpoint is intact.

        Raises
        ------
        NoCheckpointError
            If the step has no checkpoint.
        """
        require(self._storage, step)
        return problems(self._storage, step)

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint.

        Parameters
        ----------
        step
            Step of the checkpoint.

        Returns
        -------
        dict
            The argument `metadata` of `save`.

        Raises
        ------
        NoCheckpointError
            If the step has no checkpoint.
        CorruptCheckpointError
            If its manifest is damaged.
        """
        return self.manifest(step).metadata

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of a checkpoint; raises like `metadata`.

        Parameters
        ----------
        step
            Step of the checkpoint.

        Returns
        -------
        dict
            The argument `metrics` of `save`.
        """
        return self.manifest(step).metrics

    def manifest(self, step: int) -> manifest_file.Manifest:
        """Return the manifest of a checkpoint; raises like `metadata`.

        Parameters
        ----------
        step
            Step of the checkpoint.

        Returns
        -------
        Manifest
            Shape, dtype and pieces of each leaf, checksums and versions.
        """
        return require_manifest(self._storage, step)

    def prune(self) -> None:
        """Delete checkpoints that are not kept, such as after resuming with a smaller ``keep``.

        Failed deletions are logged and retried after the next save.

        Raises
        ------
        SaveError
            If the save in progress failed.
        DirectoryInUseError
            If another process saves into this directory.
        ClaimError, StorageError
            If the directory cannot be locked.
        """
        self.wait()
        self._take_lock()
        self._prune()

    def discard_after(self, step: int) -> list[int]:
        """Delete the checkpoints of larger steps, before a run repeats them.

        Parameters
        ----------
        step
            The largest step to keep.

        Returns
        -------
        list of int
            The deleted steps, ascending.

        Raises
        ------
        SaveError
            If the save in progress failed.
        DirectoryInUseError
            If another process saves into this directory.
        """
        self.wait()
        self._take_lock()
        later = [other for other in self.steps() if other > step]
        if multihost.is_main():
            for other in reversed(later):  # if killed, the remaining steps have no gap
                self._pruner.discard(other)
        self._saves += 1
        multihost.barrier(f"discarded {self._saves}")
        return later

    def close(self) -> None:
        """Wait for the save in progress and release the lock of the directory.

        Raises
        ------
        SaveError
            If the save failed.
        """
        try:
            self.wait()
        finally:
            self._storage.lock.release()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_step(self, step: int) -> None:
        latest = self.latest_step()
        if step < 0:
            raise ValueError(f"step: got {step}; expected 0 or more")
        if latest is not None and step <= latest:
            raise ValueError(
                f"step: got {step}; expected more than {latest}, the newest in {self._storage}; "
                "save a larger step, or use another directory to branch from an older checkpoint"
            )

    def _check_format(self) -> None:
        latest = self.latest_step()
        if latest is not None and manifest_file.is_orbax(self._storage, latest):
            raise ValueError(
                f"format: got 'tjx', and {self._storage} holds checkpoints of Orbax; expected "
                "another directory; use another one, or format='orbax'"
            )

    def _take_lock(self) -> None:
        """Lock the directory, or confirm the lock; raises as `claim`."""
        skipped, self._skipped = self._skipped, []
        take_lock(self._storage, skipped)

    def _stage(self, state: Any, pending: PendingCheckpoint) -> Callable[[], int]:
        """Copy a state to host memory; return the function that writes it and returns its size."""
        pending = pending._replace(pieces=stage(flatten(state)))
        return lambda: write_checkpoint(
            self._storage, pending, name=f"{self._saves} {pending.step}"
        )

    def _read(
        self,
        step: int,
        abstract: Mapping[str, Any],
        check: Callable[[int, Mapping[str, LeafSpec]], None],
    ) -> dict[str, Any]:
        """Read the leaves of a step; `check` raises if they do not fit the requested ones."""
        content = manifest_file.read(self._storage, step)
        check(step, content.leaves)
        with CheckpointReader(self._storage, step, content) as reader:
            return restore_leaves(reader, abstract)

    def _stored_metrics(self, step: int) -> Mapping[str, float]:
        """Return the metrics of a checkpoint; none if it is damaged."""
        try:
            return manifest_file.read(self._storage, step).metrics
        except manifest_file.ManifestError:
            return {}  # it can be one of the newest, not one of the best

    def _finish(
        self,
        write: Callable[[], int],
        pending: PendingCheckpoint,
        begin: float,
        blocking: float,
        prune: bool,
    ) -> None:
        """Write the checkpoint in a thread; keep an error for the next call."""
        step = pending.step
        try:
            size = write()
            self.last_save = SaveReport(step, blocking, time.perf_counter() - begin, size)
            self._pruner.remember(step, pending.metrics)
            if prune:
                self._prune()
        except BaseException as error:
            _log.error("saving step %d failed: %s", step, error)
            self._error = SaveError(step, error)
            self._error.__cause__ = error

    def _prune(self) -> None:
        """Delete checkpoints that are not kept; log failures, which the next save retries."""
        if not multihost.is_main():
            return
        try:
            self._pruner.prune()
        except Exception as error:  # object stores have their own exception classes
            _log.warning(
                "old checkpoints in %s cannot be deleted now: %s: %s; the next save tries again",
                self._storage, type(error).__name__, error,
            )  # fmt: skip
