"""Virtual time: what happens next, and the trace of all that happened."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import Protocol

# The true time at the beginning of every run: 2026-01-01.
EPOCH = 1_767_225_600.0

# A world in which so many things happen at one moment will never come to the next.
MOST_STEPS_AT_ONCE = 10_000


class TimeStandsStill(Exception):
    """Things make each other happen for ever; virtual time does not move on."""


class Sleeper(Protocol):
    """A process that lives in the world: it has its own loop and its own clocks."""

    def run_ready(self) -> None:
        """Run all that is due now."""

    def next_wake(self) -> float | None:
        """When it next wants to run, in the world's time."""


class Plan:
    """Something that will happen, unless it is called off."""

    __slots__ = ("action", "is_over")

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.is_over = False

    def call_off(self) -> None:
        """Do not let it happen."""
        self.is_over = True


class World:
    """The time, what is planned, who lives here, and what happened.

    Args:
        seed: From it all that is random follows.

    Attributes:
        now: Seconds since the beginning; never goes back.
        events: Things that happened so far, by the number of lines in the trace.
        trace: One line for each.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0
        self.trace: list[str] = []
        self.sleepers: list[Sleeper] = []
        self._plans: list[tuple[float, int, Plan]] = []
        self._numbers = itertools.count()
        self._steps_at_once = 0

    @property
    def events(self) -> int:
        """Things that happened so far."""
        return len(self.trace)

    def chance(self, name: str) -> random.Random:
        """A source of chance of its own for ``name``, so that one does not disturb another."""
        return random.Random(f"{self.seed}/{name}")

    def note(self, who: str, what: str) -> None:
        """Write down that something happened."""
        self.trace.append(f"{self.now:.6f} {who} {what}")

    def at(self, when: float, action: Callable[[], None]) -> Plan:
        """Let something happen at a time; not before now."""
        plan = Plan(action)
        heapq.heappush(self._plans, (max(when, self.now), next(self._numbers), plan))
        return plan

    def later(self, delay: float, action: Callable[[], None]) -> Plan:
        """Let something happen after a while."""
        return self.at(self.now + delay, action)

    def digest(self) -> str:
        """The hash of the trace."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def step(self) -> bool:
        """Let everybody do what is due, then go to the next moment at which something is.

        Returns:
            Whether there was such a moment.

        Raises:
            TimeStandsStill: It is always this one.
        """
        for sleeper in self.sleepers:
            sleeper.run_ready()
        due = self._next_plan()
        for sleeper in self.sleepers:
            wake = sleeper.next_wake()
            if wake is not None and wake < due:
                due = wake
        if due == math.inf:
            return False
        self._steps_at_once = 0 if due > self.now else self._steps_at_once + 1
        if self._steps_at_once > MOST_STEPS_AT_ONCE:
            raise TimeStandsStill(f"{self._steps_at_once} steps at {self.now:.6f}")
        self.now = max(self.now, due)
        while self._plans and self._plans[0][0] <= self.now:
            plan = heapq.heappop(self._plans)[2]
            if not plan.is_over:
                plan.is_over = True
                plan.action()
        return True

    def _next_plan(self) -> float:
        while self._plans and self._plans[0][2].is_over:
            heapq.heappop(self._plans)
        return self._plans[0][0] if self._plans else math.inf
