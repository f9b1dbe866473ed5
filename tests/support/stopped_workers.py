"""Stops a worker's process at random moments, starts it again, and looks at what is lost.

The coordinator lives throughout and has always work; the data directory is the same each time, so
what one process leaves is the next one's to deliver.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker_process import WorkerProcess, worker_process

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec

# What the worker sent before it could know of the signal is answered after it.
_UNDER_WAY_S = 0.1


@dataclass(slots=True)
class Stop:
    """One stop.

    Attributes:
        phase: What the worker was about: starting, idle, or computing.
        twice: Whether a second signal followed.
        seconds: From the signal to the end of the process.
        status: Its exit status; -15 is a signal before the worker had begun.
    """

    phase: str
    twice: bool
    seconds: float
    status: int


@dataclass(slots=True)
class Findings:
    """What a run came to.

    Attributes:
        stops: In their order.
        blocks: Blocks there were.
        lost: Blocks that did not end with an accepted success.
        accepted_twice: Blocks that were accepted more than once.
        handed_back: Blocks that were given back to be computed later.
        assigned_late: Blocks that were given to a worker a tenth of a second after its signal.
        violations: Frames that the coordinator did not understand.
        seconds: How long it took.
    """

    stops: list[Stop] = field(default_factory=list)
    blocks: int = 0
    lost: int = 0
    accepted_twice: int = 0
    handed_back: int = 0
    assigned_late: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Scene:
    """A coordinator that never runs out of work until it is told that it is enough."""

    def __init__(self, seed: int, lengths: Sequence[int], *, strict_seed: bool) -> None:
        self.rng = random.Random(seed)
        self.lengths = lengths
        self.is_enough = False
        self.registered = asyncio.Event()
        self.registered_at = 0.0
        self.busy = 0
        self.signalled_at: float | None = None
        self.assigned_late = 0
        self.coordinator = EmbeddedCoordinator(
            [],
            strict_seed=strict_seed,
            heartbeat_interval_ms=1000,
            no_work_retry_ms=100,
            rules=LeaseRules(max_failures=10_000, max_assignments=10_000),
            on_event=self._on_event,
        )
        self._refill()

    def _refill(self) -> None:
        while not self.is_enough and self.coordinator.unfinished < 4:
            tokens = self.rng.choice(self.lengths)
            prompt = f"prompt {self.rng.random()}"
            task_input = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
            self.coordinator.add(TaskSpec(input=task_input))

    def _on_event(self, event: Event) -> None:
        match event.kind:
            case EventKind.REGISTERED:
                self.registered.set()
                self.registered_at = event.at
                self.busy = 0
            case EventKind.ASSIGNED:
                self.busy += 1
                if self.signalled_at is not None and event.at > self.signalled_at + _UNDER_WAY_S:
                    self.assigned_late += 1
            case EventKind.DELIVERED | EventKind.REQUEUED:
                self.busy = max(0, self.busy - 1)
                self._refill()

    async def stop(self, running: WorkerProcess, usual_start: float) -> Stop:
        """Let the process live for a while, stop it, and see how it ends."""
        rng = self.rng
        if rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0.0, usual_start))
        else:
            await self.registered.wait()
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        phase = "starting" if not self.registered.is_set() else "busy" if self.busy else "idle"
        twice = rng.random() < 0.2
        self.signalled_at = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        if twice:
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            if running.process.returncode is None:
                # Not by the process' own method: that may reap it, and its status would be lost.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.process.pid, signal.SIGTERM)
        status = await running.process.wait()
        return Stop(phase, twice, time.monotonic() - self.signalled_at, status)


async def stop_again_and_again(
    command: Callable[[str], Sequence[str]],
    environment: Mapping[str, str],
    *,
    count: int,
    seed: int,
    strict_seed: bool = False,
    lengths: Sequence[int] = (1, 8, 64, 256, 1024),
    on_stop: Callable[[], None] = lambda: None,
) -> Findings:
    """Stop a worker ``count`` times; then let one do what is left.

    Args:
        command: Gives the arguments of a worker's process for a coordinator's address.
        environment: Its variables. The first run is done.
        count: Stops.
        seed: Of the moments, and of the lengths of blocks.
        strict_seed: Whether the coordinator speaks the first protocol to the letter.
        lengths: Tokens of a block, to be drawn from.
        on_stop: Called after each stop.
    """
    found = Findings()
    begun_at = time.monotonic()
    scene = _Scene(seed, lengths, strict_seed=strict_seed)
    usual_start = 1.0
    async with scene.coordinator as coordinator:
        for _ in range(count):
            scene.registered.clear()
            scene.signalled_at = None
            started_at = time.monotonic()
            # Half of them have a grace that is too short for most blocks.
            grace = scene.rng.choice(("0.05", "20"))
            env = {**environment, "AI4ALL_WORKER_STOP_GRACE_SECONDS": grace}
            async with worker_process(*command(coordinator.url), env=env) as running:
                found.stops.append(await scene.stop(running, usual_start))
            if scene.registered_at > started_at:
                usual_start = scene.registered_at - started_at
            on_stop()
        scene.is_enough, scene.signalled_at = True, None
        async with worker_process(*command(coordinator.url), env=environment) as running:
            await coordinator.finished()
            # Whatever it still holds, it says now.
            running.process.send_signal(signal.SIGTERM)
            await running.process.wait()
    delivered = Counter(e.block_id for e in coordinator.history if e.kind is EventKind.DELIVERED)
    found.blocks = len(coordinator._tasks)
    found.accepted_twice = sum(times > 1 for times in delivered.values())
    found.lost = found.blocks - sum(
        outcome.accepted and outcome.result.success for outcome in coordinator.outcomes.values()
    )
    found.handed_back = sum(e.kind is EventKind.REQUEUED for e in coordinator.history)
    found.assigned_late = scene.assigned_late
    found.violations = coordinator.violations()
    found.seconds = time.monotonic() - begun_at
    return found
