"""Interface to the fault-injection library of `fault_shim.c`, loaded before libc."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("fault_shim.c")
_SHIM = "fault_shim.so"
FAIL, SHORT, KILL_BEFORE, KILL_AFTER = 1, 2, 3, 4


class Fault(NamedTuple):
    """Fault of one file operation.

    Attributes
    ----------
    place
        Index of the operation, from 0; -1 only counts operations.
    action
        FAIL, SHORT, KILL_BEFORE or KILL_AFTER.
    number
        The errno of FAIL.
    stays
        Whether later operations of the same kind fail too.
    """

    place: int = -1
    action: int = FAIL
    number: int = 0
    stays: bool = False


def has_compiler() -> bool:
    """Return whether a C compiler is available."""
    return shutil.which("cc") is not None


@contextlib.contextmanager
def folder_with_shim(prefix: str) -> Iterator[Path]:
    """Yield a new folder with the library loaded; restarts this program if necessary.

    Parameters
    ----------
    prefix
        Prefix of the folder's name.
    """
    shim = Path(os.environ.get("LD_PRELOAD", ""))
    if shim.name == _SHIM:
        try:
            yield shim.parent
        finally:
            shutil.rmtree(shim.parent, ignore_errors=True)
        return
    shim = Path(tempfile.mkdtemp(prefix=prefix)) / _SHIM
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", shim, _SOURCE, "-ldl"], check=True, timeout=60
    )
    os.environ["LD_PRELOAD"] = str(shim)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  this very program


def arm(root: Path, fault: Fault, *, record: int = -1) -> None:
    """Inject a fault into operations below a folder; log their names to a file."""
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 4]
    shim.fault_arm(
        str(root).encode(), fault.place, fault.action, fault.number, int(fault.stays), record
    )


def journal(root: Path, descriptor: int) -> None:
    """Log every change below a folder to a file, in order."""
    shim = ctypes.CDLL(None)
    shim.fault_journal.argtypes = [ctypes.c_char_p, ctypes.c_int]
    shim.fault_journal(str(root).encode(), descriptor)


def disarm() -> None:
    """Stop injecting faults."""
    ctypes.CDLL(None).fault_disarm()
