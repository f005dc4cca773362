"""Deprecated module attributes that work for one more minor version."""

import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def deprecated_names(
    module: str,
    names: Mapping[str, str],
    *,
    since: str,
    fallback: Callable[[str], Any] | None = None,
) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that resolves renamed attributes with a warning.

    An old name works in the minor version that renames it and is removed in the next one:
    `tools/api_diff.py` fails from that version on, until the entry is deleted.

    Parameters
    ----------
    module : str
        ``__name__`` of the module that had the old names.
    names : mapping of str to str
        Old name to new name: an attribute of the same module, or a dotted path such as
        ``"tjx_data.loading.token_loader.TokenLoader"``.
    since : str
        The version that renames them, ``"0.3.0"``; the old names are removed in ``0.4``.
    fallback : callable, optional
        The module's existing ``__getattr__``, such as that of `lazy_loader`, for all other names.

    Returns
    -------
    callable
        A function of the attribute's name. It emits `DeprecationWarning` at the caller for an old
        name, and raises `AttributeError` for an unknown one.

    Examples
    --------
    In a module that renamed ``clean`` to ``printable`` in 0.3.0:

    >>> __getattr__ = deprecated_names("tjx_core.text", {"clean": "printable"}, since="0.3.0")
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     __getattr__("clean").__name__
    'printable'
    >>> print(caught[0].message)
    tjx_core.text.clean is deprecated since 0.3.0 and removed in 0.4; use printable
    """
    removal = removal_version(since)

    def resolve(name: str) -> Any:
        if name in names:
            new = names[name]
            warnings.warn(
                f"{module}.{name} is deprecated since {since} and removed in {removal}; use {new}",
                DeprecationWarning,
                stacklevel=2,
            )
            return pkgutil.resolve_name(new) if "." in new else getattr(sys.modules[module], new)
        if fallback is not None:
            return fallback(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return resolve


def removal_version(since: str) -> str:
    """Return the minor version that removes the names that a version deprecates.

    Parameters
    ----------
    since : str
        Such as ``"0.3.0"``.

    Returns
    -------
    str
        The next minor version.

    Raises
    ------
    ValueError
        If `since` is not of the form X.Y.Z.

    Examples
    --------
    >>> removal_version("0.3.0")
    '0.4'
    """
    parts = since.split(".")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"since: got {since!r}; expected a version X.Y.Z, such as 0.3.0")
    return f"{parts[0]}.{int(parts[1]) + 1}"
