"""Selection of the storage backend of a directory or URL."""

from pathlib import Path

from tjx_ckpt.store.local_folder import LocalFolder
from tjx_ckpt.store.storage import Storage


def open_storage(directory: str | Path) -> Storage:
    """Return the storage of a local directory or of a URL such as s3://bucket/run."""
    if is_remote(directory):
        # Imported here, since it requires an extra.
        from tjx_ckpt.store.remote_folder import RemoteFolder

        return RemoteFolder(str(directory))
    return LocalFolder(Path(directory).absolute())


def is_remote(directory: str | Path) -> bool:
    """Return whether a directory is a URL."""
    return "://" in str(directory)


def find_writer(directory: str | Path) -> str | None:
    """Return the process that saves into a local directory, as "process 123 on host", or None.

    None for object stores, where only watching the lease for two periods could tell.

    Parameters
    ----------
    directory
        Checkpoint directory, or its URL.

    Returns
    -------
    str or None
        Name of the process that holds the lock.
    """
    return None if is_remote(directory) else open_storage(directory).lock.holder()


def list_steps(directory: str | Path) -> list[int]:
    """Return the steps of a directory that have a complete checkpoint, ascending.

    Parameters
    ----------
    directory
        Checkpoint directory, or its URL.

    Returns
    -------
    list of int
        The steps.
    """
    return open_storage(directory).steps()
