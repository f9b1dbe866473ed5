"""Kills ``ai4all-native worker`` where it hurts most, or its engine, and looks at what comes next.

All processes and sockets are the real ones; the model is the tiny one. What is measured includes
the start of the next process: the interpreter, the settings, the spool, the link.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import ujson
from scripted_coordinator import Coordinator, assignment, serving
from worker_process import worker_process

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec

__all__ = ["EngineKill", "Redelivery", "kill_after_commit", "kill_engine"]

_PATIENCE_S = 100.0


@dataclass(frozen=True, slots=True)
class EngineKill:
    """What a coordinator saw of an engine that was killed in the middle of a block.

    Attributes:
        code: What it was told of the block; None for nothing.
        retryable: Whether it may give the block out again.
        told: Seconds from the blow until it was told.
        back: Seconds from then until the next block was delivered.
        heartbeats: Heartbeats from the blow to that.
        drops: Connections that ended before.
    """

    code: str | None
    retryable: bool
    told: float
    back: float
    heartbeats: int
    drops: int


@dataclass(frozen=True, slots=True)
class Redelivery:
    """What a coordinator saw of a worker that was killed before its result was acknowledged.

    Attributes:
        seconds: From the start of the next process until the result was here.
        is_same: Whether it had the same bytes.
        repeats: How often it came once it had been acknowledged.
    """

    seconds: float
    is_same: bool
    repeats: int


async def kill_engine(command: Sequence[str], environment: dict[str, str]) -> EngineKill:
    """Kill the engine's process while it computes.

    Args:
        command: A worker's arguments; the coordinator's address is added.
        environment: Its variables. The first run is done.
    """
    engine_killed_at = told_at = 0.0
    heartbeats = drops = 0
    changed = asyncio.Event()
    worker_pid = 0

    def on_event(event: Event) -> None:
        nonlocal engine_killed_at, told_at, heartbeats, drops
        match event.kind:
            case EventKind.PROGRESS if event.block_id == "victim" and not engine_killed_at:
                (engine,) = psutil.Process(worker_pid).children()
                engine_killed_at = time.monotonic()
                os.kill(engine.pid, signal.SIGKILL)
            case EventKind.FAILED:
                told_at = event.at
            case EventKind.HEARTBEAT:
                heartbeats += engine_killed_at > 0.0
            case EventKind.DISCONNECTED:
                drops += 1
        changed.set()

    tasks = [
        TaskSpec(
            block_id=name,
            input={"prompt": "the sea", "max_tokens": length, "temperature": 0.0},
        )
        for name, length in (("victim", 2500), ("next", 8))
    ]
    async with EmbeddedCoordinator(
        tasks,
        heartbeat_interval_ms=200,
        rules=LeaseRules(max_failures=1),
        on_event=on_event,
    ) as coordinator:
        async with (
            worker_process(*command, coordinator.url, env=environment) as running,
            asyncio.timeout(_PATIENCE_S),
        ):
            worker_pid = running.process.pid
            await coordinator.finished()
            back_at = time.monotonic()
            # The link outlives it all.
            seen = heartbeats
            while heartbeats < seen + 2:
                changed.clear()
                await changed.wait()
            drops_before_the_end = drops
            running.process.terminate()
            await running.process.wait()
        outcomes = coordinator.outcomes
    assert outcomes["next"].result.success, outcomes["next"].result.error
    error = outcomes["victim"].result.error
    return EngineKill(
        code=None if error is None else error.code.value,
        retryable=error is not None and error.retryable,
        told=told_at - engine_killed_at,
        back=back_at - told_at,
        heartbeats=heartbeats,
        drops=drops_before_the_end,
    )


async def kill_after_commit(command: Sequence[str], environment: dict[str, str]) -> Redelivery:
    """Kill the worker when its result has been sent, and so committed, but is not acknowledged."""
    coordinator = Coordinator(acknowledge=False)
    task_input = {"max_tokens": 64, "temperature": 0.0}
    coordinator.tasks.append(assignment("b-1", model_id="benchmark", input=task_input))

    async def until_there_are(count: int) -> list[str]:
        while len(results := coordinator.raw_results()) < count:
            await asyncio.sleep(0.002)
        return results

    async with serving(coordinator), asyncio.timeout(_PATIENCE_S):
        url = f"ws://127.0.0.1:{coordinator.port}"
        async with worker_process(*command, url, env=environment) as running:
            (first,) = await until_there_are(1)
            running.process.kill()
            await running.process.wait()
        coordinator.acknowledge = True
        started_at = time.monotonic()
        async with worker_process(*command, url, env=environment) as running:
            again = (await until_there_are(2))[1]
            seconds = time.monotonic() - started_at
            # What was acknowledged is not sent again: it goes on with new work.
            asked = len(coordinator.of_type("RequestWork"))
            while len(coordinator.of_type("RequestWork")) == asked:
                await asyncio.sleep(0.002)
            running.process.terminate()
            await running.process.wait()
    assert ujson.loads(first)["result"]["success"], first
    return Redelivery(seconds, again == first, len(coordinator.raw_results()) - 2)
