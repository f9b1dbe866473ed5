"""A real worker and a real coordinator with a chaos proxy between them, again and again cut off.

The session, the connection, the worker, the spool on disk, the sockets and the coordinator are the
real ones; what computes is scripted. Blocks are given out until enough blows have fallen.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos_proxy import CALM, Blow, ChaosProxy, Weather, draw_weather
from station import OneModel

from ai4all.backend.fake import FakeBackend
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool, Spool
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import BlockStarted, LinkDown, LinkUp, WorkerEvent

# About what two blocks take on the wire, either way.
_CLIENT_BYTES = 6000
_SERVER_BYTES = 2500
_IN_FLIGHT = 4


class _WatchedSpool(Spool):
    """Knows which results have ever been on disk."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.ever_kept: set[str] = set()

    async def commit(
        self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
    ) -> None:
        def note() -> None:
            self.ever_kept.add(block_id)
            if kept is not None:
                kept()

        await super().commit(block_id, payload, note)


@dataclass(slots=True)
class Findings:
    """What a run came to.

    Attributes:
        blocks: Blocks there were.
        blows: Connections that were cut, by how.
        registrations: Connections that came as far as that.
        lost: Blocks that did not end with an accepted success.
        accepted_twice: Blocks that were accepted more than once.
        recomputed: Blocks that were begun again after their result was on disk.
        refused: Results that the coordinator did not want.
        violations: Frames that it did not understand.
        left: Results that were still on disk at the end.
        seconds: How long it took.
    """

    blocks: int = 0
    blows: Counter[Blow] = field(default_factory=Counter)
    registrations: int = 0
    lost: int = 0
    accepted_twice: int = 0
    recomputed: int = 0
    refused: int = 0
    violations: list[str] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0

    @property
    def disconnects(self) -> int:
        """All blows."""
        return self.blows.total()

    def add(self, other: Findings) -> None:
        """Take another run's figures in."""
        self.blocks += other.blocks
        self.blows += other.blows
        self.registrations += other.registrations
        self.lost += other.lost
        self.accepted_twice += other.accepted_twice
        self.recomputed += other.recomputed
        self.refused += other.refused
        self.violations += other.violations
        self.left += other.left
        self.seconds += other.seconds


def _task(number: int) -> TaskSpec:
    # Answers of many lengths, so that blows hit all parts of all kinds of frames.
    tokens = 1 + number * 7 % 60
    return TaskSpec(
        block_id=f"b-{number}",
        input={"prompt": f"prompt number {number}", "max_tokens": tokens, "temperature": 0.0},
    )


async def cut_again_and_again(
    folder: Path,
    *,
    blocks: int,
    disconnects: int,
    seed: int,
    blows: tuple[Blow, ...] = tuple(Blow),
    strict_seed: bool = False,
    patience: float = 0.3,
    on_progress: Callable[[int, int], None] = lambda blows, ended: None,
) -> Findings:
    """Compute at least ``blocks`` blocks over links that are cut at least ``disconnects`` times.

    Args:
        folder: Where results are kept.
        blocks: Fewest blocks.
        disconnects: Fewest blows.
        seed: Of all that is drawn.
        blows: What may fall.
        strict_seed: Whether the coordinator speaks the first protocol to the letter.
        patience: Seconds between two pings, and as many for each answer.
        on_progress: Told of blows that have fallen and blocks that have ended.
    """
    rng = random.Random(seed)
    found = Findings()
    begun_at = time.monotonic()

    def weather() -> Weather:
        if proxy.blows.total() >= disconnects:
            return CALM
        return draw_weather(rng, blows, client_bytes=_CLIENT_BYTES, server_bytes=_SERVER_BYTES)

    def on_coordinator(event: Event) -> None:
        if event.kind is not EventKind.DELIVERED:
            return
        on_progress(proxy.blows.total(), len(coordinator.outcomes))
        # There is work for as long as there are blows to come.
        if coordinator.unfinished < _IN_FLIGHT and proxy.blows.total() < disconnects:
            coordinator.add(_task(len(coordinator._tasks)))

    def on_worker(event: WorkerEvent) -> None:
        if isinstance(event, BlockStarted) and event.block_id in spool.ever_kept:
            found.recomputed += 1

    coordinator = EmbeddedCoordinator(
        [_task(number) for number in range(blocks)],
        strict_seed=strict_seed,
        no_work_retry_ms=20,
        heartbeat_interval_ms=1000,
        # A worker that is cut off keeps its blocks: what is tested here is the worker.
        rules=LeaseRules(max_failures=1, max_assignments=10_000),
        on_event=on_coordinator,
    )
    spool = _WatchedSpool.open(folder / "results.sqlite3")
    async with coordinator, spool, FakeBackend() as backend:
        proxy = ChaosProxy(int(coordinator.url.rpartition(":")[2]), weather)
        async with proxy:
            worker = Worker(
                backend,
                OneModel(),
                spool,
                LinkOptions(
                    url=proxy.url,
                    open_timeout=patience,
                    ping_interval=patience,
                    ping_timeout=patience,
                    close_timeout=patience,
                ),
                # As by default, but a thousand times as fast.
                Attempts(Backoff(2), min_session_s=0.0),
                WorkerOptions(
                    worker_id="cut-off",
                    max_concurrent_tasks=_IN_FLIGHT,
                    session=SessionOptions(
                        min_retry=0.02, answer_timeout=1.0, registration_timeout=1.0
                    ),
                ),
                on_worker,
            )
            running = asyncio.create_task(worker.run())
            try:
                await coordinator.finished()
                # The last acknowledgements may have been cut off, too.
                while spool.pending():
                    await asyncio.sleep(0.01)
            finally:
                worker.stop()
                await running
        found.left = len(spool.pending())
    delivered = Counter(e.block_id for e in coordinator.history if e.kind is EventKind.DELIVERED)
    found.blocks = len(coordinator._tasks)
    found.blows = proxy.blows
    found.registrations = sum(e.kind is EventKind.REGISTERED for e in coordinator.history)
    found.accepted_twice = sum(count > 1 for count in delivered.values())
    found.lost = sum(
        not (outcome.accepted and outcome.result.success)
        for outcome in coordinator.outcomes.values()
    ) + (found.blocks - len(coordinator.outcomes))
    found.refused = sum(e.kind is EventKind.REFUSED for e in coordinator.history)
    found.violations = coordinator.violations()
    found.seconds = time.monotonic() - begun_at
    return found


async def seconds_until_noticed(blow: Blow, link: LinkOptions | None = None) -> float:
    """How long an idle worker takes to notice that its line is dead.

    Args:
        blow: How it dies, at once after the worker has registered.
        link: The options of the link but for the address; by default as shipped.
    """
    registered, noticed = asyncio.Event(), asyncio.Event()

    def on_worker(event: WorkerEvent) -> None:
        if isinstance(event, LinkUp):
            registered.set()
        if isinstance(event, LinkDown):
            noticed.set()

    # Never asks again, so that nothing but its pings can tell it.
    coordinator = EmbeddedCoordinator(
        [], no_work_retry_ms=3_600_000, heartbeat_interval_ms=3_600_000
    )
    async with coordinator, FakeBackend() as backend:
        proxy = ChaosProxy(int(coordinator.url.rpartition(":")[2]))
        async with proxy:
            worker = Worker(
                backend,
                OneModel(),
                MemorySpool(),
                replace(link or LinkOptions(url=""), url=proxy.url),
                Attempts(Backoff()),
                WorkerOptions(worker_id="alone"),
                on_worker,
            )
            running = asyncio.create_task(worker.run())
            await registered.wait()
            # Its next word is its last.
            proxy.strike(blow)
            begun_at = time.monotonic()
            await noticed.wait()
            seconds = time.monotonic() - begun_at
            worker.stop()
            worker.stop()
            await running
    return seconds
