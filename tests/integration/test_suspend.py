"""A whole worker whose machine sleeps, over real sockets; the sleep is that of its clocks alone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from moved_clock import MovedClock
from station import Station
from structlog.testing import capture_logs
from watching import Watch

from ai4all import suspend
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.types.task import ErrorCode
from ai4all.worker_events import LinkDown, LinkUp


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspend, "LOOK_EVERY_S", 0.005)


async def until(moments: Watch[Event], kind: EventKind, count: int = 1) -> Event:
    async with asyncio.timeout(60):
        return await moments.until(lambda event: event.kind is kind, count=count)


def task(block_id: str, seconds: float, max_tokens: int) -> TaskSpec:
    return TaskSpec(
        block_id=block_id,
        input={"prompt": "x", "max_tokens": max_tokens},
        deadline=datetime.now(UTC) + timedelta(seconds=seconds),
    )


async def test_a_sleep_drops_the_link_at_once_and_the_work_goes_on() -> None:
    clock, moments = MovedClock(), Watch[Event]()
    backend = FakeBackend(ScriptedGeneration(token_ms=20.0))
    tasks = [task("long", 3600.0, 50)]
    with capture_logs() as logs:
        async with (
            EmbeddedCoordinator(tasks, on_event=moments) as coordinator,
            Station(coordinator.url, backend, clock=clock) as station,
        ):
            while backend.active == 0:
                await asyncio.sleep(0.001)
            clock.slept += 60.0
            await until(moments, EventKind.REGISTERED, 2)
            await coordinator.finished()
            assert [type(event) for event in station.seen.seen].count(LinkDown) == 1
            result = coordinator.outcomes["long"].result
    assert result.success
    # Its times are of the engine's clock, and say nothing of the sleep; this does.
    assert result.metrics.suspended_ms == pytest.approx(60_000.0, abs=1000.0)
    assert result.metrics.total_time_ms < 30_000.0
    assert backend.calls.generations == 1
    assert [e["seconds"] for e in logs if e["event"] == "machine_slept"] == [60.0]
    assert [e["reason"] for e in logs if e["event"] == "link_lost"] == ["the machine slept"]


async def test_a_deadline_that_passed_in_a_sleep_is_kept_on_waking() -> None:
    clock, moments = MovedClock(), Watch[Event]()
    backend = FakeBackend(ScriptedGeneration(token_ms=50.0))
    async with (
        EmbeddedCoordinator([task("late", 300.0, 4000)], on_event=moments) as coordinator,
        Station(coordinator.url, backend, clock=clock),
    ):
        while backend.active == 0:
            await asyncio.sleep(0.001)
        clock.slept += 301.0
        failed = await until(moments, EventKind.REQUEUED)
    assert failed.block_id == "late"
    assert ErrorCode.DEADLINE_EXCEEDED.value in failed.detail
    assert backend.calls.cancelled == 1


async def test_a_worker_that_waited_for_the_next_attempt_makes_it_on_waking() -> None:
    clock, moments = MovedClock(), Watch[Event]()
    coordinator = EmbeddedCoordinator([task("b", 3600.0, 1)], on_event=moments)
    async with coordinator:
        url = coordinator.url
    # A thousand seconds and more between two attempts.
    async with Station(url, reconnect_ms=1_000_000, jitter=0.0, clock=clock) as station:
        while station.worker._connection._policy.count == 0:
            await asyncio.sleep(0.001)
        async with coordinator:
            clock.slept += 60.0
            await asyncio.sleep(0.1)
            assert EventKind.REGISTERED not in {event.kind for event in moments.seen}
            clock.slept += 3600.0
            await coordinator.finished()


@pytest.mark.parametrize("ahead", [3600.0, -3600.0, 3650 * 86_400.0, -20_000 * 86_400.0])
async def test_a_wall_clock_that_is_wrong_costs_no_block_and_no_link(ahead: float) -> None:
    clock, moments = MovedClock(), Watch[Event]()
    clock.ahead = ahead
    with capture_logs() as logs:
        async with (
            EmbeddedCoordinator([], on_event=moments) as coordinator,
            Station(coordinator.url, clock=clock) as station,
        ):
            coordinator.add(task("wrong from the start", 60.0, 2))
            await coordinator.finished()
            clock.ahead = -ahead
            coordinator.add(task("set meanwhile", 60.0, 2))
            await coordinator.finished()
            outcomes = coordinator.outcomes
            assert [type(e) for e in station.seen.seen].count(LinkUp) == 1
    assert {name: outcome.result.success for name, outcome in outcomes.items()} == {
        "wrong from the start": True,
        "set meanwhile": True,
    }
    for outcome in outcomes.values():
        assert outcome.result.metrics.queue_time_ms >= 0.0
        assert outcome.result.metrics.suspended_ms is None
    (warning,) = [entry for entry in logs if entry["event"] == "clock_differs"]
    assert warning["ahead_of_coordinator_s"] == pytest.approx(ahead, abs=2)


async def test_a_block_that_comes_too_late_is_no_hot_loop() -> None:
    clock, moments = MovedClock(), Watch[Event]()
    # To a coordinator of the first protocol, whose frames have no time, a wrong clock shows.
    clock.ahead = 3600.0
    coordinator = EmbeddedCoordinator(
        [task(f"b-{n}", 60.0, 1) for n in range(50)], on_event=moments, strict_seed=True
    )
    async with coordinator, Station(coordinator.url, clock=clock):
        await until(moments, EventKind.REQUEUED)
        await asyncio.sleep(0.3)
        failed = [event for event in moments.seen if event.kind is EventKind.REQUEUED]
    assert len(failed) == 1
    assert ErrorCode.DEADLINE_EXCEEDED.value in failed[0].detail
