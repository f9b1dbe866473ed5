"""A worker and an embedded coordinator in one process, to time what passes between them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import structlog

from ai4all import logs
from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.config import Settings
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import ResultSpool
from ai4all.errors import ModelNotFound
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.types.model import ModelFile
from ai4all.worker import Worker, WorkerOptions

# A worker that found nothing to do asks again after this long.
_RETRY_MS = 2


class OneModel:
    """A model store with one model."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model

    def get(self, model_id: str) -> ModelFile:
        if model_id != self.model.model_id:
            raise ModelNotFound(model_id)
        return self.model

    def list(self) -> list[ModelFile]:
        return [self.model]


class ControlPlane:
    """A coordinator and a worker on one event loop, driven from synchronous code.

    Args:
        model: What the worker has.
        backend: What it computes with; closed at the end.
        spool: What it keeps results in; closed at the end. Both are made on the loop.
        in_flight: Tasks that it takes at once.
        engine: How to run the model.
        heartbeat_ms: The heartbeat's interval.
    """

    def __init__(
        self,
        model: ModelFile,
        backend: Callable[[], InferenceBackend],
        spool: Callable[[], ResultSpool],
        *,
        in_flight: int = 1,
        engine: EngineOptions | None = None,
        heartbeat_ms: int = 10_000,
    ) -> None:
        self.runner = asyncio.Runner()
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._held = AsyncExitStack()
        self._registered: asyncio.Event
        self.backend: InferenceBackend
        self.coordinator: EmbeddedCoordinator
        options = WorkerOptions(
            worker_id="w-1",
            max_concurrent_tasks=in_flight,
            engine=engine or EngineOptions(n_slots=in_flight),
            preload=model,
            session=SessionOptions(min_retry=_RETRY_MS / 1000),
        )
        self.run(self._open(model, backend, spool, options, heartbeat_ms))

    async def _open(
        self,
        model: ModelFile,
        backend: Callable[[], InferenceBackend],
        spool: Callable[[], ResultSpool],
        options: WorkerOptions,
        heartbeat_ms: int,
    ) -> None:
        self._registered = asyncio.Event()
        self.coordinator = await self._held.enter_async_context(
            EmbeddedCoordinator(
                [],
                no_work_retry_ms=_RETRY_MS,
                heartbeat_interval_ms=heartbeat_ms,
                on_event=self._on_event,
            )
        )
        self.backend = await self._held.enter_async_context(backend())
        await self.backend.load(model, options.engine)
        kept = spool()
        self._held.push_async_callback(kept.close)
        link = LinkOptions(url=self.coordinator.url)
        worker = Worker(
            self.backend, OneModel(model), kept, link, Attempts(Backoff(max_attempts=1)), options
        )
        running = asyncio.ensure_future(worker.run())

        async def stop() -> None:
            worker.stop()
            await running

        self._held.push_async_callback(stop)
        await self._registered.wait()

    def _on_event(self, event: Event) -> None:
        match event:
            case Event(kind=EventKind.ASSIGNED, block_id=str(block_id)):
                self._began[block_id] = event.at
            case Event(kind=EventKind.DELIVERED, block_id=str(block_id)):
                self.seconds[block_id] = event.at - self._began.pop(block_id)
            case Event(kind=EventKind.REGISTERED):
                self._registered.set()

    def run(self, work: Awaitable[Any]) -> Any:
        """Run ``work`` on the loop, and meanwhile all the rest."""

        async def waited() -> Any:
            return await work

        return self.runner.run(waited())

    def add(self, count: int, task_input: dict[str, Any]) -> None:
        """Queue tasks; the loop does not run."""

        async def add() -> None:
            for _ in range(count):
                self.coordinator.add(TaskSpec(input=task_input))

        self.run(add())

    def finish(self) -> list[float]:
        """Let all tasks be computed.

        Returns:
            Seconds from assignment to delivery of those that ended since the last call, as the
            coordinator saw them.
        """
        self.run(self.coordinator.finished())
        seconds, self.seconds = list(self.seconds.values()), {}
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.run(self._held.aclose())
        finally:
            self.runner.close()


@contextmanager
def logging_to_file(data_dir: Path) -> Iterator[None]:
    """Log as the command line does by default: to a file, warnings to the terminal as well."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure_logging(Settings(data_dir=data_dir), quiet=True)
    try:
        yield
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()


def fsyncs_per_second(directory: Path, payload: bytes = b"x" * 1500) -> float:
    """Bare ``fsync`` calls, each after a write of ``payload``, on the disk of ``directory``."""
    descriptor = os.open(directory / "fsync", os.O_RDWR | os.O_CREAT)
    try:
        started = time.perf_counter()
        for n in range(100):
            os.pwrite(descriptor, payload, n * len(payload))
            os.fsync(descriptor)
        return 100 / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
