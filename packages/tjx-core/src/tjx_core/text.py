"""Text from outside the program, made safe to print."""

import re


def printable(text: str) -> str:
    r"""Replace control characters, which a terminal would execute, by their escapes.

    Names of files and runs, and the content of files, can hold any of them.

    Parameters
    ----------
    text : str
        Any text; tabs and line ends are kept.

    Returns
    -------
    str
        The text with ``\x1b`` and the like spelled out.

    Examples
    --------
    >>> printable("run\x1b[31m\n")
    'run\\x1b[31m\n'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
