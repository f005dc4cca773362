"""Files of object stores and web servers (s3://, gs://, https://), downloaded through fsspec."""

import hashlib
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from tjx_core import ConfigError, Problem
from tjx_data.cache import default_cache_dir
from tjx_data.corpora.formats import is_corpus_file
from tjx_data.corpora.hub import HubError

BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "https": "aiohttp"}
"""Packages that fsspec needs, by protocol."""
_URL = re.compile("[a-z][a-z0-9+]*://")

_log = logging.getLogger(__name__)


def is_url(path: str) -> bool:
    """Return whether a path is a URL, such as s3://bucket/file."""
    return bool(_URL.match(path))


def download(url: str) -> list[Path]:
    """Return local copies of the files of a URL, downloading new and changed ones.

    Copies are in the folder ``files`` of `default_cache_dir`. Every call asks the server for the
    names and versions of the files; web servers have no versions.

    Parameters
    ----------
    url : str
        URL of a file, a pattern such as ``s3://bucket/books/*.txt``, or a folder.

    Returns
    -------
    list of Path
        Sorted by URL.

    Raises
    ------
    ConfigError
        If there is no file, or fsspec or its package for this protocol is not installed.
    HubError
        If the server is unreachable or refuses.
    """
    if "::" in url:
        message = f"got {url!r}, a chain of URLs; expected one, such as s3://bucket/*.jsonl"
        raise ConfigError([Problem("path", message)])
    try:
        import fsspec

        files, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        needed = f"pip install 'tjx-data[remote]' {BACKENDS.get(protocol, '')}".rstrip()
        message = f"got {url!r}; {error}; {protocol}:// needs: {needed}"
        raise ConfigError([Problem("path", message)]) from None
    try:
        return [_copy(files, name) for name in _names(files, path, url)]
    except (ConfigError, HubError):
        raise
    except Exception as error:  # each backend has exceptions of its own
        raise HubError(f"{url}: cannot read: {type(error).__name__}: {error}") from error


def _names(files: Any, path: str, url: str) -> list[str]:
    if any(character in path for character in "*?["):
        names = [name for name in files.glob(path) if files.isfile(name)]
    elif files.isdir(path):
        names = [name for name in files.find(path) if is_corpus_file(Path(name))]
    else:
        names = [path] if files.exists(path) else []
    if not names:
        raise ConfigError([Problem("path", f"got {url!r}; this URL has no file of text")])
    return sorted(names)


def _copy(files: Any, name: str) -> Path:
    url = files.unstrip_protocol(name)
    version = hashlib.sha256(f"{url} {files.ukey(name)}".encode()).hexdigest()[:24]
    local = default_cache_dir() / "files" / version / PurePosixPath(name).name
    if not local.exists():
        _log.info("downloading %s", url)
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{os.getpid()}.part")
        files.get_file(name, str(partial))
        partial.replace(local)
    return local
