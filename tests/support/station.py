"""A whole worker with a scripted engine, running against a coordinator over a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Self

from watching import Watch

from ai4all.backend.base import EngineOptions
from ai4all.backend.fake import FakeBackend
from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool, ResultSpool
from ai4all.errors import ModelNotFound
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.types.model import ModelFile
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import WorkerEvent

MODEL = ModelFile("benchmark", Path("absent.gguf"), "a" * 64, 100)


class OneModel:
    """A model store with one model."""

    def get(self, model_id: str) -> ModelFile:
        if model_id != MODEL.model_id:
            raise ModelNotFound(model_id)
        return MODEL

    def list(self) -> list[ModelFile]:
        return [MODEL]


class Station:
    """A worker that runs while the context is open, and is stopped politely at its end.

    Args:
        url: The coordinator.
        backend: What computes; words at once by default.
        spool: What keeps results; closed by whoever made it.
        worker_id: Its name.
        reconnect_ms: The interval of its backoff.
        jitter: The share of a delay that is drawn.
        clock: Its machine's clocks.
        options: Further ``WorkerOptions``.

    Attributes:
        seen: What the worker's observer saw.
    """

    def __init__(
        self,
        url: str,
        backend: FakeBackend | None = None,
        spool: ResultSpool | None = None,
        *,
        worker_id: str = "w-1",
        reconnect_ms: int = 20,
        jitter: float = 1.0,
        clock: Clock = SYSTEM_CLOCK,
        **options: Any,
    ) -> None:
        self.backend = FakeBackend() if backend is None else backend
        self.spool: ResultSpool = MemorySpool() if spool is None else spool
        self.seen = Watch[WorkerEvent]()
        options.setdefault("engine", EngineOptions())
        options.setdefault("session", SessionOptions(min_retry=0.02))
        self.worker = Worker(
            self.backend,
            OneModel(),
            self.spool,
            LinkOptions(url=url, open_timeout=5.0, close_timeout=1.0),
            # Of the default shape, but a hundred times as fast and more.
            Attempts(Backoff(reconnect_ms, jitter=jitter)),
            WorkerOptions(worker_id=worker_id, **options),
            self.seen,
            clock=clock,
        )
        self.running: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self.running = asyncio.create_task(self.worker.run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.worker.stop()
        try:
            await self.running
        finally:
            await self.backend.close()

    async def die(self) -> None:
        """End without a word, as by a signal; the spool stays as it is."""
        self.running.cancel()
        await asyncio.wait([self.running])
