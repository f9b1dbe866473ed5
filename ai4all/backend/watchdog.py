"""When a process that should be computing counts as hung. No clock and no timers: only sums."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["EngineState", "Watchdog", "WatchdogLimits"]


class EngineState(enum.StrEnum):
    """What the engine process is doing. An idle one may be silent for as long as it likes."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """How long, in seconds, each state may last without a sign of progress.

    Progress is what native code says of itself: a share of a load, a chunk of a prompt, a token,
    or a pulse, which counts each node of a graph that a CPU evaluates. A device that gives no
    pulse must reach the next event within the limit.

    Attributes:
        start: From the start of the process to its first word; drivers are initialised then.
        load: Without progress of a load.
        prefill: Without progress while a prompt is read.
        decode: Without progress while tokens are sampled.
        silence: Without a word of any kind from a process that has work: it is stopped, or
            starved.
        close: From the request to close until the process is killed.
    """

    start: float = 60.0
    load: float = 120.0
    prefill: float = 60.0
    decode: float = 8.0
    silence: float = 8.0
    close: float = 5.0

    @property
    def interval(self) -> float:
        """How often to look, and how often the process should say that it lives."""
        return min(1.0, min(self.load, self.prefill, self.decode, self.silence) / 4)

    def of(self, state: EngineState) -> float | None:
        """The limit of a state; None is no limit."""
        match state:
            case EngineState.LOADING:
                return self.load
            case EngineState.PREFILL:
                return self.prefill
            case EngineState.DECODE:
                return self.decode
        return None


class Watchdog:
    """Adds up how long there was no word and no progress.

    Args:
        limits: How long is too long.
    """

    def __init__(self, limits: WatchdogLimits) -> None:
        self._limits = limits
        self._silent = 0.0
        self._still = 0.0
        self._pulse: int | None = None

    def heard(self) -> None:
        """The process said something."""
        self._silent = 0.0

    def moved(self) -> None:
        """The engine made progress."""
        self._silent = self._still = 0.0

    def felt(self, pulse: int) -> None:
        """The process told the engine's pulse; only one that has changed is progress."""
        self.heard()
        if pulse != self._pulse:
            self._pulse = pulse
            self.moved()

    def passed(self, seconds: float, state: EngineState) -> float | None:
        """Time went by; returns the seconds without progress when they are too many.

        A step much longer than the interval says that this process was stopped or suspended
        itself, and nothing about the other: it counts as little as two.
        """
        limit = self._limits.of(state)
        if limit is None:
            self.moved()
            return None
        step = min(seconds, 2 * self._limits.interval)
        self._silent += step
        self._still += step
        if self._still >= limit:
            return self._still
        return self._silent if self._silent >= self._limits.silence else None
