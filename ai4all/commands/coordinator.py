"""``ai4all-native coordinator``: tasks from a file, to workers that connect, results to a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from ai4all.commands.environment import log_to_terminal, stderr_console
from ai4all.commands.signals import on_stop_signals
from ai4all.config import Settings
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind
from ai4all.errors import ConfigError

__all__ = ["run_coordinator"]

_SILENT = frozenset({EventKind.HEARTBEAT, EventKind.PROGRESS, EventKind.NO_WORK})


def run_coordinator(
    tasks: Path,
    results: Path,
    *,
    host: str,
    port: int,
    allow_remote: bool,
    token_file: Path | None,
    strict_seed: bool,
) -> None:
    """Serve until every task has ended, or until told to stop.

    Raises:
        ConfigError: The tasks, the address or the token cannot be used.
        OSError: The results cannot be written.
    """
    # Its events are printed below; what goes wrong is logged. It has no data directory.
    log_to_terminal(Settings())
    console = stderr_console()
    coordinator = EmbeddedCoordinator(
        tasks,
        results,
        host=host,
        port=port,
        allow_remote=allow_remote,
        token=_read_token(token_file),
        strict_seed=strict_seed,
        on_event=lambda event: _print_event(event, console),
    )
    asyncio.run(_serve(coordinator, results, console))


async def _serve(coordinator: EmbeddedCoordinator, results: Path, console: Console) -> None:
    stopped = asyncio.Event()
    # Before anybody is told that it listens: whoever knows that may send a signal.
    with on_stop_signals(stopped.set):
        async with coordinator:
            _say(console, f"listening on {coordinator.url}, {coordinator.unfinished} tasks to do")
            waits = [
                asyncio.ensure_future(each) for each in (coordinator.finished(), stopped.wait())
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if waits[0].done():
                    await waits[0]
            finally:
                for wait in waits:
                    wait.cancel()
    if coordinator.unfinished:
        _say(console, f"stopped with {coordinator.unfinished} tasks to do; start again to go on")
    else:
        _say(console, f"all tasks have ended; results in {results}")


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError("--token-file", problem, str(path)) from error
    if not token:
        raise ConfigError("--token-file", "it is empty", str(path))
    return token


def _print_event(event: Event, console: Console) -> None:
    if event.kind in _SILENT:
        return
    about = [part for part in (event.block_id, event.worker_id, event.detail) if part]
    _say(console, f"{event.kind.value}: {', '.join(about)}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
