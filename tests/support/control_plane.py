"""A worker in this process and a coordinator in another, to time what passes between them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import load_coordinator
import structlog
import ujson

from ai4all import logs
from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.config import Settings
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import ResultSpool
from ai4all.errors import ModelNotFound
from ai4all.protocol.connection import LinkOptions
from ai4all.types.model import ModelFile
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import LinkUp, WorkerEvent


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What became of the tasks of one order.

    Attributes:
        wall_s: From the first assignment to the last acknowledgement.
        cpu_s: Processor time of the coordinator meanwhile: far below ``wall_s``, or it is the
            bottleneck.
        seconds: From assignment to result for each task, as the coordinator saw it.
        socket_seconds: The same from the bytes of the one, on their way into the coordinator's
            socket, to those of the other, out of it.
        failed: Results without success.
    """

    wall_s: float
    cpu_s: float
    seconds: list[float]
    socket_seconds: list[float]
    failed: int


class ControlPlane:
    """A worker on an event loop that is driven from synchronous code, and its coordinator.

    Args:
        model: What the worker has, under the id that ``load_coordinator`` asks for.
        backend: What it computes with; closed at the end.
        spool: What it keeps results in; closed at the end. Both are made on the loop.
        in_flight: Tasks that it takes at once.
        engine: How to run the model.
    """

    def __init__(
        self,
        model: ModelFile,
        backend: Callable[[], InferenceBackend],
        spool: Callable[[], ResultSpool],
        *,
        in_flight: int = 1,
        engine: EngineOptions | None = None,
    ) -> None:
        self.runner = asyncio.Runner()
        self._held = AsyncExitStack()
        self._coordinator: asyncio.subprocess.Process
        self.backend: InferenceBackend
        options = WorkerOptions(
            worker_id="w-1",
            max_concurrent_tasks=in_flight,
            engine=engine or EngineOptions(n_slots=in_flight),
            preload=model,
        )
        self.run(self._open(model, backend, spool, options))

    async def _open(
        self,
        model: ModelFile,
        backend: Callable[[], InferenceBackend],
        spool: Callable[[], ResultSpool],
        options: WorkerOptions,
    ) -> None:
        self._coordinator = await asyncio.create_subprocess_exec(
            sys.executable, load_coordinator.__file__, stdin=PIPE, stdout=PIPE, limit=1 << 24
        )
        self._held.push_async_callback(self._dismiss, self._coordinator)
        assert self._coordinator.stdout is not None
        port = int(await self._coordinator.stdout.readline())
        self.backend = await self._held.enter_async_context(backend())
        await self.backend.load(model, options.engine)
        kept = spool()
        self._held.push_async_callback(kept.close)
        registered = asyncio.Event()

        def observe(event: WorkerEvent) -> None:
            if isinstance(event, LinkUp):
                registered.set()

        worker = Worker(
            self.backend,
            OneModel(model),
            kept,
            LinkOptions(url=f"ws://127.0.0.1:{port}"),
            Attempts(Backoff(max_attempts=1)),
            options,
            observe,
        )
        running = asyncio.ensure_future(worker.run())

        async def stop() -> None:
            worker.stop()
            await running

        self._held.push_async_callback(stop)
        await registered.wait()
        gc.freeze()  # As the command does.

    async def _dismiss(self, coordinator: asyncio.subprocess.Process) -> None:
        assert coordinator.stdin is not None
        coordinator.stdin.close()
        await coordinator.wait()

    def run(self, work: Awaitable[Any]) -> Any:
        """Run ``work`` on the loop, and meanwhile all the rest."""

        async def waited() -> Any:
            return await work

        return self.runner.run(waited())

    async def computed(self, count: int, task_input: dict[str, Any]) -> Load:
        """Have tasks computed, as many at once as the worker takes."""
        assert self._coordinator.stdin is not None
        assert self._coordinator.stdout is not None
        order = ujson.dumps({"count": count, "task_input": task_input})
        self._coordinator.stdin.write(order.encode() + b"\n")
        return Load(**ujson.loads(await self._coordinator.stdout.readline()))

    def compute(self, count: int, task_input: dict[str, Any]) -> Load:
        """The same, from outside the loop."""
        load: Load = self.run(self.computed(count, task_input))
        return load

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


def fsync_ms(directory: Path, payload: bytes = b"x" * 1500) -> float:
    """Median milliseconds of a bare ``fsync`` after a write of ``payload``, over written ground.

    SQLite's log is written over in the same way once it has reached its size; appending to a file
    costs a second write on most file systems.
    """
    descriptor = os.open(directory / "fsync", os.O_RDWR | os.O_CREAT)
    seconds = []
    try:
        os.pwrite(descriptor, payload * 100, 0)
        os.fsync(descriptor)
        for n in range(100):
            started = time.perf_counter()
            os.pwrite(descriptor, payload, n * len(payload))
            os.fsync(descriptor)
            seconds.append(time.perf_counter() - started)
    finally:
        os.close(descriptor)
    return sorted(seconds)[50] * 1e3
