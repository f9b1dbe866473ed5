"""A download on a terminal: a bar with size, speed and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ai4all.models.files import DownloadProgress, ProgressCallback

__all__ = ["show_download"]


@contextlib.contextmanager
def show_download(console: Console, what: str) -> Iterator[ProgressCallback]:
    """Show the progress of fetching ``what`` while the block runs; silent but on a terminal.

    The bar appears with the first report, so that nothing flashes up for what is here already.
    """
    if not console.is_terminal:
        yield lambda progress: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(progress: DownloadProgress) -> None:
        if not tasks:
            bar.start()
        if progress.phase not in tasks:
            # One line for each phase: each has its own speed.
            tasks[progress.phase] = bar.add_task(f"{progress.phase} {what}")
        task = tasks[progress.phase]
        bar.update(task, completed=progress.done_bytes, total=progress.total_bytes)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()
