"""What a save cost."""

from typing import NamedTuple


class SaveReport(NamedTuple):
    """What a save cost.

    Attributes
    ----------
    step
        The step that was saved.
    blocking_seconds
        For which `Checkpointer.save` kept its caller, without the wait for the save before it.
    seconds
        Until the checkpoint was durable.
    size_bytes
        Bytes of its arrays, of all processes; 0 on others than process 0.
    """

    step: int
    blocking_seconds: float
    seconds: float
    size_bytes: int
