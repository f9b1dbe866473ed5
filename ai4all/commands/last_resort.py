"""The end of a process that was asked to stop and does not come to it by itself.

What hangs may be anything: native code, a disk that does not answer, a thread that hashes a large
file. None of it can be interrupted from here, but nothing that is safe is lost by leaving it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import Self

__all__ = ["LastResort"]


class LastResort:
    """A fuse: lit by a stop, put out by the end of the context."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.put_out()

    def light(self, seconds: float, status: int, reason: str = "") -> None:
        """End the process in so many seconds, unless it is put out or lit anew before.

        Args:
            seconds: How long it burns.
            status: The exit status then.
            reason: What to say on standard error; nothing by default.
        """
        self.put_out()
        self._timer = threading.Timer(seconds, _end, (status, reason))
        self._timer.daemon = True
        self._timer.start()

    def put_out(self) -> None:
        """End nothing."""
        if self._timer is not None:
            self._timer.cancel()


def _end(status: int, reason: str) -> None:
    # Past everything that has a lock: the holder may be what hangs.
    if reason:
        with contextlib.suppress(OSError):
            os.write(2, f"ai4all-native: {reason}\n".encode())
    os._exit(status)
