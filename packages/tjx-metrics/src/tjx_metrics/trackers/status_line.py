"""Format the status line of a run for a given width."""

from dataclasses import dataclass


@dataclass
class Status:
    """Status of a run; unknown fields are None.

    Attributes
    ----------
    step, max_steps
        Finished steps, and steps of the whole run.
    loss, eval_loss
        Last training and evaluation loss, nats per token.
    tokens_per_sec
        Training throughput.
    seconds_left
        Remaining time.
    skipped
        Steps skipped because of a non-finite loss or gradient; shown if positive.
    mfu
        Model FLOPs utilization, in [0, 1].
    saved
        Step of the last complete checkpoint.
    failed_saves
        Checkpoints that could not be written; shown if positive.
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
        """Format the status, omitting the least important fields that do not fit.

        Parameters
        ----------
        width : int
            Available columns. The step count is always included, truncated if necessary.

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
        # In display order; fields with a higher number are omitted first.
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
    """Format a fraction as a percentage, with one decimal if it is below 10 %.

    Examples
    --------
    >>> percent(0.413), percent(0.004), percent(1.0)
    ('41%', '0.4%', '100%')
    """
    return f"{share:.{0 if share >= 0.0995 else 1}%}"


def si(value: float) -> str:
    """Format a number with three significant digits and an SI prefix.

    Examples
    --------
    >>> si(7.26), si(999.6), si(12_345.0), si(1_500_000.0)
    ('7.26', '1.00k', '12.3k', '1.50M')
    """
    for suffix in ("", "k", "M", "G", "T"):
        # Values that round to 1000 take the next prefix.
        if abs(value) < 999.5 or suffix == "T":
            break
        value /= 1000
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{suffix}"


def duration(seconds: float) -> str:
    """Format a duration in seconds as m:ss, h:mm:ss or days and hours.

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
