"""A coordinator that is a script, and a worker that runs against it: for tests of what is said."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ujson
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from ai4all.backend.base import EngineOptions
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool, ResultSpool
from ai4all.errors import ModelNotFound
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.messages import format_timestamp
from ai4all.protocol.session import SessionOptions
from ai4all.types.model import ModelFile
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import WorkerEvent

SEED_TYPES = {"Register", "Heartbeat", "RequestWork", "SubmitResult"}
PROMPT = "a prompt that nobody may log"
MODELS = {
    name: ModelFile(name, Path(f"{name}.gguf"), digit * 64, 100)
    for name, digit in (("tiny", "a"), ("other", "b"))
}


class Models:
    """A model store that is a dictionary."""

    def get(self, model_id: str) -> ModelFile:
        if model_id not in MODELS:
            raise ModelNotFound(model_id)
        return MODELS[model_id]

    def list(self) -> list[ModelFile]:
        return list(MODELS.values())


def deadline(seconds: float) -> str:
    return format_timestamp(datetime.now(UTC) + timedelta(seconds=seconds))


def assignment(block_id: str = "b-1", *, model_id: str = "tiny", **changes: Any) -> dict[str, Any]:
    task_input = {"prompt": PROMPT, "max_tokens": 5, **changes.pop("input", {})}
    return {
        "type": "Assignment",
        "block_id": block_id,
        "task_type": "TEXT_COMPLETION",
        "input": task_input,
        "deadline": deadline(600),
        "model_id": model_id,
    } | changes


@dataclass
class Coordinator:
    """Follows the first protocol to the letter, and writes down all that it is told."""

    tasks: deque[dict[str, Any]] = field(default_factory=deque)
    extensions: list[str] | None = None
    heartbeat_ms: int = 60_000
    retry_after_ms: int = 100
    acknowledge: bool = True
    refuse: str | None = None
    frames: list[dict[str, Any]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    sockets: list[ServerConnection] = field(default_factory=list)
    port: int = 0

    async def handle(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        with contextlib.suppress(ConnectionClosed):
            async for frame in socket:
                assert isinstance(frame, str)
                self.raw.append(frame)
                self.frames.append(ujson.loads(frame))
                for answer in self.answers(self.frames[-1]):
                    await socket.send(ujson.dumps(answer))

    def answers(self, frame: dict[str, Any]) -> list[dict[str, Any]]:
        match frame["type"]:
            case "Register":
                more = {} if self.extensions is None else {"extensions": self.extensions}
                return [
                    {
                        "type": "Registered",
                        "session_id": "s-1",
                        "heartbeat_interval_ms": self.heartbeat_ms,
                        **more,
                    }
                ]
            case "RequestWork" if self.tasks:
                return [self.tasks.popleft()]
            case "RequestWork":
                return [{"type": "NoWork", "retry_after_ms": self.retry_after_ms}]
            case "SubmitResult" if self.acknowledge:
                return [
                    {
                        "type": "ResultAck",
                        "block_id": frame["block_id"],
                        "accepted": self.refuse is None,
                        "error": self.refuse,
                    }
                ]
        return []

    async def say(self, **frame: Any) -> None:
        await self.sockets[-1].send(ujson.dumps(frame))

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == kind]

    def results(self) -> dict[str, dict[str, Any]]:
        return {frame["block_id"]: frame["result"] for frame in self.of_type("SubmitResult")}

    def raw_results(self) -> list[str]:
        return [raw for raw in self.raw if ujson.loads(raw)["type"] == "SubmitResult"]


@contextlib.asynccontextmanager
async def serving(coordinator: Coordinator, port: int = 0) -> AsyncIterator[None]:
    async with serve(coordinator.handle, "127.0.0.1", port) as server:
        coordinator.port = next(iter(server.sockets)).getsockname()[1]
        yield


@dataclass
class Running:
    """A worker at work."""

    worker: Worker
    task: asyncio.Task[None]
    events: list[WorkerEvent]
    backend: FakeBackend
    spool: ResultSpool

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in itertools.count():
            if condition():
                return
            if self.task.done():
                self.task.result()
                raise AssertionError("the worker ended too early")
            await asyncio.sleep(0.002)

    async def finished(self) -> None:
        await asyncio.wait_for(asyncio.shield(self.task), 20)


@contextlib.asynccontextmanager
async def working(
    coordinator: Coordinator,
    backend: FakeBackend | None = None,
    spool: ResultSpool | None = None,
    *,
    session: dict[str, Any] | None = None,
    link: dict[str, Any] | None = None,
    max_attempts: int = 0,
    **options: Any,
) -> AsyncIterator[Running]:
    backend = backend or FakeBackend()
    spool = MemorySpool() if spool is None else spool
    events: list[WorkerEvent] = []
    worker = Worker(
        backend,
        Models(),
        spool,
        LinkOptions(url=f"ws://127.0.0.1:{coordinator.port}", **(link or {})),
        Attempts(Backoff(1, jitter=0.0, max_attempts=max_attempts), min_session_s=0.0),
        WorkerOptions(
            worker_id="w-1",
            benchmark_score=0.5,
            engine=EngineOptions(n_slots=options.get("max_concurrent_tasks", 1)),
            session=SessionOptions(**(session or {})),
            **options,
        ),
        events.append,
    )
    running = Running(worker, asyncio.create_task(worker.run()), events, backend, spool)
    try:
        yield running
    finally:
        worker.stop()
        worker.stop()
        await asyncio.wait({running.task}, timeout=20)
        await backend.close()
        if not running.task.cancelled():
            running.task.result()


def tokens(*texts: str, **script: Any) -> ScriptedGeneration:
    return ScriptedGeneration(tokens=texts, **script)
