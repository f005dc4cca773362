"""Several processes that answer one question together; process 0 speaks."""

import tjx_parallel
from tjx_eval.errors import EvalError


def join_processes() -> None:
    """Join the others, where the environment names some; before a device is used.

    Raises
    ------
    RunError
        If it names them in part.
    """
    try:
        tjx_parallel.initialize()
    except ValueError as error:
        raise EvalError(str(error)) from error
