"""Keeps one engine process running: starts it, starts it again, and ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from ai4all.backend.engine_process import Death, EngineProcess
from ai4all.errors import (
    Ai4allError,
    DeadlineExceeded,
    EngineClosed,
    EngineCrashed,
    EngineUnavailable,
)

__all__ = ["Supervisor", "restart_delay"]

_log = structlog.get_logger(__name__)

# So many starts in a row may fail before whoever waits is told; the next call tries again.
_START_ATTEMPTS: Final = 3

_FIRST_DELAY_S: Final = 0.25
_LONGEST_DELAY_S: Final = 4.0


def restart_delay(failures: int) -> float:
    """Seconds before the next start, after so many processes in a row that did no work."""
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (failures - 1)) if failures else 0.0


class Supervisor:
    """One process at a time, until ``close``. Belongs to one event loop.

    Args:
        spawn: Starts a process and returns it when it is ready.
        restore: Called with each process before it serves; it may end with the process.
        bury: Called with each process that has died, and how, before the next is started.

    Attributes:
        process: The process that lives, serving or not yet.
        did_work: To be set when the process has done something useful, so that its death is
            followed by a start at once.
    """

    def __init__(
        self,
        spawn: Callable[[], Awaitable[EngineProcess]],
        restore: Callable[[EngineProcess], Awaitable[None]],
        bury: Callable[[EngineProcess, Death], Awaitable[None]],
    ) -> None:
        self.process: EngineProcess | None = None
        self.did_work = False
        self._spawn = spawn
        self._restore = restore
        self._bury = bury
        self._task: asyncio.Task[None] | None = None
        # Done with the process that serves, or with why there is none.
        self._service: asyncio.Future[EngineProcess] | None = None
        self._unburied: EngineProcess | None = None
        self._closed = False

    @property
    def in_service(self) -> EngineProcess | None:
        """The process that serves now, or None when ``serving`` has to wait."""
        if self._service is None or not self._service.done() or self._closed:
            return None
        process = None if self._service.exception() else self._service.result()
        return None if process is None or process.lost.done() else process

    async def serving(self, deadline: float | None = None) -> EngineProcess:
        """Wait for a process that serves; starts one where there is none.

        Waiters are served in their order.

        Args:
            deadline: ``time.monotonic()`` value at which to give up.

        Raises:
            DeadlineExceeded: There was none in time.
            EngineUnavailable: None can run here.
            EngineCrashed: Several died at their start.
            EngineHung: Several did not answer at their start.
            EngineClosed: ``close`` was called.
        """
        while True:
            if self._closed:
                raise EngineClosed("the backend is closed")
            process = self.in_service
            if process is not None:
                return process
            if self._task is None:
                self._service = asyncio.get_running_loop().create_future()
                self._task = asyncio.ensure_future(self._supervise())
            service = self._service
            assert service is not None
            if service.done() and not service.exception():
                # The process that served has just died. Its burial opens the wait for the next.
                await asyncio.sleep(0)
                continue
            limit = None if deadline is None else max(0.0, deadline - time.monotonic())
            await asyncio.wait({service}, timeout=limit)
            if not service.done():
                raise DeadlineExceeded(
                    "the deadline passed while the engine was started again",
                    {"prompt_tokens": 0, "completion_tokens": 0},
                )
            if not service.result().lost.done():
                return service.result()

    def retire(self) -> None:
        """Give the process that serves no more work; whoever has some waits for the next one."""
        if self.in_service is not None:
            self._service = asyncio.get_running_loop().create_future()

    async def close(self, within: float) -> None:
        """End the process; after ``within`` seconds by force."""
        self._closed = True
        if self._service is not None and not self._service.done():
            self._fail_service(EngineClosed("the backend is closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        process = self._unburied
        if process is not None:
            process.send(["close"])
            await process.exited(within)
        self.process = self._unburied = None

    # The life of processes.

    async def _supervise(self) -> None:
        failures = 0
        try:
            while True:
                try:
                    process = await self._spawn()
                except Ai4allError as error:
                    failures += 1
                    _log.error("engine_start_failed", error=str(error), attempt=failures)
                    if isinstance(error, EngineUnavailable) or failures >= _START_ATTEMPTS:
                        self._fail_service(error)
                        return
                else:
                    await self._see_through(process)
                    failures = 0 if self.did_work else failures + 1
                await asyncio.sleep(restart_delay(failures))
        except Exception as error:  # noqa: BLE001 - whoever waits must not wait for ever.
            kind = type(error).__name__
            _log.exception("engine_not_supervised")
            self._fail_service(EngineCrashed(f"an unexpected {kind} in the supervisor"))
        finally:
            self._task = None
            if self._unburied is not None and not self._closed:
                # The loop is being torn down around us.
                self._unburied.kill()

    async def _see_through(self, process: EngineProcess) -> None:
        """From the first word of a process to its burial."""
        self.process = self._unburied = process
        self.did_work = False
        _log.info("engine_started", process_id=process.pid)
        # Beside the reload, which fails when the process dies of it.
        attending = asyncio.ensure_future(self._attend(process))
        try:
            await self._restore(process)
            if self._service is not None and not self._service.done() and not process.lost.done():
                self._service.set_result(process)
            await asyncio.shield(attending)
        finally:
            attending.cancel()
            await asyncio.wait({attending})

    async def _attend(self, process: EngineProcess) -> None:
        await asyncio.shield(process.lost)
        if self._service is None or self._service.done():
            self._service = asyncio.get_running_loop().create_future()
        death = await process.exited()
        self.process = self._unburied = None
        await self._bury(process, death)

    def _fail_service(self, error: Ai4allError) -> None:
        if self._service is not None and not self._service.done():
            self._service.set_exception(error)
            self._service.exception()  # Taken: nobody is warned when nobody waits.
