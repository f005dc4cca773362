"""User errors of the `tjx-eval` program."""


class EvalError(ValueError):
    """Raised for a mistake that the user can fix; the message says how."""
