"""The machine's clocks, in one place, so that a simulation can bring its own.

Three of them, because each tells something that the others do not:

- ``monotonic`` never jumps and stands still while the machine sleeps. Waiting is measured on it; it
  is the clock of the event loop and of the engine.
- ``boottime`` never jumps either and goes on through a sleep. Where it has run away from
  ``monotonic``, the machine has slept.
- ``wall`` is what the world means by a time. It may jump, either way, at any moment.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Final

__all__ = ["SYSTEM_CLOCK", "Clock"]

if sys.platform == "darwin":
    # There this one goes on through a sleep, and the one of ``time.monotonic`` does not.
    _BOOTTIME: int | None = time.CLOCK_MONOTONIC
else:
    _BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


_READ_AT_ONCE_S: Final = 0.1


class Clock:
    """The clocks of this machine. Seconds throughout."""

    def monotonic(self) -> float:
        """Time that is spent awake, since some moment of the past."""
        return time.monotonic()

    def boottime(self) -> float:
        """Time since some moment of the past, sleep included.

        Where the system has no such clock it is ``monotonic``: no sleep is ever seen.
        """
        return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)

    def asleep(self) -> float:
        """Time that the machine has slept since some moment: only differences mean something."""
        while True:
            before, boottime, after = self.monotonic(), self.boottime(), self.monotonic()
            # Whoever is kept waiting between the looks has not slept.
            if after - before < _READ_AT_ONCE_S:
                return boottime - after

    def wall(self) -> float:
        """Seconds since the epoch, as far as this machine knows."""
        return time.time()

    def utc(self) -> datetime:
        """``wall`` as an instant."""
        return datetime.fromtimestamp(self.wall(), UTC)


SYSTEM_CLOCK: Final = Clock()
"""The clocks that everything uses that is not simulated."""
