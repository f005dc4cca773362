"""What configures a schedule. Standard library only: it is read without JAX."""

from dataclasses import dataclass
from typing import Literal, get_args

from tjx_optim.refusals import unknown_name

ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a linear warm-up, then a decay by name.

    Attributes
    ----------
    name
        Shape after the warm-up: cosine or linear (down to the final fraction), or constant.
    warmup_steps
        Steps of linear warm-up; step s < warmup_steps has peak * (s + 1) / (warmup_steps + 1).
    decay_steps
        Step at which the decay is done, warm-up included; None means the last step of the run.
    final_fraction
        Learning rate at and after decay_steps, as a fraction of the peak; unused by constant.

    Raises
    ------
    ValueError
        When a value is out of its range; all of them are named at once.
    """

    name: ScheduleName = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if self.name not in get_args(ScheduleName):
            problems.append(unknown_name("name", self.name, get_args(ScheduleName)))
        if self.warmup_steps < 0:
            problems.append(
                f"warmup_steps={self.warmup_steps}: must be at least 0; 0 is no warm-up"
            )
        if self.decay_steps is not None and self.decay_steps <= max(self.warmup_steps, 0):
            problems.append(
                f"decay_steps={self.decay_steps}: includes the warm-up, so it must be above "
                f"warmup_steps={self.warmup_steps}; raise it, or leave it out to decay to the end"
            )
        if not 0 <= self.final_fraction <= 1:
            problems.append(
                f"final_fraction={self.final_fraction}: must lie in [0, 1]; 0.1 ends at a tenth"
            )
        if problems:
            raise ValueError("\n".join(problems))
