"""Checkpoints in an object store (s3://, gs://, ...), through fsspec.

Object stores have no renames and write only single objects atomically, so the last object of a
checkpoint marks it as complete::

    12/*.safetensors   uploaded first
    12/manifest.json   marks 12 as a checkpoint; without it 12/ is the leftover of a killed save
    12/committed       marks 12 as a checkpoint even if its manifest is lost
    12.corrupt/        copy of a damaged checkpoint; complete with the same marks
    .writer            lease of the process that saves here

A deletion removes ``committed`` and the manifest first.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tjx_ckpt.errors import UnreadableError
from tjx_ckpt.store.lease import Lease
from tjx_ckpt.store.manifest import MANIFEST_NAME
from tjx_ckpt.store.storage import FileReader, FileWriter, WrongFileError

_COMMITTED = "committed"
_FOLDER = re.compile(r"(?:0|[1-9][0-9]*)(\.corrupt(?:\.[0-9]+)?)?")
# S3 accepts 10,000 parts per file, so files of up to 640 GB.
_PART_BYTES = 64 << 20
_REQUESTS = 8


class RemoteFolder:
    """A prefix with checkpoints in an object store; implements `tjx_ckpt.store.storage.Storage`.

    Credentials, region and endpoint come from the backend's environment variables and files, such
    as AWS_PROFILE.

    Parameters
    ----------
    url
        URL such as s3://bucket/run; the bucket must exist.
    lease_period_s
        See `tjx_ckpt.store.lease.Lease`.

    Raises
    ------
    ImportError
        If fsspec or its backend for this kind of URL is not installed.
    ValueError
        If fsspec does not know the protocol or it is not that of an object store.
    """

    def __init__(self, url: str, *, lease_period_s: float = 10.0) -> None:
        self._url = url
        self._store, root = _connect(url)
        self._root = root.rstrip("/")
        self._manifests: dict[int, bytes] = {}
        self.lock = Lease(self._store, self._path(".writer"), period_s=lease_period_s)

    def __str__(self) -> str:
        return self._url

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        folders = self._folders().items()
        return sorted(int(name) for name, files in folders if name.isdigit() and _is_whole(files))

    def quarantined(self) -> list[str]:
        """Return the names of damaged checkpoints that were renamed."""
        folders = self._folders().items()
        return sorted(name for name, files in folders if ".corrupt" in name and _is_whole(files))

    def leftovers(self) -> list[str]:
        """Return leftovers of killed saves and deletions, and a save in progress."""
        return sorted(name for name, files in self._folders().items() if not _is_whole(files))

    def remove_leftovers(self) -> None:
        """Delete everything that `leftovers` returns."""
        for name in self.leftovers():
            self._delete(name)

    def prepare(self) -> None:
        """Do nothing: object stores have no directories."""

    def begin(self, step: int) -> None:
        """Delete objects at the prefix of a new checkpoint."""
        self.abandon(step)

    @contextlib.contextmanager
    def create(self, step: int, name: str) -> Iterator[FileWriter]:
        """Open a new file of an unfinished checkpoint; uploaded when the context ends.

        Parts are uploaded while the file is written. The manifest is kept until `commit`.
        """
        if name == MANIFEST_NAME:
            text = bytearray()
            yield text.extend
            self._manifests[step] = bytes(text)
            return
        path = self._path(str(step), name)
        file = self._store.open(path, "wb", block_size=_PART_BYTES)
        writer = _RemoteWriter(file)
        try:
            yield writer
            file.close()
        except BaseException:
            _cancel(file)
            raise
        self._check_size(path, writer.size)

    def read_new(self, step: int, name: str) -> bytes:
        """Return the content of a file of an unfinished checkpoint."""
        return bytes(self._store.cat_file(self._path(str(step), name)))

    def remove_new(self, step: int, name: str) -> None:
        """Delete a file of an unfinished checkpoint."""
        self._store.rm_file(self._path(str(step), name))

    def commit(self, step: int) -> None:
        """Upload the manifest, which marks the checkpoint as complete.

        Raises
        ------
        DirectoryInUseError
            If the lease was lost while the files were uploaded.
        """
        self.lock.confirm()
        self._put(str(step), MANIFEST_NAME, self._manifests.pop(step))
        self._put(str(step), _COMMITTED, b"committed\n")

    def abandon(self, step: int) -> None:
        """Delete an unfinished checkpoint."""
        self._delete(str(step))

    def discard(self, step: int) -> None:
        """Delete a checkpoint; a crash never leaves a part of it marked as complete."""
        self._delete(str(step))

    def quarantine(self, step: int) -> str:
        """Move a damaged checkpoint to ``N.corrupt`` (``N.corrupt.2``, ... if that exists)."""
        folders = self._folders()
        name = target = f"{step}.corrupt"
        number = 2
        while target in folders:
            target = f"{name}.{number}"
            number += 1
        files = folders[str(step)] - {_COMMITTED}

        def copy(file: str) -> None:
            self._store.cp_file(self._path(str(step), file), self._path(target, file))

        _each(copy, files - {MANIFEST_NAME})
        _each(copy, files & {MANIFEST_NAME})
        self._put(target, _COMMITTED, b"damaged\n")
        self._delete(str(step))
        return target

    def exists(self, step: int) -> bool:
        """Return whether a step has a checkpoint, intact or damaged."""
        return _is_whole(self._files(str(step)))

    @contextlib.contextmanager
    def open(self, step: int, name: str) -> Iterator[FileReader]:
        """Open a file of a checkpoint for reads of byte ranges."""
        path = self._path(str(step), name)
        with _store_errors(self._url):
            size = int(self._store.info(path)["size"])
        yield _RemoteReader(self._store, path, size)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _files(self, folder: str) -> set[str]:
        return self._folders(folder).get(folder, set())

    def _folders(self, only: str | None = None) -> dict[str, set[str]]:
        """Return the files of all checkpoint folders, or of one."""
        place = self._root if only is None else self._path(only)
        with _store_errors(self._url):
            self._store.invalidate_cache()
            try:
                paths = self._store.find(place)
            except FileNotFoundError:
                paths = []
        found: dict[str, set[str]] = {}
        for path in paths:
            folder, slash, name = path.removeprefix(f"{self._root}/").partition("/")
            if slash and _FOLDER.fullmatch(folder):
                found.setdefault(folder, set()).add(name)
        return found

    def _delete(self, folder: str) -> None:
        files = self._files(folder)
        for names in (
            files & {_COMMITTED},
            files & {MANIFEST_NAME},
            files - {_COMMITTED, MANIFEST_NAME},
        ):
            _each(lambda name: self._store.rm_file(self._path(folder, name)), names)

    def _put(self, folder: str, name: str, content: bytes) -> None:
        path = self._path(folder, name)
        self._store.pipe_file(path, content)
        self._check_size(path, len(content))

    def _check_size(self, path: str, size: int) -> None:
        stored = self._store.info(path)["size"]
        if stored != size:
            raise OSError(f"{path}: uploaded {size} bytes, the store has {stored}")


class _RemoteWriter:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = 0

    def __call__(self, data: Any, /) -> None:
        self._file.write(data)
        self.size += len(data)


class _RemoteReader:
    def __init__(self, store: Any, path: str, size: int) -> None:
        self._store, self._path = store, path
        self.size = size

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        if not buffer:
            return
        with _store_errors(self._path):
            data = self._store.cat_file(self._path, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise WrongFileError(f"ends at byte {offset + len(data)}")
        buffer[:] = data


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    protocol = url.partition("://")[0]
    if protocol in ("file", "local") or "::" in url:
        raise ValueError(
            f"directory: got {url!r}; expected a path, or the URL of an object store such as "
            "s3://bucket/run; write a local folder without file://"
        )
    try:
        import fsspec
    except ImportError:
        raise ImportError(
            f"{url}: object stores need fsspec; run: pip install 'tjx-ckpt[remote]', and the "
            "backend (s3:// needs s3fs, gs:// needs gcsfs)"
        ) from None
    if protocol not in fsspec.available_protocols():
        raise ValueError(
            f"directory: got {url!r}; expected a protocol that fsspec knows, such as s3://, gs:// "
            f"or az://, not {protocol}://"
        )
    try:
        # Without a cache, so that writes of other processes are visible.
        store, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        backend = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        package = backend.get(protocol, "fsspec's backend for it")
        raise ImportError(
            f"{url}: {protocol}:// needs {package}, which cannot be imported ({error}); "
            f"run: pip install 'tjx-ckpt[remote]' {package}"
        ) from None
    return store, path


def _is_whole(files: set[str]) -> bool:
    return not files.isdisjoint({MANIFEST_NAME, _COMMITTED})


def _each(request: Callable[[str], None], names: Iterable[str]) -> None:
    """Make a request for each name in parallel and wait for all."""
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="object-store") as pool:
        for _ in pool.map(request, sorted(names)):
            pass


def _cancel(file: Any) -> None:
    """Abort an upload, which closing or finalizing the file would complete."""
    from fsspec.spec import AbstractBufferedFile

    if isinstance(file, AbstractBufferedFile):
        with contextlib.suppress(Exception):  # a second error would hide the first
            file.discard()
        file.closed = True


@contextlib.contextmanager
def _store_errors(place: str) -> Iterator[None]:
    """Convert errors of a store that does not respond, as distinct from damaged checkpoints.

    Raises
    ------
    FileNotFoundError
        Unchanged, since the store responded.
    UnreadableError
        Instead of all other errors.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UnreadableError(place, error) from error
