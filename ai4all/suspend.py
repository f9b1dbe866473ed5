"""Noticing that the machine has slept.

A process does not see a sleep happen. Its clock (``monotonic``) and all its timers stand still
meanwhile and go on afterwards as if nothing had been, so they run late by the whole sleep: links
that died long ago look alive, and what was due is not done. The clock that went on (``boottime``)
tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ai4all.clock import Clock

__all__ = ["SuspendWatch"]

LOOK_EVERY_S: Final = 2.0
"""How soon after it a sleep is noticed."""

LEAST_SLEEP_S: Final = 5.0
"""A sleep that is shorter breaks no link and no promise. Several short ones add up."""


class SuspendWatch:
    """Looks at the clocks now and then, and tells of each sleep once.

    Args:
        clock: The clocks to compare.
        on_sleep: Called on the loop with the seconds that were slept.
    """

    def __init__(self, clock: Clock, on_sleep: Callable[[float], None]) -> None:
        self._clock = clock
        self._on_sleep = on_sleep
        self._known = clock.asleep()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Look now."""
        slept = self._clock.asleep() - self._known
        if slept >= LEAST_SLEEP_S:
            self._known += slept
            self._on_sleep(slept)
