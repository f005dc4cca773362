"""Checkpoints in an object store that fsspec reaches (s3://, gs://, ...).

Nothing can be renamed there, and only one object at a time is written atomically. So the last
object decides::

    12/*.safetensors   uploaded first
    12/manifest.json   makes 12 a checkpoint; without it 12/ is what a killed save left
    12/committed       says that 12 was one, should its manifest get lost
    12.corrupt/        copy of a damaged checkpoint, complete when it has these
    .writer            the lease of who saves here

What is deleted loses ``committed`` and the manifest first, and so is no checkpoint from then on.
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
# S3 takes 10,000 parts: files of up to 640 GB.
_PART_BYTES = 64 << 20
_REQUESTS = 8


class RemoteFolder:
    """A place for checkpoints in an object store; implements `tjx_ckpt.store.storage.Storage`.

    Credentials, region and endpoint are the backend's own matter: its environment variables and
    files, such as AWS_PROFILE.

    Parameters
    ----------
    url
        Such as s3://bucket/run; the bucket must be there.
    lease_period_s
        See `tjx_ckpt.store.lease.Lease`.

    Raises
    ------
    ImportError
        If fsspec or its backend for this kind of URL is not installed.
    ValueError
        If the URL is of a kind that fsspec does not know, or of no object store.
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
        """Return the steps that have a complete checkpoint, ascending by number."""
        folders = self._folders().items()
        return sorted(int(name) for name, files in folders if name.isdigit() and _is_whole(files))

    def quarantined(self) -> list[str]:
        """Return the names of the damaged checkpoints that were set aside."""
        folders = self._folders().items()
        return sorted(name for name, files in folders if ".corrupt" in name and _is_whole(files))

    def leftovers(self) -> list[str]:
        """Return what killed saves and deletions left, and a save that is under way."""
        return sorted(name for name, files in self._folders().items() if not _is_whole(files))

    def remove_leftovers(self) -> None:
        """Delete what `leftovers` tells."""
        for name in self.leftovers():
            self._delete(name)

    def prepare(self) -> None:
        """Do nothing: object stores have no directories."""

    def begin(self, step: int) -> None:
        """Delete what lies where a new checkpoint is to be."""
        self.abandon(step)

    @contextlib.contextmanager
    def create(self, step: int, name: str) -> Iterator[FileWriter]:
        """Open a new file of a begun checkpoint; in the store when the context ends.

        It is sent in parts while it is written. The manifest is held back until `commit`.
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
        """Return a file of a begun checkpoint."""
        return bytes(self._store.cat_file(self._path(str(step), name)))

    def remove_new(self, step: int, name: str) -> None:
        """Delete a file of a begun checkpoint."""
        self._store.rm_file(self._path(str(step), name))

    def commit(self, step: int) -> None:
        """Upload the manifest of a checkpoint, which makes it one.

        Raises
        ------
        DirectoryInUseError
            If the lease was lost while the files were uploaded.
        """
        self.lock.confirm()
        self._put(str(step), MANIFEST_NAME, self._manifests.pop(step))
        self._put(str(step), _COMMITTED, b"committed\n")

    def abandon(self, step: int) -> None:
        """Delete a begun checkpoint."""
        self._delete(str(step))

    def discard(self, step: int) -> None:
        """Delete a checkpoint so that a crash never leaves half of it as one."""
        self._delete(str(step))

    def quarantine(self, step: int) -> str:
        """Move a damaged checkpoint to ``N.corrupt`` (``N.corrupt.2``, ... if that is taken)."""
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
        """Tell whether a step is there, sound or not."""
        return _is_whole(self._files(str(step)))

    @contextlib.contextmanager
    def open(self, step: int, name: str) -> Iterator[FileReader]:
        """Open a file of a checkpoint; it is read by ranges."""
        path = self._path(str(step), name)
        with _asking(self._url):
            size = int(self._store.info(path)["size"])
        yield _RemoteReader(self._store, path, size)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _files(self, folder: str) -> set[str]:
        return self._folders(folder).get(folder, set())

    def _folders(self, only: str | None = None) -> dict[str, set[str]]:
        """Return the files in each folder that is of a checkpoint; of all or of one folder."""
        place = self._root if only is None else self._path(only)
        with _asking(self._url):
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
            raise OSError(f"{path}: {size} bytes were sent, the store has {stored}")


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
        with _asking(self._path):
            data = self._store.cat_file(self._path, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise WrongFileError(f"ends at byte {offset + len(data)}")
        buffer[:] = data


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    protocol = url.partition("://")[0]
    if protocol in ("file", "local") or "::" in url:
        raise ValueError(
            f"directory = {url!r}: must be a folder's path, or the URL of an object store such as "
            "s3://bucket/run; give a local folder without file://"
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
            f"directory = {url!r}: {protocol}:// is unknown; use one of "
            "s3://, gs://, az:// or another that fsspec knows"
        )
    try:
        # What another process writes must be seen at once.
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
    """Make a request for each name, several at a time; all of them are done at the end."""
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="object-store") as pool:
        for _ in pool.map(request, sorted(names)):
            pass


def _cancel(file: Any) -> None:
    """Drop an upload. Closing the file would finish it, and so does its end of life."""
    from fsspec.spec import AbstractBufferedFile

    if isinstance(file, AbstractBufferedFile):
        with contextlib.suppress(Exception):  # a second error would only hide the first
            file.discard()
        file.closed = True


@contextlib.contextmanager
def _asking(place: str) -> Iterator[None]:
    """Keep a store that does not answer apart from a checkpoint that is damaged.

    Raises
    ------
    FileNotFoundError
        Unchanged: the store did answer.
    UnreadableError
        For all else.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UnreadableError(place, error) from error
