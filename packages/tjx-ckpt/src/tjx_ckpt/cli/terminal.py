"""Terminal output: sizes in units, aligned tables and a progress line."""

import math
import sys
import time
from collections.abc import Sequence

WIDTH = 100
_SECONDS_BETWEEN = 0.1


def human_bytes(size: int) -> str:
    """Return a size in decimal units.

    Examples
    --------
    >>> human_bytes(999), human_bytes(109_312), human_bytes(1_240_000_000)
    ('999 B', '109.3 kB', '1.2 GB')
    """
    if size < 1000:
        return f"{size} B"
    return _scaled(float(size), ("kB", "MB", "GB", "TB", "PB", "EB"))


def human_count(count: int) -> str:
    """Return a count with all digits, or in millions and larger units from a million on.

    Examples
    --------
    >>> human_count(27_328), human_count(124_439_808)
    ('27,328', '124.4 M')
    """
    if count < 1_000_000:
        return f"{count:,}"
    return _scaled(count / 1000, ("M", "G", "T", "P"))


def human_number(value: float | int) -> str:
    """Return a float with four significant digits, or an int with all of its digits.

    Examples
    --------
    >>> human_number(1.0931438), human_number(3), human_number(float("nan")), human_number(2e-9)
    ('1.093', '3', 'nan', '2.000e-09')
    """
    # With trailing zeros, so that decimal points align.
    return str(value) if isinstance(value, int) else f"{value:#.4g}".rstrip(".")


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape in brackets, as in JAX's types.

    Examples
    --------
    >>> shape_text((12, 768)), shape_text(())
    ('[12,768]', '[]')
    """
    return f"[{','.join(map(str, shape))}]"


def shorten(text: str, width: int) -> str:
    """Replace the middle of a text that is longer than ``width`` by dots.

    Examples
    --------
    >>> shorten("opt_state/0/mu/blocks/mlp/up/kernel", 24)
    'opt_state/...p/up/kernel'
    """
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[head + 3 - width :]}"


def table(rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = "  ") -> list[str]:
    """Return aligned lines of a table whose first row is the header.

    Parameters
    ----------
    rows
        Rows of equal length; cells of the first column are shortened to fit the line.
    left
        Number of left-aligned columns; the others are right-aligned.
    indent
        Prefix of each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others = sum(2 + width for width in widths[1:])
    widths[0] = min(widths[0], max(WIDTH - len(indent) - others, 8))
    lines = []
    for row in rows:
        cells = [shorten(row[0], widths[0]), *row[1:]]
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines


class Progress:
    """Progress line of bytes on a terminal; prints nothing elsewhere. A context manager.

    Parameters
    ----------
    doing
        Label, such as "verified".
    total
        Total number of bytes.
    """

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total = doing, max(total, 1)
        self._done = 0
        self._shown_at = time.monotonic()  # short operations print nothing
        self._shown = 0

    def __call__(self, size: int) -> None:
        """Add a number of processed bytes."""
        self._done += size
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_at >= _SECONDS_BETWEEN:
            percent = math.floor(100 * self._done / self._total)
            line = (
                f"{self._doing}: {human_bytes(self._done)} of {human_bytes(self._total)}, "
                f"{percent} %"
            )
            sys.stderr.write(f"\r{line:<{self._shown}}")
            sys.stderr.flush()
            self._shown_at, self._shown = now, len(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Erase the progress line."""
        if self._shown:
            sys.stderr.write(f"\r{'':<{self._shown}}\r")
            sys.stderr.flush()
            self._shown = 0


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units:
        value /= 1000
        if value < 999.95 or unit == units[-1]:
            return f"{value:.1f} {unit}"
    raise AssertionError
