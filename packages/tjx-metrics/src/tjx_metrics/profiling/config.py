"""What configures profiling. Standard library only."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are profiled.

    Attributes
    ----------
    steps
        Steps of which a trace is written, as 10-15 or 10; later than the first ones, which compile.

    Raises
    ------
    ValueError
        When `steps` cannot be read.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        found = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", self.steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"steps={self.steps!r}: must be a step or a range of steps, the first of all being "
                "1; try 10-15"
            )

    @property
    def range(self) -> tuple[int, int] | None:
        """The first and the last step that is profiled; None where none is."""
        if self.steps is None:
            return None
        first, _, last = self.steps.partition("-")
        return int(first), int(last or first)
