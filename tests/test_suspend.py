from __future__ import annotations

import asyncio

import pytest
from moved_clock import MovedClock

from ai4all import suspend
from ai4all.suspend import SuspendWatch


def test_a_sleep_is_told_once() -> None:
    clock, told = MovedClock(), []
    watch = SuspendWatch(clock, told.append)
    watch.look()
    assert told == []
    for seconds in (5.5, 60.0, 10 * 86_400.0):
        clock.slept += seconds
        watch.look()
        watch.look()
        assert told.pop() == pytest.approx(seconds, abs=0.1)
        assert told == []


def test_short_sleeps_add_up() -> None:
    clock, told = MovedClock(), []
    watch = SuspendWatch(clock, told.append)
    for _ in range(7):
        clock.slept += 2.0
        watch.look()
    assert told == [pytest.approx(6.0, abs=0.1)] * 2


@pytest.mark.parametrize("ahead", [3600.0, -3600.0, 315e6, -1.7e9])
def test_a_wall_clock_that_is_set_is_no_sleep(ahead: float) -> None:
    clock, told = MovedClock(), []
    watch = SuspendWatch(clock, told.append)
    clock.ahead = ahead
    watch.look()
    assert told == []


async def test_it_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspend, "LOOK_EVERY_S", 0.001)
    clock, told = MovedClock(), asyncio.Queue[float]()
    watching = asyncio.ensure_future(SuspendWatch(clock, told.put_nowait).run())
    clock.slept += 100.0
    assert await asyncio.wait_for(told.get(), 20) == pytest.approx(100.0, abs=0.1)
    watching.cancel()
