"""Terminal progress bar of data preparation."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import tjx_data


class DataProgressBar:
    """Show the progress of each stage of data preparation."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "DataProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, stage: tjx_data.Stage) -> None:
        """Update the bar of a stage."""
        if stage.name not in self._tasks:
            self._tasks[stage.name] = self._progress.add_task(stage.name, total=stage.total)
        self._progress.update(self._tasks[stage.name], completed=stage.done, total=stage.total)
