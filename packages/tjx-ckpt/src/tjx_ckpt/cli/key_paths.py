"""Keys of leaves, such as ``params/blocks/kernel``: order and prefixes."""

from collections.abc import Iterable


def in_order(keys: Iterable[str]) -> list[str]:
    """Sort keys part by part, with numeric parts in numeric order.

    Examples
    --------
    >>> in_order(["m/10/w", "m/2/w", "m/w", "m-2/w"])
    ['m/2/w', 'm/10/w', 'm/w', 'm-2/w']
    """
    return sorted(keys, key=_parts)


def is_below(key: str, prefix: str) -> bool:
    """Return whether a key equals a prefix or lies below it.

    Examples
    --------
    >>> is_below("params/w", "params"), is_below("params_ema/w", "params"), is_below("w", "")
    (True, False, True)
    """
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def below(keys: Iterable[str], prefix: str) -> list[str]:
    """Return the sorted keys at or below a prefix; an empty prefix selects all.

    Raises
    ------
    ValueError
        If there are none; lists the first parts of the keys.
    """
    everything = in_order(keys)
    prefix = prefix.strip("/")
    found = [key for key in everything if is_below(key, prefix)]
    if not found:
        parts = ", ".join(dict.fromkeys(key.partition("/")[0] for key in everything))
        raise ValueError(f"--only: got {prefix}, which has no arrays; expected {parts} or below")
    return found


def _parts(key: str) -> tuple[tuple[bool, int, str], ...]:
    return tuple(
        (False, int(part), part) if part.isascii() and part.isdigit() else (True, 0, part)
        for part in key.split("/")
    )
