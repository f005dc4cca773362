"""Duration and size of a save."""

from typing import NamedTuple


class SaveReport(NamedTuple):
    """Duration and size of a durable save.

    Attributes
    ----------
    step
        The saved step.
    blocking_seconds
        Time that `Checkpointer.save` blocked, without the wait for the previous save.
    seconds
        Time until the checkpoint was durable.
    size_bytes
        Bytes of the arrays of all processes; 0 on processes other than 0.
    """

    step: int
    blocking_seconds: float
    seconds: float
    size_bytes: int
