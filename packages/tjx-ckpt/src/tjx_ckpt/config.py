"""How often a run is saved and how many saves are kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved and how many saves are kept.

    Attributes
    ----------
    every
        Steps between two saves.
    keep
        Number of newest checkpoints that stay on disk.
    """

    every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value}: must be 1 or more; {advice}"
            for name, value, advice in (
                ("every", self.every, "a larger number than max_steps saves only at the end"),
                ("keep", self.keep, "2 or more lets a run fall back when the newest is damaged"),
            )
            if value < 1
        ]
        if problems:
            raise ValueError("\n".join(problems))
