"""Many seeds over several processes, and what came of them together."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from simulation.run import simulate

# Every so many seeds, one is run a second time, in whatever process comes to it.
_REPLAY_EVERY: Final = 50


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of one run. ``digest`` is None where it broke off."""

    seed: int
    events: int = 0
    seconds: float = 0.0
    blocks: int = 0
    delivered: int = 0
    lives: int = 0
    healed_in: float = 0.0
    chaos: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    digest: str | None = None
    cpu_s: float = 0.0


@dataclass(slots=True)
class Findings:
    """What came of many seeds.

    Attributes:
        seeds: How many were run.
        events: Things that happened.
        virtual_s: Virtual time that passed.
        blocks: Blocks there were.
        delivered: Blocks whose result was accepted.
        lives: Times that a worker was started.
        longest_recovery_s: Most virtual seconds from the last fault until all work was done.
        injected: How often each fault happened.
        deaths: How workers were killed.
        failing: Seeds with what must not be, and what that was.
        replayed: Seeds that were run a second time.
        differing: Those whose second run was another one.
        seconds: Real time that it took.
        cpu_s: Seconds of CPU time that it took, in all processes.
    """

    seeds: int = 0
    events: int = 0
    virtual_s: float = 0.0
    blocks: int = 0
    delivered: int = 0
    lives: int = 0
    longest_recovery_s: float = 0.0
    injected: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)
    failing: dict[int, tuple[str, ...]] = field(default_factory=dict)
    replayed: int = 0
    differing: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one run in."""
        self.seeds += 1
        self.events += outcome.events
        self.virtual_s += outcome.seconds
        self.blocks += outcome.blocks
        self.delivered += outcome.delivered
        self.lives += outcome.lives
        self.longest_recovery_s = max(self.longest_recovery_s, outcome.healed_in)
        for counts, more in ((self.injected, outcome.chaos), (self.deaths, outcome.deaths)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count
        if outcome.faults:
            self.failing[outcome.seed] = outcome.faults


def run_one(seed: int, events: int, only: tuple[str, ...]) -> Outcome:
    """Run a seed and keep what counts. A run that breaks off has failed, too."""
    began = time.process_time()
    try:
        run = simulate(seed, events, only=only)
    except Exception as exc:  # noqa: BLE001 - one seed must not end all the others.
        place = traceback.extract_tb(exc.__traceback__)[-1]
        return Outcome(seed, faults=(f"broke off: {exc!r} in {place.name}:{place.lineno}",))
    return Outcome(
        seed=seed,
        events=run.events,
        seconds=run.seconds,
        blocks=run.blocks,
        delivered=run.delivered,
        lives=run.lives,
        healed_in=run.healed_in,
        chaos=run.chaos,
        deaths=run.deaths,
        faults=tuple(run.faults),
        digest=run.digest,
        cpu_s=time.process_time() - began,
    )


def _run_job(job: tuple[int, int, tuple[str, ...]]) -> Outcome:
    return run_one(*job)


def run_many(
    seeds: Iterable[int],
    events: int,
    *,
    only: tuple[str, ...] = (),
    processes: int = 1,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Findings:
    """Run seeds, some of them twice.

    Args:
        seeds: Which.
        events: Things that are to happen in each before the faults stop.
        only: Names of faults to choose from; all by default.
        processes: How many run at once. With one, none is started.
        on_outcome: Called after each seed.
    """
    began, found = time.monotonic(), Findings()
    digests: dict[int, str | None] = {}
    wanted = list(seeds)
    # Those that are run again come last: another process is likely to have them then.
    again = wanted[::_REPLAY_EVERY]
    jobs = [(seed, events, only) for seed in [*wanted, *again]]

    def take(outcome: Outcome) -> None:
        found.cpu_s += outcome.cpu_s
        if outcome.seed in digests:
            found.replayed += 1
            if outcome.digest != digests[outcome.seed]:
                found.differing.append(outcome.seed)
            return
        digests[outcome.seed] = outcome.digest
        found.add(outcome)
        on_outcome(outcome)

    if processes == 1:
        for job in jobs:
            take(_run_job(job))
    else:
        # A fresh interpreter for each, so that a replay owes nothing to its process.
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for outcome in pool.imap(_run_job, jobs, chunksize=8):
                take(outcome)
    found.seconds = time.monotonic() - began
    return found
