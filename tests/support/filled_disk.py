"""Fills the disk under a worker's data directory while it works, and gives the space back.

The worker is a process of its own with its engine in another; the coordinator lives throughout and
has always work. While there is no room the link is cut as well, the worker is stopped and started,
and it is killed: what it has committed is delivered, the rest is computed again or was never lost.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from worker_process import WorkerProcess, worker_process

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.protocol.messages import ErrorStatus

__all__ = ["Disk", "Findings", "LimitedProcess", "SmallDisk", "fill_again_and_again"]

# What needs longer than this does not come at all.
_PATIENCE_S = 100.0

# After so long without a block that ends, none is running.
_SILENCE_S = 5.0

# The blocks that ran may be done, or have room in the spool's log, before they meet the full disk.
_TRIES = 5
_LENGTHS = (8, 256, 1024)


class Disk(Protocol):
    """What can be full."""

    def fill(self, running: WorkerProcess | None) -> None:
        """Leave no room, for a process that runs and for those that start."""

    def free(self, running: WorkerProcess | None) -> None:
        """Give the room back."""

    def preexec(self) -> None:
        """Called in each process that starts."""


class SmallDisk:
    """A file system in memory that is mounted for this alone, in a mount namespace of our own."""

    def __init__(self, directory: Path, size_mib: int = 32) -> None:
        directory.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "tmpfs"]
        subprocess.run([*command, str(directory)], check=True)
        self._ballast = directory / ".ballast"

    def fill(self, running: WorkerProcess | None) -> None:
        """Write until there is no room for a byte more."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self, running: WorkerProcess | None) -> None:
        """Delete what was written."""
        self._ballast.unlink()

    def preexec(self) -> None:
        """Nothing: the disk is the same for all."""


class LimitedProcess:
    """No disk: a process that may write to no file (RLIMIT_FSIZE), where nothing can be mounted."""

    def __init__(self) -> None:
        self._is_full = False

    def fill(self, running: WorkerProcess | None) -> None:
        """From now on each write fails."""
        self._is_full = True
        self._limit(running, 0)

    def free(self, running: WorkerProcess | None) -> None:
        """From now on none does."""
        self._is_full = False
        self._limit(running, resource.RLIM_INFINITY)

    def _limit(self, running: WorkerProcess | None, size: int) -> None:
        if running is not None:
            limits = (size, resource.RLIM_INFINITY)
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limits)

    def preexec(self) -> None:
        """The limit is inherited from the start."""
        if self._is_full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


@dataclass(slots=True)
class Findings:
    """What a run came to.

    Attributes:
        fillings: How often the disk was full.
        blocks: Blocks there were.
        lost: Blocks that did not end with an accepted success.
        accepted_twice: Blocks that were accepted more than once.
        sent_from_memory: Fillings in which a result that could not be kept was delivered.
        assigned_while_full: Blocks given to a worker that had said that it can keep none.
        started_while_full: Workers that started on a full disk, and delivered what was on it.
        killed_while_full: Workers that were killed on one.
        statuses: What heartbeats said of it, and how often.
        recoveries: Seconds from the room's return to the next accepted result of a new block.
        refused: Why results were not accepted, and how often.
        violations: Frames that the coordinator did not understand.
        seconds: How long it took.
    """

    fillings: int = 0
    blocks: int = 0
    lost: int = 0
    accepted_twice: int = 0
    sent_from_memory: int = 0
    assigned_while_full: int = 0
    started_while_full: int = 0
    killed_while_full: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Scene:
    """A coordinator with always four blocks to give, and the worker's process."""

    def __init__(
        self,
        disk: Disk,
        command: Callable[[str], Sequence[str]],
        environment: Mapping[str, str],
        seed: int,
    ) -> None:
        self.disk = disk
        self.found = Findings()
        self.rng = random.Random(seed)
        self.is_enough = False
        self.is_full = False
        self.said_full_at: float | None = None
        self.changed = asyncio.Event()
        self.events: Counter[EventKind] = Counter()
        self.coordinator = EmbeddedCoordinator(
            [],
            heartbeat_interval_ms=300,
            no_work_retry_ms=100,
            rules=LeaseRules(max_failures=10_000, max_assignments=10_000),
            on_event=self._on_event,
        )
        self._command, self._environment = command, environment
        self._refill()

    def _refill(self) -> None:
        while not self.is_enough and self.coordinator.unfinished < 4:
            tokens = self.rng.choice(_LENGTHS)
            task_input = {"prompt": f"{self.rng.random()}", "max_tokens": tokens}
            self.coordinator.add(TaskSpec(input=task_input | {"temperature": 0.0}))

    def _on_event(self, event: Event) -> None:
        self.events[event.kind] += 1
        match event.kind:
            case EventKind.HEARTBEAT:
                status = event.data["message"].status
                if isinstance(status, ErrorStatus):
                    self.found.statuses[status.Error.message] += 1
                    if self.is_full:
                        self.said_full_at = self.said_full_at or event.at
            case EventKind.ASSIGNED if self.said_full_at is not None:
                # What was asked for before it was said may come a moment after.
                self.found.assigned_while_full += event.at > self.said_full_at + 0.2
            case EventKind.DELIVERED | EventKind.REQUEUED:
                self._refill()
            case EventKind.REFUSED:
                self.found.refused[event.detail] += 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what an event brings about."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def more(self, kind: EventKind, count: int = 1, since: int | None = None) -> None:
        """Wait for so many more events than there are, or than there were."""
        wanted = (self.events[kind] if since is None else since) + count
        await self.until(lambda: self.events[kind] >= wanted)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[WorkerProcess]:
        """A worker's process, for as long as the context is open."""
        async with worker_process(
            *self._command(self.coordinator.url),
            env=self._environment,
            preexec_fn=self.disk.preexec,
        ) as running:
            # What it has not said yet it does not know.
            self.said_full_at = None
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    yield running
            except TimeoutError as error:
                raise AssertionError(
                    f"nothing comes any more after {self.events}; it said:\n{running.said}"
                ) from error

    def fill(self, running: WorkerProcess) -> None:
        """No room from here on."""
        self.found.fillings += 1
        self.is_full = True
        self.disk.fill(running)

    async def free(self, running: WorkerProcess) -> None:
        """Room again; the worker goes on by itself."""
        self.disk.free(running)
        freed_at = time.monotonic()
        self.is_full, self.said_full_at = False, None
        await self.more(EventKind.ASSIGNED)
        await self.more(EventKind.DELIVERED, 2)
        self.found.recoveries.append(time.monotonic() - freed_at)

    async def computed_while_full(self) -> None:
        """The disk fills while blocks run and the link is down; then the link is back."""
        async with self.worker() as running:
            for _ in range(_TRIES):
                await self.more(EventKind.DELIVERED, 3)
                await self.more(EventKind.PROGRESS)
                self.fill(running)
                await self.coordinator.stop()
                delivered = self.events[EventKind.DELIVERED]
                was_not_kept = await self._was_not_kept(running)
                await self.coordinator.start()
                if was_not_kept:
                    self.found.sent_from_memory += 1
                    await self.until(lambda: self.said_full_at is not None)
                    await self.more(EventKind.DELIVERED, 1, delivered)
                    # It takes no more, however long it lasts.
                    await self.more(EventKind.HEARTBEAT, 4)
                await self.free(running)
                if was_not_kept:
                    break
            await self._end(running)

    async def restarted_while_full(self) -> None:
        """Results wait on a disk that is full; the worker is stopped, and the next one starts."""
        async with self.worker() as running:
            await self.more(EventKind.DELIVERED)
            await self.more(EventKind.PROGRESS)
            await self.coordinator.stop()
            finished = running.said.count("block_finished")
            while running.said.count("block_finished") == finished:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.rng.uniform(0.0, 0.3))
            self.fill(running)
            await self._end(running)
        await self.coordinator.start()
        delivered = self.events[EventKind.DELIVERED]
        async with self.worker() as running:
            await self.until(lambda: self.events[EventKind.DELIVERED] > delivered)
            self.found.started_while_full += 1
            await self.free(running)
            await self._end(running)

    async def killed_while_full(self) -> None:
        """The worker is killed while there is no room, at any moment."""
        async with self.worker() as running:
            await self.more(EventKind.DELIVERED)
            self.fill(running)
            await asyncio.sleep(self.rng.uniform(0.0, 1.0))
            running.process.kill()
            await running.process.wait()
            self.found.killed_while_full += 1
        async with self.worker() as running:
            await self.more(EventKind.REGISTERED)
            await self.free(running)
            await self._end(running)

    async def _was_not_kept(self, running: WorkerProcess) -> bool:
        """Whether there was no room for a result; else the spool's log had some to write over."""
        finished = seen = running.said.count("block_finished")
        changed_at = time.monotonic()
        while "result_not_kept" not in running.said:
            if running.said.count("block_finished") > seen:
                seen, changed_at = running.said.count("block_finished"), time.monotonic()
            # The link may have gone before the second block was given.
            if seen >= finished + 2 or time.monotonic() > changed_at + _SILENCE_S:
                # All are done, and the last was kept too if this is not said at once.
                await asyncio.sleep(1.0)
                return "result_not_kept" in running.said
            await asyncio.sleep(0.01)
        return True

    async def _end(self, running: WorkerProcess) -> None:
        running.process.send_signal(signal.SIGTERM)
        status = await running.process.wait()
        assert status == 0, running.said


async def fill_again_and_again(
    disk: Disk,
    command: Callable[[str], Sequence[str]],
    environment: Mapping[str, str],
    *,
    rounds: int,
    seed: int,
    brief: bool = False,
    on_filled: Callable[[], None] = lambda: None,
) -> Findings:
    """Fill the disk three times a round, free it each time; then let a worker do what is left.

    Args:
        disk: What is filled.
        command: Gives the arguments of a worker's process for a coordinator's address.
        environment: Its variables. The first run is done.
        rounds: How often.
        seed: Of lengths and moments.
        brief: Only once a round, while blocks run.
        on_filled: Called after each.
    """
    begun_at = time.monotonic()
    scene = _Scene(disk, command, environment, seed)
    found = scene.found
    async with scene.coordinator as coordinator:
        acts = [
            scene.computed_while_full,
            scene.restarted_while_full,
            scene.killed_while_full,
        ]
        for act in (acts[:1] if brief else acts) * rounds:
            await act()
            on_filled()
        scene.is_enough = True
        async with scene.worker() as running:
            await coordinator.finished()
            await scene._end(running)
    delivered = Counter(e.block_id for e in coordinator.history if e.kind is EventKind.DELIVERED)
    found.blocks = len(coordinator._tasks)
    found.accepted_twice = sum(times > 1 for times in delivered.values())
    found.lost = found.blocks - sum(
        outcome.accepted and outcome.result.success for outcome in coordinator.outcomes.values()
    )
    found.violations = coordinator.violations()
    found.seconds = time.monotonic() - begun_at
    return found


def in_a_mount_namespace(command: Sequence[str]) -> list[str] | None:
    """The command in a mount namespace of its own, or None where this user may not have one."""
    flags = "-m" if os.getuid() == 0 else "-rm"
    mounting = ["unshare", flags, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        possible = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    except OSError:
        possible = False
    return ["unshare", flags, *command] if possible else None
