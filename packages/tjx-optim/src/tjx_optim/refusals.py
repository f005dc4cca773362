"""What a refusal of a configuration says. Standard library only."""


def unknown_name(field: str, given: str, allowed: tuple[str, ...]) -> str:
    """Say which names are allowed."""
    return f"{field}={given!r}: must be one of {', '.join(allowed)}"
