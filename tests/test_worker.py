from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest
from chaos_proxy import Blow, ChaosProxy
from scripted_coordinator import (
    MODELS,
    PROMPT,
    SEED_TYPES,
    Coordinator,
    assignment,
    deadline,
    serving,
    tokens,
    working,
)
from structlog.testing import capture_logs

import ai4all.blocks
import ai4all.worker
from ai4all.backend.base import (
    GenerateRequest,
    GenerationEvent,
    PromptProgress,
)
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.delivery.spool import MemorySpool
from ai4all.errors import EngineClosed, EngineCrashed, LoadFailed, SpoolError
from ai4all.protocol.codec import decode_client_message
from ai4all.protocol.messages import SubmitResult
from ai4all.worker_events import BlockAcknowledged, BlockText, LinkDown, LinkUp


async def test_a_block_from_assignment_to_acknowledgement() -> None:
    script = tokens(" Good", " day", queue_ms=1.0, prompt_ms=20.0, token_ms=2.0)
    coordinator = Coordinator(deque([assignment()]))
    backend = FakeBackend(script, load_ms=7.0, time_scale=0.0)
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: BlockAcknowledged("b-1", True, None) in running.events)
        await running.until(lambda: not running.spool.pending())
    result = coordinator.results()["b-1"]
    assert result["success"] is True
    assert result["error"] is None
    assert result["output"] == {
        "task_type": "TEXT_COMPLETION",
        "text": " Good day",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8},
        "generation_time_ms": 24,
    }
    assert result["metrics"] == {
        "queue_time_ms": 1.0,
        "execution_time_ms": 24.0,
        "total_time_ms": 32.0,
        "load_time_ms": 7.0,
        "prompt_time_ms": 20.0,
        "time_to_first_token_ms": 23.0,
        "tokens_processed": 8,
        "tokens_per_second": 500.0,
        "peak_memory_mb": 256,
    }
    assert result["fingerprint"]["model_sha256"] == "a" * 64
    assert {frame["type"] for frame in coordinator.frames} <= SEED_TYPES
    kinds = [event for event in running.events if isinstance(event, LinkUp | BlockText)]
    assert kinds == [LinkUp("s-1"), BlockText("b-1", " Good"), BlockText("b-1", " day")]
    for raw in coordinator.raw_results():
        assert isinstance(decode_client_message(raw), SubmitResult)


async def test_what_it_says_of_itself() -> None:
    coordinator = Coordinator()
    async with serving(coordinator), working(coordinator, max_concurrent_tasks=3) as running:
        await running.until(lambda: len(coordinator.of_type("RequestWork")) >= 3)
    register = coordinator.frames[0]
    assert register["type"] == "Register"
    assert register["benchmark_score"] == 0.5
    capabilities = register["capabilities"]
    assert capabilities["supported_tasks"] == [
        "TEXT_COMPLETION",
        "EMBEDDINGS",
        "CLASSIFICATION",
        "QUESTION_ANSWERING",
        "SUMMARIZATION",
        "VALIDATION",
    ]
    assert capabilities["supports_training"] is False
    assert capabilities["compute_score"] == 0.5
    assert capabilities["max_concurrent_tasks"] == 3
    assert capabilities["memory_mb"] > 0
    assert [model["model_id"] for model in capabilities["models"]] == ["tiny", "other"]


async def test_a_result_is_kept_before_it_is_sent() -> None:
    order: list[str] = []

    class Watched(MemorySpool):
        async def commit(
            self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
        ) -> None:
            await asyncio.sleep(0.05)
            assert not coordinator.of_type("SubmitResult")
            order.append("committed")
            await super().commit(block_id, payload, kept)

        async def forget(self, block_id: str) -> None:
            assert coordinator.of_type("SubmitResult")
            await super().forget(block_id)
            order.append("forgotten")

    coordinator = Coordinator(deque([assignment()]))
    async with serving(coordinator), working(coordinator, spool=Watched()) as running:
        await running.until(lambda: "forgotten" in order)
    assert order == ["committed", "forgotten"]


async def test_a_refused_result_is_forgotten_too() -> None:
    coordinator = Coordinator(deque([assignment()]), refuse="too late")
    async with serving(coordinator), working(coordinator) as running:
        await running.until(lambda: BlockAcknowledged("b-1", False, "too late") in running.events)
        await running.until(lambda: not running.spool.pending())


async def test_heartbeats_tell_the_truth_while_the_engine_works() -> None:
    script = ScriptedGeneration(prompt_ms=100.0, prompt_chunks=3, token_ms=40.0)
    coordinator = Coordinator(deque([assignment(input={"max_tokens": 20})]), heartbeat_ms=100)
    async with serving(coordinator), working(coordinator, FakeBackend(script)) as running:
        await running.until(lambda: bool(coordinator.results()))
        before = len(coordinator.of_type("Heartbeat"))
        await running.until(lambda: len(coordinator.of_type("Heartbeat")) > before)
    statuses = [frame["status"] for frame in coordinator.of_type("Heartbeat")]
    shares = [s["Working"]["progress"] for s in statuses if isinstance(s, dict)]
    assert len(shares) >= 3
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] <= 1.0
    assert statuses[-1] == "Idle"
    assert coordinator.of_type("Heartbeat")[0]["resource_usage"]["memory_mb"] == 256


UNFIT = [
    ({"model_id": "mixtral"}, "model_not_found", "mixtral"),
    ({"task_type": "WEB_CRAWL"}, "unsupported_task", "WEB_CRAWL"),
    ({"task_type": "TRAINING_BATCH", "input": {}}, "unsupported_task", "TRAINING_BATCH"),
    ({"task_type": "PAINTING"}, "unsupported_task", "task type"),
    ({"input": {"prompt": 7}}, "bad_request", "input.prompt: "),
    ({"input": {"max_tokens": 0}}, "bad_request", "input.max_tokens: "),
    ({"input": {"temperature": -1}}, "bad_request", "input.temperature: "),
    ({"input": {"grammar": "x", "json_schema": {}}}, "bad_request", "input.grammar: "),
    ({"deadline": "tomorrow"}, "bad_request", "Assignment.deadline: "),
    ({"deadline": deadline(-1)}, "deadline_exceeded", "deadline"),
]


@pytest.mark.parametrize("declines", [False, True])
async def test_unfit_assignments_are_answered_and_the_work_goes_on(declines: bool) -> None:
    tasks = [assignment(f"b-{i}", **change) for i, (change, _, _) in enumerate(UNFIT)]
    tasks.append(assignment("good"))
    coordinator = Coordinator(deque(tasks), extensions=["decline"] if declines else None)
    async with serving(coordinator), working(coordinator) as running:
        await running.until(lambda: "good" in coordinator.results())
    if declines:
        errors = {frame["block_id"]: frame["error"] for frame in coordinator.of_type("Decline")}
        assert set(coordinator.results()) == {"good"}
    else:
        results = coordinator.results()
        assert results.pop("good")["success"] is True
        assert not any(result["success"] or result["output"] for result in results.values())
        errors = {block_id: result["error"] for block_id, result in results.items()}
        assert {frame["type"] for frame in coordinator.frames} <= SEED_TYPES
    for i, (_, code, text) in enumerate(UNFIT):
        error = errors[f"b-{i}"]
        assert (error["code"], text in error["message"]) == (code, True), error
    assert running.backend.calls.generations == 1


async def test_what_only_the_engine_can_see_is_answered_too() -> None:
    long = assignment("long", input={"prompt": "word " * 99})
    coordinator = Coordinator(deque([long, assignment("good")]), extensions=["decline"])
    async with serving(coordinator), working(coordinator, FakeBackend(n_ctx=50)) as running:
        await running.until(lambda: "good" in coordinator.results())
    assert coordinator.results()["long"]["error"]["code"] == "context_overflow"
    assert coordinator.results()["good"]["success"]


async def test_the_deadline_ends_a_generation() -> None:
    script = ScriptedGeneration(token_ms=40.0)
    late = assignment("late", deadline=deadline(0.2), input={"max_tokens": 1000})
    coordinator = Coordinator(deque([late, assignment("good")]))
    async with serving(coordinator), working(coordinator, FakeBackend(script)) as running:
        await running.until(lambda: "good" in coordinator.results())
    result = coordinator.results()["late"]
    assert result["error"]["code"] == "deadline_exceeded"
    assert result["error"]["retryable"] is True
    assert 0 < result["error"]["details"]["completion_tokens"] < 1000
    metrics = result["metrics"]
    assert set(metrics) == {"queue_time_ms", "execution_time_ms", "total_time_ms"}
    assert metrics["total_time_ms"] == pytest.approx(
        metrics["queue_time_ms"] + metrics["execution_time_ms"]
    )


async def test_an_engine_that_ignores_the_deadline_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ai4all.blocks, "_HANG_SLACK_S", 0.05)
    scripts = [ScriptedGeneration(hang_at=1), ScriptedGeneration()]
    hung = assignment("hung", deadline=deadline(0.1), timestamp=deadline(0.0))
    coordinator = Coordinator(deque([hung, assignment("good")]))
    async with serving(coordinator), working(coordinator, FakeBackend(scripts)) as running:
        await running.until(lambda: "good" in coordinator.results())
    assert coordinator.results()["hung"]["error"]["code"] == "engine_hung"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineCrashed("abort in the engine"), "engine_crashed"),
        (EngineClosed("closed"), "engine_crashed"),
        (LoadFailed("bad file"), "load_failed"),
    ],
)
async def test_engine_faults_are_answered_and_the_work_goes_on(error: Any, code: str) -> None:
    scripts = [ScriptedGeneration(error=error, error_at=2), ScriptedGeneration()]
    coordinator = Coordinator(deque([assignment("bad"), assignment("good")]))
    async with serving(coordinator), working(coordinator, FakeBackend(scripts)) as running:
        await running.until(lambda: "good" in coordinator.results())
    assert coordinator.results()["bad"]["error"]["code"] == code
    assert coordinator.results()["good"]["success"]


async def test_a_bug_costs_one_block_and_shows_no_prompt() -> None:
    def script(request: GenerateRequest, number: int) -> ScriptedGeneration:
        if request.max_tokens == 1:
            raise ZeroDivisionError(f"in {request.prompt}")
        return ScriptedGeneration()

    bad = assignment("bad", input={"max_tokens": 1})
    coordinator = Coordinator(deque([bad, assignment("good")]))
    with capture_logs() as logs:
        async with serving(coordinator), working(coordinator, FakeBackend(script)) as running:
            await running.until(lambda: "good" in coordinator.results())
    assert coordinator.results()["good"]["success"]
    error = coordinator.results()["bad"]["error"]
    assert error["code"] == "engine_crashed"
    assert "ZeroDivisionError" in error["message"]
    (entry,) = [entry for entry in logs if entry["event"] == "block_failed_unexpectedly"]
    assert entry["error"] == "ZeroDivisionError"
    assert any("fake.py" in place for place in entry["places"])
    assert PROMPT not in repr(logs) + repr(coordinator.results()["bad"])


async def test_nothing_of_a_block_is_logged() -> None:
    coordinator = Coordinator(deque([assignment()]), extensions=["progress"])
    with capture_logs() as logs:
        async with (
            serving(coordinator),
            working(coordinator, FakeBackend(tokens(" secret answer"))) as running,
        ):
            await running.until(lambda: bool(coordinator.results()))
    assert {"registered", "block_started", "block_finished"} <= {e["event"] for e in logs}
    assert "secret" not in repr(logs)
    assert PROMPT not in repr(logs)


async def test_a_load_that_fails_is_answered() -> None:
    backend = FakeBackend(load_error=LoadFailed("not a model"))
    coordinator = Coordinator(deque([assignment("one"), assignment("two")]))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: "two" in coordinator.results())
    codes = {r["error"]["code"] for r in coordinator.results().values()}
    assert codes == {"load_failed"}


async def test_models_change_when_the_blocks_of_the_old_one_are_done() -> None:
    tasks = [
        assignment(f"b-{i}", model_id=("tiny", "other")[i // 2 % 2], input={"max_tokens": 3})
        for i in range(8)
    ]
    coordinator = Coordinator(deque(tasks))
    backend = FakeBackend(ScriptedGeneration(token_ms=2.0), load_ms=5.0)
    async with (
        serving(coordinator),
        working(coordinator, backend, max_concurrent_tasks=4) as running,
    ):
        await running.until(lambda: len(coordinator.results()) == 8)
    for i in range(8):
        sha256 = coordinator.results()[f"b-{i}"]["fingerprint"]["model_sha256"]
        assert sha256 == "ab"[i // 2 % 2] * 64
    assert backend.calls.loads == 4


async def test_a_model_can_be_loaded_beforehand() -> None:
    coordinator = Coordinator()
    backend = FakeBackend()
    async with (
        serving(coordinator),
        working(coordinator, backend, preload=MODELS["other"]) as running,
    ):
        await running.until(lambda: backend.loaded is not None)
        assert backend.loaded is not None
        assert backend.loaded.file == MODELS["other"]
        coordinator.tasks.append(assignment(model_id="other"))
        await running.until(lambda: bool(coordinator.results()))
    assert backend.calls.loads == 1


async def test_as_many_blocks_as_slots() -> None:
    tasks = [assignment(f"b-{i}", input={"max_tokens": 10}) for i in range(6)]
    coordinator = Coordinator(deque(tasks), heartbeat_ms=100)
    backend = FakeBackend(ScriptedGeneration(token_ms=40.0))
    seen: set[int] = set()
    async with (
        serving(coordinator),
        working(coordinator, backend, max_concurrent_tasks=3) as running,
    ):
        await running.until(
            lambda: seen.add(backend.active) or len(coordinator.results()) == 6  # type: ignore[func-returns-value]
        )
    assert max(seen) == 3
    actives = [frame["active_blocks"] for frame in coordinator.of_type("Heartbeat")]
    assert ["b-0", "b-1", "b-2"] in actives


async def test_a_flood_of_assignments_is_handed_back() -> None:
    coordinator = Coordinator(deque([assignment("b-0")]))
    backend = FakeBackend(ScriptedGeneration(token_ms=5.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: bool(coordinator.of_type("RequestWork")))
        for i in range(1, 6):
            await coordinator.say(**assignment(f"b-{i}"))
        await running.until(lambda: len(coordinator.results()) == 6)
    results = coordinator.results()
    done = [block_id for block_id, result in results.items() if result["success"]]
    assert set(done) == {"b-0", "b-1"}
    assert all(results[b]["error"]["code"] == "preempted" for b in results if b not in done)


async def test_no_work_is_waited_out() -> None:
    coordinator = Coordinator(retry_after_ms=150)
    async with serving(coordinator), working(coordinator) as running:
        await running.until(lambda: len(coordinator.of_type("RequestWork")) == 2)
        coordinator.tasks.append(assignment())
        await running.until(lambda: bool(coordinator.results()))


async def test_a_lost_link_costs_nothing() -> None:
    coordinator = Coordinator(deque([assignment(input={"max_tokens": 10})]))
    backend = FakeBackend(ScriptedGeneration(token_ms=20.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        coordinator.sockets[-1].transport.abort()
        await running.until(lambda: bool(coordinator.results()))
        await running.until(lambda: not running.spool.pending())
    assert any(isinstance(event, LinkDown) for event in running.events)
    assert coordinator.results()["b-1"]["success"]
    assert len(coordinator.raw_results()) == 1
    assert backend.calls.generations == 1


async def test_a_coordinator_that_was_away_gets_the_result() -> None:
    coordinator = Coordinator(deque([assignment(input={"max_tokens": 5})]))
    backend = FakeBackend(ScriptedGeneration(token_ms=20.0))
    async with contextlib.AsyncExitStack() as stack:
        async with serving(coordinator):
            running = await stack.enter_async_context(working(coordinator, backend))
            await running.until(lambda: backend.active == 1)
        await running.until(lambda: bool(running.spool.pending()))
        assert not coordinator.results()
        async with serving(coordinator, coordinator.port):
            await running.until(lambda: not running.spool.pending())
            running.worker.stop()
            await running.finished()
    assert len(coordinator.raw_results()) == 1


async def test_unacknowledged_results_are_sent_again_byte_for_byte() -> None:
    coordinator = Coordinator(deque([assignment()]), acknowledge=False, extensions=["reconcile"])
    async with serving(coordinator), working(coordinator) as running:
        for count in (1, 2, 3):
            await running.until(lambda count=count: len(coordinator.raw_results()) == count)
            coordinator.sockets[-1].transport.abort()
        coordinator.acknowledge = True
        await running.until(lambda: not running.spool.pending())
    assert len(set(coordinator.raw_results())) == 1
    assert coordinator.of_type("Reconcile")[-1]["unacknowledged"] == ["b-1"]
    assert running.backend.calls.generations == 1


async def test_results_outlive_the_process() -> None:
    spool = MemorySpool()
    coordinator = Coordinator(deque([assignment()]), acknowledge=False)
    async with serving(coordinator):
        async with working(coordinator, spool=spool) as running:
            await running.until(lambda: bool(coordinator.results()))
        assert [block_id for block_id, _ in spool.pending()] == ["b-1"]
        coordinator.acknowledge = True
        async with working(coordinator, spool=spool) as running:
            await running.until(lambda: not spool.pending())
    first, second = coordinator.raw_results()
    assert first == second


async def test_a_block_is_not_computed_twice() -> None:
    coordinator = Coordinator(deque([assignment()]), acknowledge=False)
    backend = FakeBackend(ScriptedGeneration(token_ms=20.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        await coordinator.say(**assignment())
        await running.until(lambda: len(coordinator.raw_results()) == 1)
        await coordinator.say(**assignment())
        await running.until(lambda: len(coordinator.raw_results()) == 2)
    assert len(set(coordinator.raw_results())) == 1
    assert backend.calls.generations == 1


async def test_cancel_stops_the_engine_and_is_answered() -> None:
    coordinator = Coordinator(
        deque([assignment(input={"max_tokens": 100_000})]), extensions=["cancel"]
    )
    backend = FakeBackend(ScriptedGeneration(token_ms=10.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        await coordinator.say(type="Cancel", block_id="b-1", reason="requester left")
        await running.until(lambda: bool(coordinator.results()))
        assert backend.active == 0
        coordinator.tasks.append(assignment("next"))
        await running.until(lambda: "next" in coordinator.results())
    error = coordinator.results()["b-1"]["error"]
    assert (error["code"], error["message"], error["retryable"]) == (
        "cancelled",
        "requester left",
        False,
    )
    assert backend.calls.cancelled == 1


@pytest.mark.parametrize("extensions", [["cancel"], ["cancel", "decline"]])
async def test_cancel_that_comes_with_its_assignment_is_heeded(extensions: list[str]) -> None:
    coordinator = Coordinator(extensions=extensions)
    backend = FakeBackend(ScriptedGeneration(token_ms=10.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: bool(coordinator.of_type("RequestWork")))
        # Nothing in between lets the worker have the first before the second.
        await coordinator.say(**assignment(input={"max_tokens": 100_000}))
        await coordinator.say(type="Cancel", block_id="b-1")
        await running.until(
            lambda: bool(coordinator.of_type("Decline") or coordinator.of_type("SubmitResult"))
        )
        coordinator.tasks.append(assignment("next"))
        await running.until(lambda: "next" in coordinator.results())
    if "decline" in extensions:
        error = coordinator.of_type("Decline")[0]["error"]
    else:
        error = coordinator.results()["b-1"]["error"]
    assert error["code"] == "cancelled"
    assert backend.calls.cancelled == 0


async def test_drain_stops_the_asking_and_finishes() -> None:
    coordinator = Coordinator(deque([assignment()]), extensions=["drain"], heartbeat_ms=100)
    backend = FakeBackend(ScriptedGeneration(token_ms=10.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        await coordinator.say(type="Drain")
        coordinator.tasks.append(assignment("never"))
        await running.until(lambda: bool(coordinator.results()))
        beats = len(coordinator.of_type("Heartbeat"))
        await running.until(lambda: len(coordinator.of_type("Heartbeat")) >= beats + 2)
        assert set(coordinator.results()) == {"b-1"}
        assert len(coordinator.tasks) == 1


async def test_progress_streams_where_it_is_spoken() -> None:
    coordinator = Coordinator(
        deque([assignment(input={"max_tokens": 10})]), extensions=["progress"]
    )
    backend = FakeBackend(ScriptedGeneration(token_ms=5.0))
    async with (
        serving(coordinator),
        working(coordinator, backend, progress_interval=0.0) as running,
    ):
        await running.until(lambda: bool(coordinator.results()))
    frames = coordinator.of_type("Progress")
    assert [frame["sequence"] for frame in frames] == list(range(10))
    assert [frame["completion_tokens"] for frame in frames] == list(range(1, 11))
    text = "".join(frame["text"] for frame in frames)
    assert text == coordinator.results()["b-1"]["output"]["text"]


async def test_stop_lets_a_running_block_finish() -> None:
    coordinator = Coordinator(deque([assignment(), assignment("never")]), extensions=["goodbye"])
    backend = FakeBackend(ScriptedGeneration(token_ms=20.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        running.worker.stop()
        await running.finished()
        assert coordinator.results()["b-1"]["success"]
        assert not running.spool.pending()
    assert set(coordinator.results()) == {"b-1"}
    goodbye = coordinator.frames[-1]
    assert (goodbye["type"], goodbye["reason"], goodbye["abandoned"]) == (
        "Goodbye",
        "shutdown",
        [],
    )
    assert coordinator.sockets[-1].close_code == 1000


@pytest.mark.parametrize("twice", [False, True])
async def test_stop_hands_back_what_does_not_finish(twice: bool) -> None:
    coordinator = Coordinator(deque([assignment(input={"max_tokens": 100_000})]))
    backend = FakeBackend(ScriptedGeneration(token_ms=10.0))
    async with (
        serving(coordinator),
        working(coordinator, backend, stop_grace=600.0 if twice else 0.05) as running,
    ):
        await running.until(lambda: backend.active == 1)
        running.worker.stop()
        if twice:
            running.worker.stop()
        await running.finished()
    error = coordinator.results()["b-1"]["error"]
    assert (error["code"], error["retryable"]) == ("shutting_down", True)
    # No answer for good: the block may come to us again.
    assert not running.spool.pending()
    assert backend.active == 0
    assert {frame["type"] for frame in coordinator.frames} <= SEED_TYPES


async def test_stop_does_not_wait_for_an_engine_that_never_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ai4all.worker, "_LAST_CANCELLATION_S", 0.05)

    class Stubborn(FakeBackend):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
            reached.set()
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()
            yield PromptProgress(1, 1)

    reached, released = asyncio.Event(), asyncio.Event()
    coordinator = Coordinator(deque([assignment()]))
    with capture_logs() as logs:
        async with (
            serving(coordinator),
            working(coordinator, Stubborn(), stop_grace=0.05) as running,
        ):
            await reached.wait()
            running.worker.stop()
            await running.finished()
            released.set()
            await asyncio.sleep(0.05)
    assert "tasks_left_behind" in [entry["event"] for entry in logs]


async def test_stop_does_not_wait_for_everything_that_hangs_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine never lets go, the line is silent, and the disk does not answer."""
    monkeypatch.setattr(ai4all.worker, "_LEAVE_WITHIN_S", 0.5)
    released = asyncio.Event()

    class Stubborn(FakeBackend):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()
            yield PromptProgress(1, 1)

    class Stuck(MemorySpool):
        async def forget(self, block_id: str) -> None:
            await released.wait()

    backend = Stubborn()
    coordinator = Coordinator(deque([assignment()]))
    async with serving(coordinator), ChaosProxy(coordinator.port) as proxy:
        coordinator.port = proxy.port
        async with working(coordinator, backend, Stuck(), stop_grace=0.05) as running:
            await running.until(lambda: bool(running.worker._blocks))
            await running.spool.commit("any", b"x")
            running.worker._delivery.acknowledged("any")
            proxy.strike(Blow.STALL)
            running.worker.stop()
            # Each of them alone may take longer than all together.
            done, _ = await asyncio.wait({running.task}, timeout=9.0)
            released.set()
            assert done


async def test_stop_without_a_coordinator_ends_at_once() -> None:
    coordinator = Coordinator()
    async with serving(coordinator):
        pass
    async with working(coordinator) as running:
        await asyncio.sleep(0.05)
        running.worker.stop()
        await running.finished()


async def test_an_assignment_that_comes_too_late_is_handed_back() -> None:
    coordinator = Coordinator(deque([assignment()]))
    backend = FakeBackend(ScriptedGeneration(token_ms=30.0))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.active == 1)
        running.worker.stop()
        await coordinator.say(**assignment("late"))
        await running.finished()
    assert coordinator.results()["b-1"]["success"]
    assert coordinator.results()["late"]["error"]["code"] == "shutting_down"


async def test_a_spool_that_fails_stops_the_asking_but_loses_nothing() -> None:
    class Full(MemorySpool):
        async def commit(
            self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
        ) -> None:
            raise SpoolError("results.sqlite3", "the disk is full")

        async def forget(self, block_id: str) -> None:
            raise SpoolError("results.sqlite3", "the disk is full")

    coordinator = Coordinator(deque([assignment(), assignment("never")]), heartbeat_ms=100)
    async with serving(coordinator), working(coordinator, spool=Full()) as running:
        await running.until(lambda: len(coordinator.of_type("Heartbeat")) >= 2)
    assert set(coordinator.results()) == {"b-1"}
    assert coordinator.results()["b-1"]["success"]
    status = coordinator.of_type("Heartbeat")[-1]["status"]
    assert "the disk is full" in status["Error"]["message"]
    assert len(coordinator.tasks) == 1


async def test_a_block_has_one_result_for_ever() -> None:
    class Forgetful(MemorySpool):
        async def forget(self, block_id: str) -> None:
            raise SpoolError("results.sqlite3", "busy")

    coordinator = Coordinator(deque([assignment(), assignment()]))
    async with serving(coordinator), working(coordinator, spool=Forgetful()) as running:
        await running.until(lambda: len(coordinator.raw_results()) == 2)
    first, second = coordinator.raw_results()
    assert first == second


async def test_a_result_that_no_message_can_hold() -> None:
    coordinator = Coordinator(deque([assignment("big"), assignment("good")]))
    scripts = [tokens(*["x" * 1000] * 5), tokens(" small")]
    async with (
        serving(coordinator),
        working(coordinator, FakeBackend(scripts), link={"max_size": 4000}) as running,
    ):
        await running.until(lambda: "good" in coordinator.results())
    error = coordinator.results()["big"]["error"]
    assert error["code"] == "bad_request"
    assert "ask for less" in error["message"]
    assert len(coordinator.sockets) == 1


async def test_a_result_that_json_cannot_hold() -> None:
    coordinator = Coordinator(deque([assignment("bad"), assignment("good")]))
    scripts = [ScriptedGeneration(error=EngineCrashed("\ud800")), ScriptedGeneration()]
    async with serving(coordinator), working(coordinator, FakeBackend(scripts)) as running:
        await running.until(lambda: "good" in coordinator.results())
    assert coordinator.results()["bad"]["error"]["code"] == "engine_crashed"


async def test_blocks_that_an_earlier_process_lost_are_known() -> None:
    spool = MemorySpool(interrupted=["b-0"])
    coordinator = Coordinator(extensions=["reconcile"])
    with capture_logs() as logs:
        async with serving(coordinator), working(coordinator, spool=spool) as running:
            await running.until(lambda: bool(coordinator.of_type("Reconcile")))
    assert spool.interrupted == ()
    assert "block_lost_in_restart" in [log["event"] for log in logs]
    assert coordinator.of_type("Reconcile")[0]["running"] == []


async def test_as_many_blocks_as_the_options_say_now() -> None:
    backend = FakeBackend(ScriptedGeneration(hang_at=1))
    coordinator = Coordinator(deque(assignment(f"b-{n}") for n in range(6)))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: backend.calls.generations == 1)
        options, link = running.worker._options, running.worker._connection._options
        running.worker.reconfigure(replace(options, max_concurrent_tasks=3), link)
        await running.until(lambda: backend.calls.generations == 3)
        running.worker.reconfigure(options, link)
        assert running.worker._describe().max_concurrent_tasks == 1
        running.worker.stop()
        running.worker.stop()
        await running.finished()
    assert backend.calls.generations == 3
    assert set(coordinator.results()) == {"b-0", "b-1", "b-2"}


async def test_another_way_to_run_models_begins_with_the_next_block() -> None:
    backend = FakeBackend(tokens(" a"))
    coordinator = Coordinator(deque([assignment("b-0")]))
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: bool(running.spool.pending()) or "b-0" in coordinator.results())
        options, link = running.worker._options, running.worker._connection._options
        running.worker.reconfigure(replace(options, stop_grace=1.0), link)
        coordinator.tasks.append(assignment("b-1"))
        await running.until(lambda: "b-1" in coordinator.results())
        assert backend.calls.loads == 1, "nothing about models has changed"
        engine = replace(options.engine, threads=3)
        running.worker.reconfigure(replace(options, engine=engine), link)
        coordinator.tasks += [assignment("b-2"), assignment("b-3")]
        await running.until(lambda: "b-3" in coordinator.results())
        assert backend.calls.loads == 2
        assert backend.loaded is not None
        assert backend.loaded.threads == 3


async def test_a_link_that_fails_for_good_ends_the_worker() -> None:
    from ai4all.errors import VersionMismatch

    class Foreign(Coordinator):
        def answers(self, frame: dict[str, Any]) -> list[dict[str, Any]]:
            version = {"major": 2, "minor": 0, "patch": 0}
            return [answer | {"version": version} for answer in super().answers(frame)]

    coordinator = Foreign()
    async with serving(coordinator):
        with pytest.raises(VersionMismatch):
            async with working(
                coordinator, link={"refusal_delay": 0.01}, max_attempts=2
            ) as running:
                await running.finished()
