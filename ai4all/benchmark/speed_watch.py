"""Whether a machine still is as fast as its benchmark says.

A decode rate depends on more than the machine: neighbours in the batch, the length of what is in
the context, drafts, and what else the machine has to do. So a generation counts only when it was
alone in the engine, drafted nothing, had at least 16 tokens, and others left the processor alone
meanwhile; and it is compared with what the benchmark makes the rate at its own depth of context.
What decides is the median of the last of those, and a drop counts when it has lasted two minutes
and several generations more.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from ai4all.backend.base import Completion
from ai4all.benchmark.scores import PromptFigures

__all__ = ["LoadMeter", "SpeedBaseline", "SpeedWatch", "fair_rate"]

_LEAST_TOKENS: Final = 16

# Generations that the median is over, and how many of them there must be.
_WINDOW: Final = 15
_LEAST: Final = 5
_OUT_OF_DATE_S: Final = 1800.0

# Parts of the expected speed: slower than the first, for so long and so many generations, is a
# drop; faster than the second is its end. Between the two nothing changes.
_LOW: Final = 0.5
_HIGH: Final = 0.6
_LASTING_S: Final = 120.0
_LASTING: Final = 5

# Processors that others may use beyond what our threads leave free.
_OTHERS_MAY_USE: Final = 0.25


@dataclass(frozen=True, slots=True)
class SpeedBaseline:
    """Seconds that a token takes: ``base`` and ``slope`` for each token in the context.

    Attention reads the whole cache for each token, so the time grows in a line with its length.
    """

    base: float
    slope: float

    @classmethod
    def of(cls, prompts: Sequence[PromptFigures]) -> SpeedBaseline | None:
        """The line through the prompts of a benchmark; None when they tell no rate."""
        points = [point for row in prompts if (point := _seconds_per_token(row)) is not None]
        if not points:
            return None
        depths, seconds = zip(*points, strict=True)
        if len(set(depths)) > 1:
            slope, base = statistics.linear_regression(depths, seconds)
            if slope > 0.0 and base > 0.0:
                return cls(base, slope)
        return cls(statistics.fmean(seconds), 0.0)

    def rate(self, depth: float) -> float:
        """Tokens per second with ``depth`` tokens in the context."""
        return 1.0 / (self.base + self.slope * depth)


def _seconds_per_token(row: PromptFigures) -> tuple[float, float] | None:
    rate, n_steps = row.decode_tokens_per_second, row.completion_tokens - 1
    if not rate or n_steps <= 0:
        return None
    # A draft that was right gave tokens without a step; without it the step alone counts.
    alone = max(1, n_steps - row.draft_accepted) / n_steps
    return row.prompt_tokens + row.completion_tokens / 2, 1.0 / (rate * alone)


def fair_rate(completion: Completion) -> tuple[float, float] | None:
    """Depth of context and decode rate of a generation that can be compared, or None."""
    usage, rate = completion.usage, completion.timings.decode_tokens_per_second
    if (
        rate is None
        or usage.completion_tokens < _LEAST_TOKENS
        or completion.draft_tokens
        or completion.fingerprint.batched_with
    ):
        return None
    return usage.prompt_tokens + usage.completion_tokens / 2, rate


class SpeedWatch:
    """Follows the speed of one model as it runs.

    Args:
        baseline: What the benchmark measured.
        clock: Seconds that never go back.

    Attributes:
        is_slow: Whether the speed has dropped below half, lastingly.
    """

    def __init__(
        self, baseline: SpeedBaseline, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.is_slow = False
        self._baseline = baseline
        self._clock = clock
        self._shares: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._low_since: float | None = None
        self._low_seen = 0

    @property
    def share(self) -> float | None:
        """The median part of the expected speed; None while too little was seen."""
        if len(self._shares) < _LEAST:
            return None
        return statistics.median(share for _, share in self._shares)

    def saw(self, depth: float, rate: float) -> None:
        """Take a generation that can be compared; see ``fair_rate``."""
        now = self._clock()
        while self._shares and now - self._shares[0][0] > _OUT_OF_DATE_S:
            self._shares.popleft()
        self._shares.append((now, rate / self._baseline.rate(depth)))
        share = self.share
        if share is None:
            self._low_since = None
        elif share >= _HIGH:
            self.is_slow, self._low_since = False, None
        elif share >= _LOW:
            self._low_since = None
        elif self._low_since is None:
            self._low_since, self._low_seen = now, 0
        else:
            self._low_seen += 1
            if self._low_seen >= _LASTING and now - self._low_since >= _LASTING_S:
                self.is_slow = True


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    busy: float
    own: float


class LoadMeter:
    """How many processors others have used since a mark.

    Args:
        own_seconds: Processor time that is not others'.
        clock: Seconds that never go back.
        busy_seconds: Processor time of the whole machine.
    """

    def __init__(
        self,
        own_seconds: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        busy_seconds: Callable[[], float] | None = None,
    ) -> None:
        self._own = own_seconds
        self._clock = clock
        self._busy = busy_seconds or _busy_seconds

    def mark(self) -> _Reading:
        """A point in time to count from."""
        return _Reading(self._clock(), self._busy(), self._own())

    def is_quiet_since(self, mark: _Reading, threads: int) -> bool:
        """Whether others left ``threads`` of ours the processors that they need."""
        now = self.mark()
        passed = now.at - mark.at
        if passed <= 0.0:
            return False
        others = ((now.busy - mark.busy) - (now.own - mark.own)) / passed
        free = max(0, (psutil.cpu_count() or 1) - threads)
        return others <= free + _OTHERS_MAY_USE


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _guests(times))


def _guests(times: object) -> float:
    # Time of guests is in the time of the user already.
    return float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))
