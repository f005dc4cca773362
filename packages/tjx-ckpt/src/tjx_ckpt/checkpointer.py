"""Save and restore the state of a run: in the background, atomically, verified.

The order of a save is: arrays -> flush to disk -> manifest with checksums -> rename -> prune. A
checkpoint has its number as name only when it is complete, and only its checksums say that it still
is. Orbax moves the arrays between devices and files; everything that makes them safe is here.
"""

import contextlib
import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tjx_ckpt import array_store, folder, manifest
from tjx_ckpt.errors import (
    AllCheckpointsCorruptError,
    CheckpointError,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
    DirectoryInUseError,
    MismatchError,
    NoCheckpointError,
    SaveError,
)
from tjx_ckpt.lock import WriterLock
from tjx_ckpt.tree import LeafSpec, describe, differences, flatten

_ARRAYS = "arrays"
_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run, in one directory.

    Opening it deletes what killed saves left, unless another process is saving there. With several
    processes all of them call each method, on a directory that all of them see.

    Parameters
    ----------
    directory
        A local or shared folder; made by the first save.
    keep
        Number of newest checkpoints that stay.

    Raises
    ------
    ValueError
        If ``keep`` is less than 1.

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

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least 1 checkpoint must stay")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._lock = WriterLock(self._directory)
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._clean()

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
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

        Raises
        ------
        SaveError
            If the save before this one failed.
        DirectoryInUseError
            If another process saves into this directory.
        ValueError
            If the step is not the largest, a leaf is not a numeric array, or metadata not JSON.
        """
        self.wait()
        self._check_step(step)
        leaves = flatten(state)
        specs = describe(leaves)
        plain = manifest.plain_json(metadata or {})
        temporary = folder.temporary_path(self._directory, step)
        if _is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if temporary.exists():
                shutil.rmtree(temporary)
        finish_arrays = array_store.start_writing(temporary / _ARRAYS, leaves)
        self._thread = threading.Thread(
            target=self._finish, args=(step, finish_arrays, specs, plain), name=f"save-{step}"
        )
        self._thread.start()

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

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """Return a saved state, verified, on the shardings of ``abstract_state``.

        Parameters
        ----------
        abstract_state
            A pytree of jax.ShapeDtypeStructs with shardings (jax.Arrays also do), of the shapes and
            dtypes of the saved state. A leaf without sharding goes to the default device; a NumPy
            array stands for a NumPy array.
        step
            Which checkpoint; None takes the newest sound one. Damaged ones that are newer are then
            renamed to ``N.corrupt``, with a warning. Without any sound one nothing is renamed.

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
        abstract_leaves = flatten(abstract_state)
        wanted = describe(abstract_leaves)
        chosen = _agree(lambda: self._newest_sound() if step is None else self._sound(step))
        path = folder.step_path(self._directory, chosen)
        problems = differences(wanted, self._manifest(chosen).leaves)
        if problems:
            header = f"checkpoint of step {chosen} does not fit the state that was asked for:"
            raise MismatchError("\n".join([header, *problems]))
        leaves = array_store.read(path / _ARRAYS, abstract_leaves)
        structure = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(structure, [leaves[key] for key in abstract_leaves])

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending."""
        return folder.list_steps(self._directory)

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
        self._check_exists(step)
        return manifest.problems(folder.step_path(self._directory, step), step)

    def metadata(self, step: int) -> dict[str, Any]:
        """Return what was given to `save` as metadata.

        Raises
        ------
        NoCheckpointError
            If there is no such checkpoint.
        CorruptCheckpointError
            If its manifest is damaged.
        """
        return self._manifest(step).metadata

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
            self._lock.release()

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
                f"step {step} cannot be saved: {self._directory} holds step {latest}; save a "
                "larger step, or use another directory to branch off from an older checkpoint"
            )

    def _check_exists(self, step: int) -> None:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise NoCheckpointError(f"no checkpoint of step {step} in {self._directory} ({have})")

    def _take_lock(self) -> None:
        if not self._lock.acquire():
            raise DirectoryInUseError(
                f"{self._lock.owner()} is saving into {self._directory}: "
                "end it, or use another directory"
            )

    def _clean(self) -> None:
        if not (_is_main() and folder.list_leftovers(self._directory)):
            return
        # Who may only read needs no tidy directory; who saves will meet the same error again.
        with contextlib.suppress(PermissionError):
            # Held by another process, the lock says that the temporary folder is alive.
            if self._lock.acquire():
                folder.remove_leftovers(self._directory)
        self._lock.release()

    def _finish(
        self,
        step: int,
        finish_arrays: Callable[[], None],
        specs: dict[str, LeafSpec],
        metadata: dict[str, Any],
    ) -> None:
        """Bring a save to its end, in a thread; keep its error for the next call."""
        try:
            finish_arrays()
            try:
                if _is_main():
                    self._commit(step, specs, metadata)
            finally:
                array_store.barrier(f"commit-{step}")
            if step not in self.steps():
                raise FileNotFoundError("process 0 did not commit it; its log says why")
        except BaseException as error:
            _log.error("saving step %d failed: %s", step, error)
            self._error = SaveError(step, error)
            self._error.__cause__ = error
            if _is_main():
                # Free the space; a second error here would only hide the first.
                shutil.rmtree(folder.temporary_path(self._directory, step), ignore_errors=True)

    def _commit(self, step: int, specs: dict[str, LeafSpec], metadata: dict[str, Any]) -> None:
        temporary = folder.temporary_path(self._directory, step)
        folder.fsync_tree(temporary)
        files = manifest.describe_files(temporary)
        content = manifest.Manifest(step=step, metadata=metadata, leaves=specs, files=files)
        manifest.write(temporary, content)
        folder.commit(self._directory, step)
        for old in self.steps()[: -self._keep]:
            folder.discard(self._directory, old)

    def _manifest(self, step: int) -> manifest.Manifest:
        self._check_exists(step)
        try:
            return manifest.read(folder.step_path(self._directory, step))
        except manifest.ManifestError as error:
            raise CorruptCheckpointError(step, [f"{manifest.MANIFEST_NAME}: {error}"]) from None

    def _sound(self, step: int) -> int:
        problems = self.verify(step)
        if problems:
            raise CorruptCheckpointError(step, problems)
        return step

    def _newest_sound(self) -> int:
        damaged: dict[int, list[str]] = {}
        for step in reversed(self.steps()):
            problems = manifest.problems(folder.step_path(self._directory, step), step)
            if not problems:
                self._quarantine(damaged, used=step)
                return step
            # A run that saves there at this moment may have pruned the step while it was read.
            if folder.step_path(self._directory, step).exists():
                damaged[step] = problems
        quarantined = folder.list_quarantined(self._directory)
        if damaged or quarantined:
            message = f"every checkpoint in {self._directory} is damaged"
            if quarantined:
                message += f" ({', '.join(quarantined)} were set aside before)"
            message += ": repair one, or use another directory to start anew"
            raise AllCheckpointsCorruptError(message, damaged)
        raise NoCheckpointError(f"no checkpoint in {self._directory}")

    def _quarantine(self, damaged: Mapping[int, list[str]], *, used: int) -> None:
        if not damaged:
            return
        was_held = self._lock.held
        may_rename = self._lock.acquire()
        for step, problems in damaged.items():
            where = ""
            if may_rename:
                where = f"; it is now {folder.quarantine(self._directory, step).name}"
            warnings.warn(
                f"checkpoint of step {step} is damaged ({'; '.join(problems)}){where}; "
                f"step {used} is used instead",
                CorruptCheckpointWarning,
                stacklevel=2,
            )
        if not was_held:
            self._lock.release()


def _is_main() -> bool:
    return jax.process_index() == 0


def _agree(decide: Callable[[], int]) -> int:
    """Let process 0 decide on a step and tell the others, so that all restore the same."""
    if jax.process_count() == 1:
        return decide()
    step, error = -1, None
    if _is_main():
        try:
            step = decide()
        except CheckpointError as problem:
            error = problem
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if error is not None:
        raise error
    if step < 0:
        raise CheckpointError("process 0 found no sound checkpoint; its log says why")
    return step
