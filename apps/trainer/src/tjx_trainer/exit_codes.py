"""How the program ends, other than well: its exit codes, and the error of a run that diverged."""

EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3


class NotFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradients that were not finite.

    Attributes
    ----------
    step : int
        The last of these steps; 1 is the first of a run.
    in_a_row : int
        How many there were.
    """

    def __init__(self, step: int, in_a_row: int) -> None:
        super().__init__(
            f"the loss or its gradients were not finite {in_a_row} steps in a row, up to step "
            f"{step}; each was skipped and changed nothing"
        )
        self.step, self.in_a_row = step, in_a_row
