"""A worker and a coordinator over a real socket, from the task to the acknowledged result."""

from __future__ import annotations

from collections import Counter

import pytest
from station import Station
from watching import Watch

from ai4all.backend.base import GenerateRequest
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.errors import EngineCrashed
from ai4all.types.task import ErrorCode, TaskType, TextCompletionOutput
from ai4all.worker_events import BlockAcknowledged, BlockStarted, BlockText

SLOW = ScriptedGeneration(token_ms=20.0)
HANGS = ScriptedGeneration(hang_at=1)


def completions(count: int, *, max_tokens: int = 5) -> list[TaskSpec]:
    return [
        TaskSpec(
            block_id=f"b-{n}",
            input={"prompt": f"prompt number {n}", "max_tokens": max_tokens, "temperature": 0.0},
        )
        for n in range(1, count + 1)
    ]


def assert_each_block_ended_once(coordinator: EmbeddedCoordinator, blocks: int) -> None:
    ends = Counter(
        event.block_id
        for event in coordinator.history
        if event.kind in (EventKind.DELIVERED, EventKind.FAILED)
    )
    assert len(ends) == blocks
    assert set(ends.values()) == {1}
    assert coordinator.unfinished == 0
    assert coordinator.violations() == []


def code_of(coordinator: EmbeddedCoordinator, block_id: str) -> ErrorCode | None:
    error = coordinator.outcomes[block_id].result.error
    return None if error is None else error.code


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_tasks_are_computed_and_delivered(strict_seed: bool) -> None:
    script = ScriptedGeneration(tokens=("Hello", ",", " you"), prompt_ms=3.0, token_ms=1.0)
    async with (
        EmbeddedCoordinator(completions(5), strict_seed=strict_seed) as coordinator,
        Station(coordinator.url, FakeBackend(script)) as station,
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 5)
    assert list(coordinator.outcomes) == [f"b-{n}" for n in range(1, 6)]
    for outcome in coordinator.outcomes.values():
        result = outcome.result
        assert outcome.accepted
        assert isinstance(result.output, TextCompletionOutput)
        assert result.output.text == "Hello, you"
        assert result.output.usage.completion_tokens == 3
        assert result.metrics.time_to_first_token_ms is not None
        assert result.metrics.time_to_first_token_ms >= 3.0
        assert result.fingerprint is not None
        assert result.fingerprint.model_sha256 == "a" * 64
    assert station.spool.pending() == []
    assert [e.block_id for e in station.seen.seen if isinstance(e, BlockAcknowledged)] == list(
        coordinator.outcomes
    )


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_several_blocks_at_once(strict_seed: bool) -> None:
    backend = FakeBackend(ScriptedGeneration(token_ms=2.0))
    async with (
        EmbeddedCoordinator(completions(24), strict_seed=strict_seed) as coordinator,
        Station(coordinator.url, backend, max_concurrent_tasks=4),
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 24)


async def test_two_workers_share_the_work() -> None:
    backends = [FakeBackend(SLOW), FakeBackend(SLOW)]
    async with (
        EmbeddedCoordinator(completions(6)) as coordinator,
        Station(coordinator.url, backends[0], worker_id="one"),
        Station(coordinator.url, backends[1], worker_id="two"),
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 6)
    assert {o.worker_id for o in coordinator.outcomes.values()} == {"one", "two"}


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_what_a_worker_cannot_do_is_answered_with_a_code(strict_seed: bool) -> None:
    tasks = [
        TaskSpec(block_id="absent", input={"prompt": "x"}, model_id="mixtral"),
        TaskSpec(block_id="crawl", task_type=TaskType.WEB_CRAWL, input={"url": "x"}),
        TaskSpec(block_id="training", task_type=TaskType.TRAINING_BATCH, input={}),
        TaskSpec(block_id="no prompt", input={"max_tokens": 3}),
        TaskSpec(block_id="too hot", input={"prompt": "x", "temperature": -1.0}),
        TaskSpec(block_id="too long", input={"prompt": "word " * 300}),
        TaskSpec(block_id="good", input={"prompt": "x", "max_tokens": 3}),
    ]
    async with (
        EmbeddedCoordinator(
            tasks, strict_seed=strict_seed, rules=LeaseRules(max_failures=1)
        ) as coordinator,
        Station(coordinator.url, FakeBackend(n_ctx=256)),
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 7)
    assert {block_id: code_of(coordinator, block_id) for block_id in coordinator.outcomes} == {
        "absent": ErrorCode.MODEL_NOT_FOUND,
        "crawl": ErrorCode.UNSUPPORTED_TASK,
        "training": ErrorCode.UNSUPPORTED_TASK,
        "no prompt": ErrorCode.BAD_REQUEST,
        "too hot": ErrorCode.BAD_REQUEST,
        "too long": ErrorCode.CONTEXT_OVERFLOW,
        "good": None,
    }


async def test_a_block_that_misses_its_deadline_says_so_and_the_next_goes_on() -> None:
    tasks = completions(2, max_tokens=500)
    tasks[0] = tasks[0].model_copy(update={"deadline_ms": 150})
    tasks[1] = tasks[1].model_copy(update={"input": {"prompt": "short", "max_tokens": 2}})
    async with (
        EmbeddedCoordinator(tasks, rules=LeaseRules(max_failures=1)) as coordinator,
        Station(coordinator.url, FakeBackend(SLOW)),
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 2)
    late = coordinator.outcomes["b-1"]
    assert late.accepted, "the worker said so itself, before its lease was over"
    assert code_of(coordinator, "b-1") is ErrorCode.DEADLINE_EXCEEDED
    assert coordinator.outcomes["b-2"].result.success


async def test_a_block_that_crashes_the_engine_once_is_computed_by_the_second_try() -> None:
    crash = ScriptedGeneration(error=EngineCrashed("scripted"), error_at=2)
    async with (
        EmbeddedCoordinator(completions(1)) as coordinator,
        Station(coordinator.url, FakeBackend([crash, ScriptedGeneration()])),
    ):
        await coordinator.finished()
    assert_each_block_ended_once(coordinator, 1)
    assert coordinator.outcomes["b-1"].result.success
    assert [str(e.kind) for e in coordinator.history if e.block_id] == [
        "assigned",
        "requeued",
        "assigned",
        "delivered",
    ]


async def test_a_cancelled_block_stops_computing() -> None:
    backend = FakeBackend([HANGS, ScriptedGeneration()])
    async with (
        EmbeddedCoordinator(completions(2)) as coordinator,
        Station(coordinator.url, backend) as station,
    ):
        await station.seen.until(lambda event: isinstance(event, BlockText))
        assert coordinator.cancel("b-1", "requester left")
        await coordinator.finished()
        assert coordinator.outcomes["b-2"].result.success
        # The worker answers for the block that it stopped, and learns that nobody waits for it.
        await station.seen.until(
            lambda event: isinstance(event, BlockAcknowledged) and event.block_id == "b-1"
        )
    assert code_of(coordinator, "b-1") is ErrorCode.CANCELLED
    assert (backend.active, backend.calls.cancelled) == (0, 1)
    assert station.spool.pending() == []


async def test_heartbeats_come_on_time_while_the_engine_works() -> None:
    watch = Watch[Event]()
    async with (
        EmbeddedCoordinator(
            completions(1, max_tokens=40), heartbeat_interval_ms=100, on_event=watch
        ) as coordinator,
        Station(coordinator.url, FakeBackend(SLOW)),
    ):
        await coordinator.finished()
    beats = [e.data["message"].status for e in watch.seen if e.kind is EventKind.HEARTBEAT]
    working = [status.Working for status in beats if not isinstance(status, str)]
    assert len(working) >= 3
    assert {detail.block_id for detail in working} == {"b-1"}
    progress = [detail.progress for detail in working]
    assert progress == sorted(progress)
    assert progress[-1] > progress[0], "and it is the engine's own"


async def test_text_is_streamed_to_a_coordinator_that_understands() -> None:
    watch = Watch[Event]()
    script = ScriptedGeneration(tokens=("a", "b", "c", "d"), token_ms=5.0)
    async with (
        EmbeddedCoordinator(completions(1), on_event=watch) as coordinator,
        Station(coordinator.url, FakeBackend(script), progress_interval=0.0),
    ):
        await coordinator.finished()
    parts = [e.data["message"] for e in watch.seen if e.kind is EventKind.PROGRESS]
    assert [part.sequence for part in parts] == list(range(len(parts)))
    assert len(parts) >= 2
    assert "abcd".startswith("".join(part.text for part in parts))


async def test_a_worker_that_stops_finishes_what_it_has_begun() -> None:
    watch = Watch[Event]()
    async with EmbeddedCoordinator(completions(3), on_event=watch) as coordinator:
        async with Station(coordinator.url, FakeBackend(SLOW)) as station:
            await station.seen.until(lambda event: isinstance(event, BlockStarted))
        assert list(coordinator.outcomes) == ["b-1"]
        assert coordinator.unfinished == 2
        assert any(event.kind is EventKind.GOODBYE for event in coordinator.history)
        assert station.spool.pending() == []


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_a_worker_in_a_hurry_hands_its_block_back(strict_seed: bool) -> None:
    def script(request: GenerateRequest, number: int) -> ScriptedGeneration:
        return HANGS

    async with EmbeddedCoordinator(completions(2), strict_seed=strict_seed) as coordinator:
        async with Station(coordinator.url, FakeBackend(script), worker_id="leaves") as station:
            await station.seen.until(lambda event: isinstance(event, BlockStarted))
            station.worker.stop()
            station.worker.stop()
        # At once, not after a grace or a deadline.
        async with Station(coordinator.url, worker_id="stays"):
            await coordinator.finished()
    assert_each_block_ended_once(coordinator, 2)
    assert {o.worker_id for o in coordinator.outcomes.values()} == {"stays"}


async def test_a_worker_is_asked_to_drain_and_asks_no_more() -> None:
    watch = Watch[Event]()
    async with (
        EmbeddedCoordinator(completions(3), on_event=watch) as coordinator,
        Station(coordinator.url, FakeBackend(SLOW)) as station,
    ):
        await station.seen.until(lambda event: isinstance(event, BlockStarted))
        coordinator.drain("maintenance")
        await station.seen.until(lambda event: isinstance(event, BlockAcknowledged))
        beats = sum(event.kind is EventKind.HEARTBEAT for event in watch.seen)
        assert beats == 0
    assert [str(e.kind) for e in coordinator.history if e.block_id] == ["assigned", "delivered"]


async def test_results_reach_the_callback_as_they_come() -> None:
    outcomes = []
    async with (
        EmbeddedCoordinator(completions(3), outcomes.append) as coordinator,
        Station(coordinator.url),
    ):
        await coordinator.finished()
    assert [o.block_id for o in outcomes] == ["b-1", "b-2", "b-3"]
