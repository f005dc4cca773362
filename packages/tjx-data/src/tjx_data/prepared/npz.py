"""Reading our own .npz files, all made of other files, as if a stranger had written them.

NumPy makes an array as large as a header claims before it looks for the bytes, and unpacks whatever
it is given. What we write is stored as it is, so that sizes can be compared first.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_Arrays = dict[str, npt.NDArray[Any]]


def read_arrays(file: Path) -> _Arrays:
    """Read the arrays of a file that `numpy.savez` wrote.

    Raises
    ------
    ValueError
        If it is no such file, damaged, or packed; or an array's header claims other bytes than
        there are, or holds Python objects, which are pickles.
    FileNotFoundError
        If there is none.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            claimed = sum(member.file_size for member in members)
            if claimed > size:
                raise ValueError(f"claims {claimed} bytes of arrays in a file of {size}")
            return {
                member.filename.removesuffix(".npy"): _read(archive, member) for member in members
            }
    except FileNotFoundError:
        raise
    # zipfile raises RuntimeError for members that need a password.
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and it is made again") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is packed, and we write arrays as they are")
    with archive.open(member) as stream:
        shape, dtype = _header(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which are pickles")
        wanted = math.prod(shape) * dtype.itemsize
        there = member.file_size - stream.tell()
        if wanted != there:
            raise ValueError(f"{member.filename} claims {wanted} bytes of values, of {there}")
        return np.frombuffer(stream.read(), dtype).reshape(shape)


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"NumPy's format {version} is not one that we write")
    try:
        shape, in_fortran_order, dtype = readers[version](stream)
    except (SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        # NumPy reads it as a Python literal.
        raise ValueError(f"no header of an array ({type(error).__name__})") from error
    if in_fortran_order or any(size < 0 for size in shape):
        raise ValueError(f"shape {shape} or its order is not one that we write")
    return shape, dtype
