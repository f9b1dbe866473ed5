"""The end of a process that was asked to stop and does not come to it by itself.

What hangs may be anything: native code, a disk that does not answer, a thread that hashes a large
file. None of it can be interrupted from here, but nothing that is safe is lost by leaving it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

__all__ = ["LastResort"]


class _Order(NamedTuple):
    """When to end, on the monotonic clock, with which status, and what to say then."""

    due: float
    status: int
    reason: str


class LastResort:
    """A fuse: lit by a stop, put out by the end of the context."""

    def __init__(self) -> None:
        # The one queue that a signal's handler, which interrupts anything, may put something in.
        # None is the last.
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        threading.Thread(target=self._burn, name="ai4all-last-resort", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._orders.put(None)

    def light(self, seconds: float, status: int, reason: str = "") -> None:
        """End the process in so many seconds, unless the context ends or it is lit anew before.

        May be called from a signal's handler.

        Args:
            seconds: How long it burns.
            status: The exit status then.
            reason: What to say on standard error; nothing by default.
        """
        self._orders.put(_Order(time.monotonic() + seconds, status, reason))

    def _burn(self) -> None:
        order = self._orders.get()
        while order is not None:
            try:
                following = self._orders.get(timeout=max(0.0, order.due - time.monotonic()))
            except queue.Empty:
                _end(order.status, order.reason)
            order = following


def _end(status: int, reason: str) -> NoReturn:
    # Past everything that has a lock: the holder may be what hangs. So may standard error.
    with contextlib.suppress(OSError, ValueError):
        if reason and select.select((), (2,), (), 0)[1]:
            os.write(2, f"ai4all-native: {reason}\n".encode())
    os._exit(status)
