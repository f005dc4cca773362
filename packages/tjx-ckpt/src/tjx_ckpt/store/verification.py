"""Verification of checkpoint files against the checksums of the manifest."""

from collections.abc import Callable

from tjx_ckpt.store.checksum import checksum, checksum_of_range
from tjx_ckpt.store.manifest import MANIFEST_NAME, ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import FileReader, Storage, WrongFileError
from tjx_ckpt.store.tensor_file import TensorFile


class DamagedError(Exception):
    """A file differs from its manifest entry; the message has its name and the reason."""


def problems(
    storage: Storage, step: int, *, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Verify every byte of a checkpoint in constant memory.

    Parameters
    ----------
    storage, step
        The directory and the step.
    progress
        Called with the number of bytes read since the last call.

    Returns
    -------
    list of str
        A line for each bad file with the affected arrays; empty if the checkpoint is intact.

    Raises
    ------
    UnreadableError
        If a file cannot be read now; it can be intact.
    """
    try:
        manifest = read_manifest(storage, step)
    except ManifestError as error:
        return [f"{MANIFEST_NAME}: {error}"]
    lines = []
    for name, expected in sorted(manifest.files.items()):
        try:
            with storage.open(step, name) as file:
                check_header(name, file, expected)
                _check_pieces(name, file, expected, progress)
        except (FileNotFoundError, WrongFileError) as error:
            lines.append(describe_error(name, error))
        except DamagedError as error:
            lines.append(str(error))
    return lines


def check_header(name: str, file: FileReader, expected: TensorFile) -> None:
    """Verify the size and the header of a file.

    Raises
    ------
    DamagedError
        If they differ from the manifest.
    """
    if file.size != expected.size:
        raise DamagedError(f"{name}: has {file.size} bytes, expected {expected.size}")
    header = bytearray(expected.header_size)
    file.read_into(0, memoryview(header))
    if checksum(header) != expected.header_xxh3_128:
        raise DamagedError(f"{name}: the checksum of the header differs")


def describe_error(name: str, error: OSError) -> str:
    """Return a line that says why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return f"{name}: missing"
    return f"{name}: unreadable ({error})"


def _check_pieces(
    name: str, file: FileReader, expected: TensorFile, progress: Callable[[int], None] | None
) -> None:
    def read_into(offset: int, buffer: memoryview) -> None:
        file.read_into(offset, buffer)
        if progress is not None:
            progress(len(buffer))

    bad = [
        stored.piece.key
        for stored in expected.pieces
        if checksum_of_range(read_into, stored.offset, stored.size) != stored.xxh3_128
    ]
    if bad:
        raise DamagedError(f"{name}: the checksum differs ({', '.join(dict.fromkeys(bad))})")
