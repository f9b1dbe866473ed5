"""Looks, now and then, whether a device that has gone is back, and has the model on it again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from ai4all.backend.base import InferenceBackend
from ai4all.blocks import ModelGate
from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.errors import Ai4allError
from ai4all.types.model import ModelFile
from ai4all.worker_health import WorkerHealth

__all__ = ["DeviceRecovery"]

_log = structlog.get_logger(__name__)

# Between two looks; each time twice as long.
_FIRST_DELAY_S: Final = 30.0
_LONGEST_DELAY_S: Final = 900.0


class DeviceRecovery:
    """One look at a time, further and further apart. Belongs to the loop's thread.

    Args:
        backend: What computes.
        health: What knows that something is missing. May be set anew.
        gate: What loads models.
        preload: The model to load when none was.
        when_done: Called after each look.
        clock: What tells the time.
    """

    def __init__(
        self,
        backend: InferenceBackend,
        health: WorkerHealth,
        gate: ModelGate,
        preload: ModelFile | None,
        when_done: Callable[[], None],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.health = health
        self._backend = backend
        self._gate = gate
        self._model = preload
        self._when_done = when_done
        self._clock = clock
        self._delay = _FIRST_DELAY_S
        self._due: float | None = None
        self._looking: asyncio.Task[None] | None = None

    def look_when_due(self) -> None:
        """To be called now and then while nothing is computed."""
        now = self._clock.monotonic()
        if not self.health.misses_device:
            self._delay, self._due = _FIRST_DELAY_S, None
        elif self._due is None:
            self._due = now + self._delay
        elif now >= self._due and self._looking is None:
            self._delay = min(2.0 * self._delay, _LONGEST_DELAY_S)
            self._due = now + self._delay
            self._looking = asyncio.ensure_future(self._look())
            self._looking.add_done_callback(self._looked)

    async def close(self) -> None:
        """Give up a look that is under way."""
        if self._looking is not None:
            self._looking.remove_done_callback(self._looked)
            self._looking.cancel()
            await asyncio.wait({self._looking})

    def _looked(self, _task: asyncio.Task[None]) -> None:
        self._looking = None
        self._when_done()

    async def _look(self) -> None:
        backend, health = self._backend, self.health
        if backend.loaded is not None:
            self._model = backend.loaded.file
        try:
            if not health.sees_device(backend.capabilities()):
                await backend.look_again()
            health.look(backend.capabilities(), backend.loaded)
            if self._model is None or not health.sees_device(backend.capabilities()):
                return
            if backend.loaded is not None and health.misses_device:
                # It runs elsewhere, as its owner allowed; whoever uses it now ends first.
                self._gate.renew()
            async with self._gate.use(self._model):
                _log.info("device_is_back", device=health.promised)
        except (Ai4allError, OSError) as exc:
            _log.info("device_still_missing", error=str(exc))
