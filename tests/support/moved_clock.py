"""A machine's clocks that a test moves."""

from __future__ import annotations

import time

from ai4all.clock import Clock


class MovedClock(Clock):
    """The real clocks and what a test has added to them.

    Attributes:
        slept: Seconds that the machine has slept.
        ahead: Seconds by which its wall clock is ahead of what is true.
    """

    def __init__(self) -> None:
        self.slept = 0.0
        self.ahead = 0.0

    def boottime(self) -> float:
        return self.monotonic() + self.slept

    def wall(self) -> float:
        return time.time() + self.ahead
