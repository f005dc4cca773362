"""Reading and writing of .npz files, without trusting the sizes that a file claims.

NumPy allocates an array of the size in its header before it reads the data, and decompresses any
member. Files written here are uncompressed, so that all sizes can be checked first.
"""

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_core import write_atomically

Arrays = dict[str, npt.NDArray[Any]]


def write_arrays(file: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays to an uncompressed .npz file, atomically.

    Parameters
    ----------
    file : Path
        The file. Its folder must exist.
    arrays : Mapping
        Arrays by name, of any dtype but object.
    """
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(file, content.getvalue())


def read_arrays(file: Path) -> Arrays:
    """Read all arrays of an uncompressed .npz file.

    Parameters
    ----------
    file : Path
        Written by `write_arrays` or `numpy.savez`.

    Returns
    -------
    dict
        Arrays by name, read-only.

    Raises
    ------
    ValueError
        If the file is damaged or compressed, or an array's header claims another size than its
        data or holds Python objects.
    FileNotFoundError
        If there is no file.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise ValueError("not a regular file")
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
        raise ValueError(
            f"{file}: damaged ({error}); delete it, and it is created again"
        ) from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed; expected an uncompressed array")
    with archive.open(member) as stream:
        shape, dtype = _read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled Python objects")
        expected = math.prod(shape) * dtype.itemsize
        found = member.file_size - stream.tell()
        if expected != found:
            raise ValueError(f"{member.filename} claims {expected} bytes of values and has {found}")
        return np.frombuffer(stream.read(), dtype).reshape(shape)


def _read_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"got version {version} of the .npy format; expected 1.0 or 2.0")
    try:
        shape, in_fortran_order, dtype = readers[version](stream)
    except (SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        # NumPy parses the header as a Python literal.
        raise ValueError(f"no array header ({type(error).__name__})") from error
    if in_fortran_order or any(size < 0 for size in shape):
        raise ValueError(
            f"got shape {shape} or Fortran order; expected sizes of 0 or more in C order"
        )
    return shape, dtype
