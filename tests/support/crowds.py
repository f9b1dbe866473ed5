"""Crowds of workers that lose their coordinator: when do they come back? On virtual time.

Each worker is its policy alone (``Attempts`` with the shipped ``Backoff``), and each attempt is
answered at once: what a real link adds can only spread them further.
"""

from __future__ import annotations

import heapq
import random

from ai4all.delivery.backoff import Attempts, Backoff

__all__ = ["busiest_second", "connects_after_recovery", "connects_to_a_closing_coordinator"]


def connects_after_recovery(workers: int, outage_s: float, seed: int) -> list[float]:
    """Times of the connects after an outage, counted from its end; each worker has one.

    Args:
        workers: All lose their link at one moment, the outage's first.
        outage_s: How long nobody answers.
        seed: Of all delays.
    """
    rng = random.Random(seed)
    queue: list[tuple[float, int]] = []
    fleet = []
    for number in range(workers):
        attempts = Attempts(Backoff(rng=random.Random(rng.random())))
        attempts.opened(-1000.0)
        attempts.heard()
        fleet.append(attempts)
        heapq.heappush(queue, (attempts.lost(0.0), number))
    connects = []
    while queue:
        now, number = heapq.heappop(queue)
        if now < outage_s:
            heapq.heappush(queue, (now + fleet[number].lost(now), number))
        else:
            connects.append(now - outage_s)
    return connects


def busiest_second(times: list[float]) -> int:
    """Most of ``times``, which are in order, within one second."""
    start = most = 0
    for end, time in enumerate(times):
        while times[start] <= time - 1.0:
            start += 1
        most = max(most, end - start + 1)
    return most


def connects_to_a_closing_coordinator(seconds: float, life_s: float, seed: int) -> int:
    """Connects of one worker to a coordinator that accepts, registers it, and then closes.

    Args:
        seconds: How long it is watched.
        life_s: How long each session lasts.
        seed: Of all delays.
    """
    attempts = Attempts(Backoff(rng=random.Random(seed)))
    now, connects = 0.0, 0
    while now < seconds:
        connects += 1
        attempts.opened(now)
        attempts.heard()
        now += life_s
        now += attempts.lost(now)
    return connects
