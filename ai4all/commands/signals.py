"""Signals that ask a command to stop. Only the command line touches them, never the library."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

__all__ = ["on_stop_signals"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_stop_signals(stop: Callable[[], object], *, calls: int = 2) -> Iterator[None]:
    """Call ``stop`` on SIGINT and SIGTERM, on the running loop's thread.

    Args:
        stop: What the signals call.
        calls: After so many signals the next one ends the process, whatever hangs.
    """
    loop = asyncio.get_running_loop()
    seen = 0

    def handle() -> None:
        nonlocal seen
        seen += 1
        if seen >= calls:
            for each in _STOP_SIGNALS:
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)
        stop()

    before = {each: signal.getsignal(each) for each in _STOP_SIGNALS}
    for each in _STOP_SIGNALS:
        loop.add_signal_handler(each, handle)
    try:
        yield
    finally:
        for each, handler in before.items():
            loop.remove_signal_handler(each)
            signal.signal(each, handler)
