"""Links that break, coordinators that die, acknowledgements that are lost: delivered once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import ujson
from station import Station
from watching import Watch

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.delivery.spool import MemorySpool, Spool
from ai4all.worker_events import BlockAcknowledged, BlockStarted, LinkDown, LinkUp

SLOW = ScriptedGeneration(token_ms=20.0)


def completions(count: int, *, max_tokens: int = 5) -> list[TaskSpec]:
    return [
        TaskSpec(
            block_id=f"b-{n}",
            input={"prompt": f"prompt number {n}", "max_tokens": max_tokens, "temperature": 0.0},
        )
        for n in range(1, count + 1)
    ]


def ends(coordinator: EmbeddedCoordinator) -> Counter[str | None]:
    return Counter(
        event.block_id
        for event in coordinator.history
        if event.kind in (EventKind.DELIVERED, EventKind.FAILED)
    )


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_a_coordinator_that_goes_away_in_the_middle_of_a_task_gets_one_result(
    strict_seed: bool,
) -> None:
    backend = FakeBackend(SLOW)
    coordinator = EmbeddedCoordinator(completions(1, max_tokens=20), strict_seed=strict_seed)
    async with coordinator, Station(coordinator.url, backend) as station:
        await station.seen.until(lambda event: isinstance(event, BlockStarted))
        await coordinator.stop()
        await station.seen.until(lambda event: isinstance(event, LinkDown))
        await asyncio.sleep(0.1)
        await coordinator.start()
        await coordinator.finished()
    assert backend.calls.generations == 1, "the work went on meanwhile"
    assert ends(coordinator) == {"b-1": 1}
    assert coordinator.violations() == []
    assert station.spool.pending() == []


async def test_a_result_that_was_finished_while_the_link_was_down_is_delivered() -> None:
    backend = FakeBackend(ScriptedGeneration(token_ms=10.0))
    coordinator = EmbeddedCoordinator(completions(1))
    async with coordinator, Station(coordinator.url, backend) as station:
        await station.seen.until(lambda event: isinstance(event, BlockStarted))
        await coordinator.stop()
        while not station.spool.has("b-1"):
            await asyncio.sleep(0.005)
        await coordinator.start()
        await coordinator.finished()
    assert ends(coordinator) == {"b-1": 1}
    assert backend.calls.generations == 1


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_a_result_whose_acknowledgement_is_lost_is_sent_again_and_counted_once(
    strict_seed: bool,
) -> None:
    lost = 0

    def cut(event: Event) -> None:
        nonlocal lost
        if event.kind is EventKind.DELIVERED or (event.kind is EventKind.REPEATED and lost < 3):
            # The result is recorded, the acknowledgement not yet written.
            lost += 1
            for link in coordinator.links.values():
                link.socket.transport.abort()

    coordinator = EmbeddedCoordinator(completions(1), strict_seed=strict_seed, on_event=cut)
    async with coordinator, Station(coordinator.url) as station:
        await station.seen.until(lambda event: isinstance(event, BlockAcknowledged))
    kinds = [str(event.kind) for event in coordinator.history if event.block_id]
    assert kinds == ["assigned", "delivered", "repeated", "repeated", "repeated"]
    assert station.spool.pending() == []
    assert station.backend.calls.generations == 1


@pytest.mark.parametrize("seed", range(4))
async def test_links_that_break_at_any_moment_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    blocks = 30

    def cut(event: Event) -> None:
        if rng.random() < 0.15:
            for link in coordinator.links.values():
                link.socket.transport.abort()

    coordinator = EmbeddedCoordinator(completions(blocks), strict_seed=seed % 2 == 1, on_event=cut)
    async with (
        coordinator,
        Station(coordinator.url, max_concurrent_tasks=4, reconnect_ms=3) as station,
        asyncio.timeout(60),
    ):
        await coordinator.finished()
        await station.seen.until(lambda event: isinstance(event, BlockAcknowledged), count=blocks)
    drops = sum(isinstance(event, LinkDown) for event in station.seen.seen)
    assert drops >= 5
    assert ends(coordinator) == {f"b-{n}": 1 for n in range(1, blocks + 1)}
    assert all(outcome.result.success for outcome in coordinator.outcomes.values())
    assert coordinator.violations() == []
    assert station.spool.pending() == []


async def test_a_worker_that_dies_before_the_acknowledgement_delivers_after_its_restart(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.sqlite3"
    watch = Watch[Event]()
    coordinator = EmbeddedCoordinator(completions(1), on_event=watch)
    async with coordinator:
        async with Spool.open(path) as spool:
            station = Station(coordinator.url, FakeBackend(SLOW), spool)
            async with station:
                await station.seen.until(lambda event: isinstance(event, BlockStarted))
                await coordinator.stop()
                while not spool.has("b-1"):
                    await asyncio.sleep(0.005)
                await station.die()
                with pytest.raises(asyncio.CancelledError):
                    await station.running
                kept = spool.pending()
                station.running = asyncio.create_task(asyncio.sleep(0))
        await coordinator.start()
        async with Spool.open(path) as spool:
            assert spool.pending() == kept, "byte for byte"
            async with Station(coordinator.url, spool=spool) as second:
                await coordinator.finished()
                await second.seen.until(lambda event: isinstance(event, BlockAcknowledged))
            assert spool.pending() == []
        assert second.backend.calls.generations == 0
    assert ends(coordinator) == {"b-1": 1}


async def test_a_worker_that_dies_in_the_middle_of_a_task_gets_it_again() -> None:
    coordinator = EmbeddedCoordinator(completions(1))
    async with coordinator:
        station = Station(coordinator.url, FakeBackend(ScriptedGeneration(hang_at=1)))
        async with station:
            await station.seen.until(lambda event: isinstance(event, BlockStarted))
            await station.die()
            station.running = asyncio.create_task(asyncio.sleep(0))
        async with Station(coordinator.url, spool=MemorySpool(interrupted=["b-1"])):
            await coordinator.finished()
    assert ends(coordinator) == {"b-1": 1}


COORDINATOR = """
    import asyncio, sys
    from pathlib import Path
    from ai4all.coordinator import EmbeddedCoordinator

    async def main():
        tasks, results, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        async with EmbeddedCoordinator(tasks, results, port=port) as coordinator:
            await coordinator.finished()

    asyncio.run(main())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_lines(path: Path, values: list[dict[str, object]]) -> None:
    path.write_text("".join(ujson.dumps(value) + "\n" for value in values))


def read_lines(path: Path) -> list[dict[str, object]]:
    return [ujson.loads(line) for line in path.read_text().splitlines()]


async def test_a_coordinator_that_is_killed_and_started_again_gets_each_result_once(
    tmp_path: Path,
) -> None:
    tasks, results, port = tmp_path / "tasks", tmp_path / "results", free_port()
    write_lines(tasks, [{"block_id": f"b-{n}", "input": {"prompt": "x"}} for n in range(3)])

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            textwrap.dedent(COORDINATOR),
            *map(str, (tasks, results, port)),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    process = await start()
    backend = FakeBackend(ScriptedGeneration(tokens=("a", "b", "c"), token_ms=100.0))
    async with Station(f"ws://127.0.0.1:{port}", backend) as station:
        await station.seen.until(lambda event: isinstance(event, BlockStarted), count=2)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        process = await start()
        await station.seen.until(lambda event: isinstance(event, LinkUp), count=2)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    records = read_lines(results)
    assert sorted(str(record["block_id"]) for record in records) == ["b-0", "b-1", "b-2"]
    assert backend.calls.generations == 3, "nothing was computed twice"
    assert station.spool.pending() == []
