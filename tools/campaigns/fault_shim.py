"""The shim of `fault_shim.c`: compiled once, loaded before libc, armed in a child process."""

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
    """What happens to one file operation.

    Attributes
    ----------
    place
        Which operation, from 0; -1 counts only.
    action
        FAIL, SHORT, KILL_BEFORE or KILL_AFTER.
    number
        The errno of FAIL.
    stays
        Whether all later operations of the same kind fail too.
    """

    place: int = -1
    action: int = FAIL
    number: int = 0
    stays: bool = False


def has_compiler() -> bool:
    """Tell whether there is a C compiler to build the shim with."""
    return shutil.which("cc") is not None


@contextlib.contextmanager
def folder_with_shim(prefix: str) -> Iterator[Path]:
    """Yield a new folder, in this program with the shim loaded: it is started again for that.

    Parameters
    ----------
    prefix
        How the name of the folder begins.
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
    """Let a fault happen to operations below a folder, from now on; write their names to a file."""
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 4]
    shim.fault_arm(
        str(root).encode(), fault.place, fault.action, fault.number, int(fault.stays), record
    )


def journal(root: Path, descriptor: int) -> None:
    """Write every change below a folder to a file, in the order of the changes."""
    shim = ctypes.CDLL(None)
    shim.fault_journal.argtypes = [ctypes.c_char_p, ctypes.c_int]
    shim.fault_journal(str(root).encode(), descriptor)


def disarm() -> None:
    """Let no fault happen any more."""
    ctypes.CDLL(None).fault_disarm()
