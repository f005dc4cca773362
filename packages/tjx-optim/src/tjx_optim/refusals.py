"""What a refusal of a configuration says. Standard library only."""

import math


def unknown_name(field: str, given: str, allowed: tuple[str, ...]) -> str:
    """Say which names are allowed."""
    return f"{field}={given!r}: must be one of {', '.join(allowed)}"


def at_least_zero(field: str, given: float | None, hint: str) -> list[str]:
    """Refuse what is not a finite number of at least 0; None is nothing given."""
    if given is None or (math.isfinite(given) and given >= 0):
        return []
    return [f"{field}={given}: must be a finite number of at least 0; {hint}"]


def above_zero(field: str, given: float | None, hint: str) -> list[str]:
    """Refuse what is not a finite number above 0; None is nothing given."""
    if given is None or (math.isfinite(given) and given > 0):
        return []
    return [f"{field}={given}: must be finite and above 0; {hint}"]


def fraction(field: str, given: float | None) -> list[str]:
    """Refuse what does not lie in [0, 1); None is nothing given."""
    if given is None or 0 <= given < 1:
        return []
    return [f"{field}={given}: must lie in [0, 1); use 0 for none"]
