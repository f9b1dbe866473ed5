"""Commits to the spool: one at a time, and with 32 in flight.

A commit waits for the disk, so the figure to look at is the share of what the disk can do:
``extra_info`` has the time of a bare ``fsync`` on the same disk in the same minute. Put the
data on the disk in question with ``--basetemp``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import fsync_ms

from ai4all.delivery.spool import MemorySpool, ResultSpool, Spool

# About the size of the result of a hundred tokens.
PAYLOAD = b"x" * 1500
COMMITS = 256


class Bench:
    def __init__(self, path: Path) -> None:
        self.runner = asyncio.Runner()
        self.path = path
        self.spool = self.run(self._open())
        self.number = 0

    async def _open(self) -> Spool:
        return Spool.open(self.path)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.spool.close())
        self.runner.close()

    def fresh_id(self) -> str:
        self.number += 1
        return f"b-{self.number}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "results.sqlite3")
    yield made
    made.close()


async def deliver(spool: ResultSpool, block_ids: list[str], in_flight: int) -> None:
    """The life of a result as the worker lives it: begun, committed, acknowledged, forgotten."""
    waiting = iter(block_ids)

    async def one_after_another() -> None:
        for block_id in waiting:
            spool.begin(block_id)
            await spool.commit(block_id, PAYLOAD)
            await spool.forget(block_id)

    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))


async def commit(spool: ResultSpool, block_ids: list[str], in_flight: int) -> None:
    waiting = iter(block_ids)

    async def one_after_another() -> None:
        for block_id in waiting:
            await spool.commit(block_id, PAYLOAD)

    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))


def note_rate(benchmark: Any, directory: Path, per_round: int) -> None:
    if benchmark.stats is None:
        return  # Benchmarks are switched off: the round was run once, for its asserts.
    rate = per_round / benchmark.stats.stats.median
    fsync = fsync_ms(directory)
    benchmark.extra_info |= {
        "results_per_second": round(rate),
        "fsync_ms": round(fsync, 3),
        "results_per_fsync": round(rate * fsync / 1e3, 2),
    }


@pytest.mark.parametrize("in_flight", [1, 32])
def test_commits(benchmark: Any, bench: Bench, tmp_path: Path, in_flight: int) -> None:
    def round_() -> None:
        block_ids = [bench.fresh_id() for _ in range(COMMITS)]
        bench.run(commit(bench.spool, block_ids, in_flight))
        assert all(bench.spool.has(block_id) for block_id in block_ids)

    benchmark.pedantic(round_, rounds=5, warmup_rounds=1)
    note_rate(benchmark, tmp_path, COMMITS)


@pytest.mark.parametrize("in_flight", [1, 32])
def test_whole_lives(benchmark: Any, bench: Bench, tmp_path: Path, in_flight: int) -> None:
    def round_() -> None:
        block_ids = [bench.fresh_id() for _ in range(COMMITS)]
        bench.run(deliver(bench.spool, block_ids, in_flight))
        assert bench.spool.pending() == []

    benchmark.pedantic(round_, rounds=5, warmup_rounds=1)
    note_rate(benchmark, tmp_path, COMMITS)


def test_in_memory(benchmark: Any) -> None:
    def round_() -> None:
        spool = MemorySpool()
        asyncio.run(deliver(spool, [f"b-{n}" for n in range(COMMITS)], 1))
        assert spool.pending() == []

    benchmark(round_)
