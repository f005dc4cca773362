"""Save and restore the state of a run: in the background, atomically, verified.

The order of a save is: arrays -> flush to disk -> manifest with checksums -> rename -> prune. A
checkpoint has its number as name only when it is complete, and only its checksums say that it still
is.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax

from tjx_ckpt import multihost
from tjx_ckpt.device_placement import restore_leaves
from tjx_ckpt.errors import (
    ClaimError,
    DirectoryInUseError,
    MismatchError,
    SaveError,
    StorageError,
)
from tjx_ckpt.host_staging import stage
from tjx_ckpt.leaf_spec import differences
from tjx_ckpt.lookup import require, require_manifest
from tjx_ckpt.pruning import Pruner
from tjx_ckpt.pytree import describe, flatten
from tjx_ckpt.restore_fallback import read_newest, read_step, set_aside
from tjx_ckpt.retention import Retention
from tjx_ckpt.save_report import SaveReport
from tjx_ckpt.store import manifest as manifest_file
from tjx_ckpt.store.backends import open_storage
from tjx_ckpt.store.checkpoint_reader import CheckpointReader
from tjx_ckpt.store.verification import problems
from tjx_ckpt.writer import Draft, write_checkpoint

_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run, in one directory.

    Opening and reading change nothing on disk. The first `save` or `claim` takes the lock of the
    directory, deletes what killed saves left and renames damaged checkpoints. With several
    processes all of them call each method, on a directory that all of them see.

    Parameters
    ----------
    directory
        A local or shared folder, or a URL that fsspec knows, such as s3://bucket/run; made by the
        first save.
    keep
        Number of newest checkpoints that stay.
    keep_every
        Checkpoints of steps that are multiples of this stay for good.
    keep_best
        Number of checkpoints that stay for being the best.
    best_metric, best_mode
        Name among the ``metrics`` of a save that decides it; whether "min" or "max" is best.

    Attributes
    ----------
    last_save : SaveReport or None
        What the last save cost that is durable.

    Raises
    ------
    ValueError
        If a number is out of range.

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

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        best_metric: str = "eval/loss",
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        retention = Retention(
            keep=keep, every=keep_every, best=keep_best, metric=best_metric, mode=best_mode
        )
        self._storage = open_storage(directory)
        self._pruner = Pruner(self._storage, retention)
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._saves = 0
        self._passed_over: list[int] = []
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
        """Start to save ``state``; returns as soon as its buffers may be donated.

        Waits for the save before it, so at most one is under way.

        Parameters
        ----------
        step
            The number of this checkpoint, 0 or more, larger than any that is there.
        state
            A pytree of numeric jax.Arrays or NumPy arrays.
        metadata
            Anything that JSON can express; read back with `metadata`.
        metrics
            What was measured at this step; decides which checkpoints are the best.
        prune
            Whether to delete then what need not stay. A deletion that fails is logged and tried
            again after the next save; the save itself counts.
        before_commit
            Called in the background on process 0, when all files are on disk and before the
            checkpoint has its name: to flush records that must not be older than it. An error that
            it raises fails the save.

        Raises
        ------
        SaveError
            If the save before this one failed, or the directory cannot be written.
        DirectoryInUseError
            If another process saves into this directory.
        ValueError
            If the step is not the largest, a leaf is not a numeric array, or metadata not JSON.
        """
        self.wait()
        begin = time.perf_counter()
        leaves = flatten(state)
        specs = describe(leaves)
        plain = manifest_file.plain_json(metadata or {})
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if not self._passed_over:
            self._check_step(step)
        try:
            self._take_lock()
        except ClaimError as error:
            raise SaveError(step, error) from error
        self._check_step(step)
        draft = Draft(step, specs, stage(leaves), plain, values, before_commit)
        self._saves += 1
        blocking = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._finish, args=(draft, begin, blocking, prune), name=f"save-{step}"
        )
        self._thread.start()

    def claim(self) -> None:
        """Take the right to save here now, not only at the first save; makes the directory.

        Raises
        ------
        DirectoryInUseError
            If another process saves into this directory.
        ClaimError, StorageError
            If the directory cannot be made, locked or written.
        """
        self._take_lock()

    def check(self) -> None:
        """Raise what a save in the background met, if it has failed; never waits.

        Raises
        ------
        SaveError
            If it failed. The error is raised once, by whichever method is called next.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is on disk.

        Raises
        ------
        SaveError
            If it failed. The error is raised once, by whichever method is called next.
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
        """Return a saved state, each byte verified, on the shardings of ``abstract_state``.

        Parameters
        ----------
        abstract_state
            A pytree of jax.ShapeDtypeStructs with shardings (jax.Arrays also do), of the shapes and
            dtypes of the saved state: any mesh and any number of devices and processes. A leaf
            without sharding goes to the default device; a NumPy array stands for a NumPy array.
        step
            Which checkpoint; None takes the newest sound one, with a warning for each damaged one
            that is newer. These are renamed to ``N.corrupt`` where this directory was claimed, or
            by the next `save` or `claim`. Without any sound one nothing is renamed.
        partial
            Whether to leave out what was not asked for: ``{"params": ...}`` reads the parameters
            and nothing else.
        cast
            Whether floating-point leaves may be saved in another floating-point type.

        Raises
        ------
        NoCheckpointError
            If there is no checkpoint, or not this step.
        CorruptCheckpointError
            If the step that was asked for is damaged; names each bad file.
        AllCheckpointsCorruptError
            If ``step`` is None and every checkpoint is damaged.
        MismatchError
            If keys, shapes or dtypes differ; names each.
        UnreadableError
            If a checkpoint cannot be read now, after several attempts. Nothing is renamed.
        """
        self.wait()
        abstract = flatten(abstract_state)
        wanted = describe(abstract)

        def read(step: int) -> dict[str, Any]:
            content = manifest_file.read(self._storage, step)
            lines = differences(wanted, content.leaves, partial=partial, cast=cast)
            if lines:
                header = f"checkpoint of step {step} does not fit the state that was asked for:"
                raise MismatchError("\n".join([header, *lines]))
            with CheckpointReader(self._storage, step, content) as reader:
                return restore_leaves(reader, abstract)

        if step is None:
            leaves, self._passed_over = read_newest(self._storage, read)
        else:
            leaves = read_step(self._storage, step, read)
        structure = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(structure, [leaves[key] for key in abstract])

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending."""
        return self._storage.steps()

    def latest_step(self) -> int | None:
        """Return the largest step that has a complete checkpoint, sound or not; None without."""
        return max(self.steps(), default=None)

    def verify(self, step: int) -> list[str]:
        """Read every byte of a checkpoint; return one line for each bad file, none if all is well.

        Raises
        ------
        NoCheckpointError
            If there is no such checkpoint.
        """
        require(self._storage, step)
        return problems(self._storage, step)

    def metadata(self, step: int) -> dict[str, Any]:
        """Return what was given to `save` as metadata.

        Raises
        ------
        NoCheckpointError
            If there is no such checkpoint.
        CorruptCheckpointError
            If its manifest is damaged.
        """
        return self.manifest(step).metadata

    def metrics(self, step: int) -> dict[str, float]:
        """Return what was given to `save` as metrics; raises as `metadata` does."""
        return self.manifest(step).metrics

    def manifest(self, step: int) -> manifest_file.Manifest:
        """Return all that a checkpoint says of itself; raises as `metadata` does."""
        return require_manifest(self._storage, step)

    def prune(self) -> None:
        """Delete now what need not stay; a run that is resumed may keep fewer than it did.

        What cannot be deleted is logged and tried again after the next save.

        Raises
        ------
        SaveError
            If the save under way failed.
        DirectoryInUseError
            If another process saves into this directory.
        ClaimError, StorageError
            If the directory cannot be locked.
        """
        self.wait()
        self._take_lock()
        self._prune()

    def discard_after(self, step: int) -> list[int]:
        """Delete the checkpoints of larger steps: the run goes back and will make them again.

        Returns
        -------
        list of int
            Those that were deleted, ascending.

        Raises
        ------
        SaveError
            If the save under way failed.
        DirectoryInUseError
            If another process saves into this directory.
        """
        self.wait()
        self._take_lock()
        later = [other for other in self.steps() if other > step]
        if multihost.is_main():
            for other in reversed(later):  # a kill leaves the older ones, with no gap
                self._pruner.discard(other)
        self._saves += 1
        multihost.barrier(f"discarded {self._saves}")
        return later

    def close(self) -> None:
        """Wait for the save under way and let other processes save here.

        Raises
        ------
        SaveError
            If that save failed.
        """
        try:
            self.wait()
        finally:
            self._storage.lock.release()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_step(self, step: int) -> None:
        latest = self.latest_step()
        if step < 0:
            raise ValueError(f"step {step}: must be 0 or more")
        if latest is not None and step <= latest:
            raise ValueError(
                f"step {step} cannot be saved: {self._storage} holds step {latest}; save a "
                "larger step, or use another directory to branch off from an older checkpoint"
            )

    def _take_lock(self) -> None:
        """Take the lock, or see that it was not lost; all processes learn what process 0 has.

        What is taken for the first time is tidied: only now nothing else writes there.

        Raises
        ------
        DirectoryInUseError
            If another run has it.
        ClaimError, StorageError
            On process 0, if the directory cannot be made, locked or tidied.
        """
        mine = True
        problem: ClaimError | StorageError | None = None
        if multihost.is_main():
            try:
                self._storage.prepare()
                is_first = not self._storage.lock.held
                mine = self._storage.lock.acquire()
                if mine and is_first:
                    self._tidy()
                if mine:
                    set_aside(self._storage, self._passed_over)
            except OSError as error:
                mine, problem = False, ClaimError(str(self._storage), error)
            except StorageError as error:
                mine, problem = False, error
        self._passed_over = []
        if multihost.all_agree(mine):
            return
        if problem is not None:
            raise problem
        if not multihost.is_main():
            raise DirectoryInUseError(
                f"process 0 may not save into {self._storage}: its log says why"
            )
        raise DirectoryInUseError(
            f"{self._storage.lock.owner()} is saving into {self._storage}: "
            "end it, or use another directory"
        )

    def _tidy(self) -> None:
        """Delete what killed saves left; a leftover that cannot be deleted only takes room."""
        try:
            self._storage.remove_leftovers()
        except OSError as error:
            _log.warning("leftovers in %s cannot be deleted now: %s", self._storage, error)

    def _finish(self, draft: Draft, begin: float, blocking: float, prune: bool) -> None:
        """Bring a save to its end, in a thread; keep its error for the next call."""
        step = draft.step
        try:
            size = write_checkpoint(self._storage, draft, name=f"{self._saves} {step}")
            self.last_save = SaveReport(step, blocking, time.perf_counter() - begin, size)
            self._pruner.remember(step, draft.metrics)
            if prune:
                self._prune()
        except BaseException as error:
            _log.error("saving step %d failed: %s", step, error)
            self._error = SaveError(step, error)
            self._error.__cause__ = error

    def _prune(self) -> None:
        """Delete what need not stay; what cannot be deleted is tried again after the next save."""
        if not multihost.is_main():
            return
        try:
            self._pruner.prune()
        except Exception as error:  # object stores raise their own
            _log.warning(
                "old checkpoints in %s cannot be deleted now: %s: %s; the next save tries again",
                self._storage, type(error).__name__, error,
            )  # fmt: skip
