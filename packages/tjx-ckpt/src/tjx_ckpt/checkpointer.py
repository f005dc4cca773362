"""Save and restore the state of a run: in the background, atomically, verified.

The order of a save is: arrays -> flush to disk -> manifest with checksums -> rename -> prune. A
checkpoint has its number as name only when it is complete, and only its checksums say that it still
is.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax

from tjx_ckpt import processes
from tjx_ckpt.errors import DirectoryInUseError, MismatchError, SaveError
from tjx_ckpt.fallback import read_newest, read_step
from tjx_ckpt.leaf_spec import differences
from tjx_ckpt.lookup import require, require_manifest
from tjx_ckpt.placing import restore_leaves
from tjx_ckpt.pruning import Pruner
from tjx_ckpt.retention import Retention
from tjx_ckpt.save_report import SaveReport
from tjx_ckpt.staging import stage
from tjx_ckpt.store import manifest as manifest_file
from tjx_ckpt.store.opening import open_storage
from tjx_ckpt.store.reader import CheckpointReader
from tjx_ckpt.store.verification import problems
from tjx_ckpt.tree import describe, flatten
from tjx_ckpt.writer import Draft, write_checkpoint

_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run, in one directory.

    Opening it deletes what killed saves left, unless another process is saving there. With several
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
        self.last_save: SaveReport | None = None
        self._clean()

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
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
        self._check_step(step)
        leaves = flatten(state)
        specs = describe(leaves)
        plain = manifest_file.plain_json(metadata or {})
        values = {name: float(value) for name, value in (metrics or {}).items()}
        try:
            self._take_lock()
        except OSError as error:
            raise SaveError(step, error) from error
        draft = Draft(step, specs, stage(leaves), plain, values)
        self._saves += 1
        blocking = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._finish, args=(draft, begin, blocking), name=f"save-{step}"
        )
        self._thread.start()

    def claim(self) -> None:
        """Take the right to save here now, not only at the first save; makes the directory.

        Raises
        ------
        DirectoryInUseError
            If another process saves into this directory.
        OSError
            If the directory cannot be made or written.
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
            Which checkpoint; None takes the newest sound one. Damaged ones that are newer are then
            renamed to ``N.corrupt``, with a warning. Without any sound one nothing is renamed.
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
            leaves = read_newest(self._storage, read)
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
        if processes.is_main():
            for other in reversed(later):  # a kill leaves the older ones, with no gap
                self._pruner.discard(other)
        self._saves += 1
        processes.barrier(f"discarded {self._saves}")
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

        Raises
        ------
        DirectoryInUseError
            If another run has it.
        OSError
            On process 0, if the directory cannot be made or written.
        """
        mine, problem = True, None
        if processes.is_main():
            try:
                self._storage.prepare()
                mine = self._storage.lock.acquire()
            except OSError as error:
                mine, problem = False, error
        if processes.all_agree(mine):
            return
        if problem is not None:
            raise problem
        if not processes.is_main():
            raise DirectoryInUseError(
                f"process 0 may not save into {self._storage}: its log says why"
            )
        raise DirectoryInUseError(
            f"{self._storage.lock.owner()} is saving into {self._storage}: "
            "end it, or use another directory"
        )

    def _clean(self) -> None:
        if not (processes.is_main() and self._storage.leftovers()):
            return
        # Who may only read needs no tidy directory; who saves will meet the same error again.
        with contextlib.suppress(PermissionError):
            # Held by another process, the lock says that the temporary folder is alive.
            if self._storage.lock.acquire():
                self._storage.remove_leftovers()
        self._storage.lock.release()

    def _finish(self, draft: Draft, begin: float, blocking: float) -> None:
        """Bring a save to its end, in a thread; keep its error for the next call."""
        step = draft.step
        try:
            size = write_checkpoint(self._storage, draft, name=f"{self._saves} {step}")
            self.last_save = SaveReport(step, blocking, time.perf_counter() - begin, size)
            if processes.is_main():
                self._pruner.prune(step, draft.metrics)
        except BaseException as error:
            _log.error("saving step %d failed: %s", step, error)
            self._error = SaveError(step, error)
            self._error.__cause__ = error
