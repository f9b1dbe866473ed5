"""Signals that a command heeds. Only the command line touches them, never the library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["on_hangup", "on_stop_signals"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_stop_signals(
    stop: Callable[[], object],
    *,
    at_once: Callable[[], object] | None = None,
    calls: int = 2,
    deaf_at_end: bool = False,
) -> Iterator[None]:
    """Call ``stop`` on SIGINT and SIGTERM, on the running loop's thread.

    Args:
        stop: What the signals call, in a turn of the loop.
        at_once: What the first one calls, whatever the loop does; it may interrupt anything.
        calls: After so many signals the next one ends the process, whatever hangs.
        deaf_at_end: Where there was a signal, another one that comes after the work has ended
            changes nothing any more, not even the exit status.
    """
    seen = 0

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen == 1 and at_once is not None:
            at_once()
        if seen >= calls:
            for each in _STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)

    with _handling(_STOP_SIGNALS, stop):
        # The loop hears of a signal by other means; its own handlers here do nothing.
        for each in _STOP_SIGNALS:
            signal.signal(each, interrupt)
        yield
    if deaf_at_end and seen:
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def on_hangup(reload: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    """Tell the two meanings of SIGHUP apart, on the running loop's thread.

    Where the process had a terminal and has none any more, it is the terminal that was closed, and
    ``stop`` is called. Else somebody has sent it, and ``reload`` is called. Where it is ignored, as
    under nohup, it stays so.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    had_terminal = _has_terminal()

    def handle() -> None:
        if had_terminal and not _has_terminal():
            stop()
        else:
            reload()

    with _handling((signal.SIGHUP,), handle):
        yield


@contextlib.contextmanager
def _handling(signals: tuple[signal.Signals, ...], handle: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = {each: signal.getsignal(each) for each in signals}
    for each in signals:
        loop.add_signal_handler(each, handle)
    try:
        yield
    finally:
        for each, handler in before.items():
            loop.remove_signal_handler(each)
            signal.signal(each, handler)


def _has_terminal() -> bool:
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True
