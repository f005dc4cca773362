"""Licences are shown before a corpus is fetched for the first time."""

import hashlib
import logging
from contextlib import suppress

from tjx_data.atomic import write_atomically
from tjx_data.cache import default_cache_dir

_log = logging.getLogger(__name__)


def show_licence(name: str, licence: str, place: str) -> None:
    """Log the licence of a corpus as a warning, once for each user's cache folder.

    Parameters
    ----------
    name, licence : str
        The corpus, and what its text may be used under.
    place : str
        Where it is fetched from, and where more is said about its licence.
    """
    notice = f"corpus {name!r} is fetched from {place}; its licence: {licence}"
    digest = hashlib.sha256(notice.encode()).hexdigest()
    shown = default_cache_dir() / "licences" / f"{name}-{digest[:12]}.txt"
    if shown.exists():
        return
    _log.warning("%s", notice)
    with suppress(OSError):  # where nothing can be kept it is shown again the next time
        shown.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(shown, notice.encode())
