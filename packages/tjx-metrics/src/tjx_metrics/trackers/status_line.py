"""The line that says how a run is doing, cut to the width there is."""

from dataclasses import dataclass


@dataclass
class Status:
    """What is known of a run; None where it is not.

    Attributes
    ----------
    step, max_steps
        Steps done, and steps of the whole run.
    loss, eval_loss
        Last training and evaluation loss, nats a token.
    tokens_per_sec
        Rate of training.
    mfu
        Share of the devices' peak rate that the model's operations take.
    saved
        Step of the last checkpoint that is whole.
    seconds_left
        Time until the end.
    skipped
        Steps that changed nothing, their loss or gradients not being finite; shown from 1 on.
    failed_saves
        Checkpoints that could not be written; shown from 1 on.
    """

    step: int
    max_steps: int
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_sec: float | None = None
    seconds_left: float | None = None
    skipped: int = 0
    mfu: float | None = None
    saved: int | None = None
    failed_saves: int = 0

    def line(self, width: int) -> str:
        """Write the line, leaving out the least important parts where `width` is small.

        Parameters
        ----------
        width : int
            Columns there are. The count of steps is always there, cut where it must be.

        Returns
        -------
        str
            At most `width` characters.

        Examples
        --------
        >>> status = Status(120, 3000, 3.4121, 3.6, 12_345.0, 83.0, mfu=0.41, saved=100)
        >>> status.line(80)
        ' 120/3000  loss 3.412  eval 3.600  12.3k tok/s  41% MFU  saved 100  1:23 left'
        >>> status.line(70)
        ' 120/3000  loss 3.412  eval 3.600  12.3k tok/s  saved 100  1:23 left'
        >>> status.line(40)
        ' 120/3000  loss 3.412  1:23 left'
        """
        total = str(self.max_steps)
        # In the order shown; the number says which goes first when there is no room.
        parts = [(0, f"{self.step:>{len(total)}}/{total}")]
        if self.loss is not None:
            parts.append((1, f"loss {self.loss:.3f}"))
        if self.skipped:
            parts.append((1, f"{self.skipped} skipped"))
        if self.failed_saves:
            parts.append((1, f"{self.failed_saves} saves failed"))
        if self.eval_loss is not None:
            parts.append((3, f"eval {self.eval_loss:.3f}"))
        if self.tokens_per_sec is not None:
            parts.append((4, f"{si(self.tokens_per_sec)} tok/s"))
        if self.mfu is not None:
            parts.append((6, f"{percent(self.mfu)} MFU"))
        if self.saved is not None:
            parts.append((5, f"saved {self.saved}"))
        if self.seconds_left is not None:
            parts.append((2, f"{duration(self.seconds_left)} left"))
        while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
            parts.remove(max(parts, key=lambda part: part[0]))
        return "  ".join(text for _, text in parts)[:width]


def percent(share: float) -> str:
    """Write a share in hundredths, small ones with a digit more.

    Examples
    --------
    >>> percent(0.413), percent(0.004), percent(1.0)
    ('41%', '0.4%', '100%')
    """
    return f"{share:.{0 if share >= 0.0995 else 1}%}"


def si(value: float) -> str:
    """Write a number in three digits and a letter for thousands.

    Examples
    --------
    >>> si(7.26), si(999.6), si(12_345.0), si(1_500_000.0)
    ('7.26', '1.00k', '12.3k', '1.50M')
    """
    for suffix in ("", "k", "M", "G", "T"):
        # What would round up to four digits belongs to the next letter.
        if abs(value) < 999.5 or suffix == "T":
            break
        value /= 1000
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{suffix}"


def duration(seconds: float) -> str:
    """Write a span of time.

    Examples
    --------
    >>> duration(83.0), duration(7384.0), duration(200_000.0)
    ('1:23', '2:03:04', '2d 07h')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
