"""What configures logging. Standard library only: it is read without JAX or matplotlib."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run writes down, and how often.

    Attributes
    ----------
    every
        Steps between two records of training metrics.
    layer_norms
        Whether records hold norms of each layer's gradients, parameters and updates.

    Raises
    ------
    ValueError
        When a value is out of its range.
    """

    every: int = 10
    layer_norms: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.every < 1:
            problems.append(f"every={self.every}: must be at least 1; 1 records each step")
        if problems:
            raise ValueError("\n".join(problems))
