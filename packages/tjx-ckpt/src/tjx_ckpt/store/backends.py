"""From the name of a directory to its storage."""

from pathlib import Path

from tjx_ckpt.store.local_folder import LocalFolder
from tjx_ckpt.store.storage import Storage


def open_storage(directory: str | Path) -> Storage:
    """Return the storage of a directory: local, or remote where it is a URL such as s3://b/run."""
    if is_remote(directory):
        # Only who uses it needs it and the extra that brings it.
        from tjx_ckpt.store.remote_folder import RemoteFolder

        return RemoteFolder(str(directory))
    return LocalFolder(Path(directory).absolute())


def is_remote(directory: str | Path) -> bool:
    """Tell whether a directory is a URL."""
    return "://" in str(directory)


def find_writer(directory: str | Path) -> str | None:
    """Return who saves into a local directory now, as "process 123 on host"; None if nobody does.

    Of an object store only watching could tell, which takes too long: None.
    """
    return None if is_remote(directory) else open_storage(directory).lock.holder()


def list_steps(directory: str | Path) -> list[int]:
    """Return the steps that have a complete checkpoint in a directory, ascending by number."""
    return open_storage(directory).steps()
