"""When to connect again: a policy that is data, without a clock and without a socket.

The ceiling of a delay is the seed's ``reconnect_interval_ms * 2**min(attempt, 5)``; the delay is
drawn below it (full jitter), so that a crowd of workers that lost its coordinator at one moment
does not come back at one moment.

What the default interval has to satisfy, for N workers that wait with a ceiling of C seconds:

- Their attempts come at 2N/C in a second once the coordinator is back. For 1,000 workers and at
  most 60 connects in a second C must exceed about 45 s (with room for chance).
- The last one is back after C seconds, so C should not be much longer either.
- A coordinator that accepts and then closes sees 2T/C connects of one worker in T seconds. That
  is 19 in ten minutes for C = 64 s, and 4 more while the ceiling grows. To stay at 20 at most,
  a delay after such a session is drawn from the upper part of its range only.

``DEFAULT_INTERVAL_MS`` is 2000: C = 64 s.
"""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["DEFAULT_INTERVAL_MS", "MAX_FLOOR_S", "MIN_SESSION_S", "Attempts", "Backoff"]

DEFAULT_INTERVAL_MS = 2000
"""Default of ``reconnect_interval_ms``; the module's text says why."""

MIN_SESSION_S = 60.0
"""A session shorter than this has not lived: it does not reset the attempts."""

MAX_FLOOR_S = 3600.0
"""No peer can send a worker away for longer than this, in seconds."""

_MAX_DOUBLINGS = 5

# Least share of the ceiling after a session that was accepted and then closed. With 0.6 and the
# default interval the earliest connects in ten minutes are 0, 2.4, 7.2, 16.8, 36, 74.4, ... s:
# 19 of them, whatever is drawn.
_SHORT_SESSION_SHARE = 0.6


class Backoff:
    """The delay before each connection attempt.

    Args:
        interval_ms: The seed's ``reconnect_interval_ms``.
        jitter: Share of the ceiling that is drawn at random: 1 is full jitter, 0 gives the
            seed's exact delays.
        max_attempts: Failed attempts in a row after which to give up; 0 means never.
        rng: Source of chance, for repeatable tests.

    Raises:
        ValueError: A figure is out of range.
    """

    def __init__(
        self,
        interval_ms: int = DEFAULT_INTERVAL_MS,
        *,
        jitter: float = 1.0,
        max_attempts: int = 0,
        rng: random.Random | None = None,
    ) -> None:
        if interval_ms < 1:
            raise ValueError(f"interval_ms must be at least 1, not {interval_ms}")
        if not 0.0 <= jitter <= 1.0:
            raise ValueError(f"jitter must be between 0 and 1, not {jitter}")
        if max_attempts < 0:
            raise ValueError(f"max_attempts must not be negative, not {max_attempts}")
        self.interval_ms = interval_ms
        self.jitter = jitter
        self.max_attempts = max_attempts
        # Not shared and not seeded: two workers started at one moment must differ.
        self._draw: Callable[[], float] = (random.SystemRandom() if rng is None else rng).random

    def ceiling(self, attempt: int) -> float:
        """Longest delay in seconds after failed attempt number ``attempt``, counted from 1."""
        if attempt < 1:
            raise ValueError(f"attempts count from 1, not {attempt}")
        return float(self.interval_ms * 2 ** min(attempt, _MAX_DOUBLINGS)) / 1000.0

    def next_delay(self, attempt: int, *, floor: float = 0.0, accepted: bool = False) -> float:
        """Draw the delay in seconds after failed attempt number ``attempt``.

        Args:
            attempt: Failed attempts in a row, at least 1.
            floor: What the peer asked for (``Retry-After``), in seconds. The delay is never
                shorter, and still spread; no more than ``MAX_FLOOR_S`` is granted.
            accepted: The peer accepted the connection and then ended it: be patient.
        """
        ceiling = self.ceiling(attempt)
        share = 1.0 - self.jitter
        if accepted:
            share = max(share, _SHORT_SESSION_SHARE)
        least = share * ceiling
        spread = (ceiling - least) * self._draw()
        return max(least, min(floor, MAX_FLOOR_S)) + spread

    def exhausted(self, attempt: int) -> bool:
        """Whether failed attempt number ``attempt`` was one too many, as the seed counts."""
        return 0 < self.max_attempts < attempt


class Attempts:
    """Failed attempts in a row, by the rule that only a session that lived starts them over.

    A session has lived when it lasted ``MIN_SESSION_S`` and brought a valid message. A handshake
    proves nothing: a coordinator that accepts and closes would be met in a hot loop.

    Times are seconds of any one monotonic clock.

    Attributes:
        count: Failed attempts in a row. A session that ended before it lived is one.
    """

    def __init__(self, backoff: Backoff, *, min_session_s: float = MIN_SESSION_S) -> None:
        self.count = 0
        self._backoff = backoff
        self._min_session_s = min_session_s
        self._opened_at: float | None = None
        self._heard = False

    @property
    def exhausted(self) -> bool:
        """Whether to give up (``MaxReconnectsExceeded``)."""
        return self._backoff.exhausted(self.count)

    def opened(self, now: float) -> None:
        """The handshake is done."""
        self._opened_at = now
        self._heard = False

    def heard(self) -> None:
        """A valid message came in on the open session."""
        self._heard = self._opened_at is not None

    def lived(self, now: float) -> bool:
        """Whether the open session, if any, counts as one that lived."""
        return (
            self._opened_at is not None
            and self._heard
            and now - self._opened_at >= self._min_session_s
        )

    def lost(self, now: float, *, floor: float = 0.0) -> float:
        """The session ended or could not be opened: count it and draw the delay in seconds.

        Look at ``exhausted`` before the delay is waited out.
        """
        accepted = self._opened_at is not None
        if self.lived(now):
            self.count = 0
            accepted = False
        self._opened_at = None
        self._heard = False
        self.count += 1
        return self._backoff.next_delay(self.count, floor=floor, accepted=accepted)
