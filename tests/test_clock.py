from __future__ import annotations

import asyncio
import sys
import time
from datetime import UTC, datetime, timedelta

from ai4all.clock import SYSTEM_CLOCK, Clock


class Stopped(Clock):
    """A clock whose world is at the moment of Unix time that it was given."""

    def __init__(self, wall: float) -> None:
        self.seconds = wall

    def wall(self) -> float:
        return self.seconds


async def test_monotonic_is_the_clock_of_the_event_loop() -> None:
    before = SYSTEM_CLOCK.monotonic()
    assert before <= asyncio.get_running_loop().time() <= SYSTEM_CLOCK.monotonic()


def test_boottime_has_the_sleep_that_monotonic_leaves_out() -> None:
    first = SYSTEM_CLOCK.boottime()
    time.sleep(0.01)
    assert SYSTEM_CLOCK.boottime() > first
    if sys.platform == "linux":
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert before <= SYSTEM_CLOCK.boottime() <= time.clock_gettime(time.CLOCK_BOOTTIME)
        assert SYSTEM_CLOCK.boottime() >= SYSTEM_CLOCK.monotonic() - 0.01


def test_the_instant_is_that_of_the_wall_clock() -> None:
    instant = SYSTEM_CLOCK.utc()
    assert instant.utcoffset() == timedelta(0)
    assert abs(instant - datetime.now(UTC)) < timedelta(minutes=1)
    assert Stopped(0.0).utc() == datetime(1970, 1, 1, tzinfo=UTC)
    assert Stopped(1.5).utc() == datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)
