"""What a spool does to its file: what was there before, what is done, what must be left."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disk_faults
import ujson
from promises import Point, Tell, Told

from ai4all.delivery.spool import DEFAULT_KEEP_DAYS, Spool
from ai4all.errors import SpoolError

__all__ = ["SPOOL_FILE", "SPOOL_POINTS"]

SPOOL_FILE = "results.sqlite3"
AFTER = "after-the-failure"
DAY = 86_400.0


def frame(block_id: str, size: int) -> bytes:
    """A result as it is sent: the same bytes each time."""
    text = "".join(chr(0x61 + (n * n + size) % 26) for n in range(min(size, 509)))
    body = {"text": (text * (size // max(1, len(text)) + 1))[:size]}
    message = {"type": "SubmitResult", "worker_id": "w", "block_id": block_id, "result": body}
    return ujson.dumps(message).encode()


@dataclass
class Results:
    """Results by block: those that are kept already, and those that the act will commit."""

    kept: dict[str, bytes]
    fresh: dict[str, bytes]


def some_results(folder: Path, rng: random.Random) -> Results:
    """A spool with a few results, closed; and a few more to commit."""
    kept = {f"kept-{n}": frame(f"kept-{n}", rng.choice((10, 900, 5000, 40_000))) for n in range(4)}
    fresh = {f"new-{n}": frame(f"new-{n}", rng.choice((10, 900, 5000, 40_000))) for n in range(6)}

    async def fill() -> None:
        async with Spool.open(folder / SPOOL_FILE) as spool:
            for block_id, payload in kept.items():
                await spool.commit(block_id, payload)

    asyncio.run(fill())
    return Results(kept, fresh)


def with_an_open_log(folder: Path, rng: random.Random) -> Results:
    """As it is after a process that was killed: part of it is in the log alone."""
    results = some_results(folder, rng)
    path = folder / SPOOL_FILE
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("INSERT INTO running VALUES ('was-running', ?, NULL)", (time.time(),))
    log = path.with_name(path.name + "-wal").read_bytes()
    database = path.read_bytes()
    connection.close()
    path.write_bytes(database)
    path.with_name(path.name + "-wal").write_bytes(log)
    return results


def damaged(folder: Path, rng: random.Random) -> Results:
    """A page in the middle is scribbled over: what can be read must be kept."""
    results = some_results(folder, rng)
    path = folder / SPOOL_FILE
    data = bytearray(path.read_bytes())
    at = len(data) // 2 // 4096 * 4096
    data[at : at + 4096] = b"\xa5" * 4096
    whole = path.with_name("probe.sqlite3")
    whole.write_bytes(data)

    async def read() -> dict[str, bytes]:
        async with Spool.open(whole) as spool:
            return dict(spool.pending())

    readable = asyncio.run(read())
    for file in folder.glob("probe.sqlite3*"):
        file.unlink()
    path.write_bytes(data)
    return Results(readable, results.fresh)


def of_version_1(folder: Path, rng: random.Random) -> Results:
    """As the first version of the schema left it."""
    results = some_results(folder, rng)
    with sqlite3.connect(folder / SPOOL_FILE) as old:
        old.execute("DROP TABLE running")
        old.execute(
            "CREATE TABLE running (block_id TEXT PRIMARY KEY, begun_at REAL NOT NULL) WITHOUT ROWID"
        )
        old.execute("INSERT INTO running VALUES ('was-running', 1.0)")
        old.execute("ALTER TABLE results DROP COLUMN days")
        old.execute("DROP TABLE days")
        old.execute("PRAGMA user_version = 1")
    old.close()
    return results


def nothing(_folder: Path, rng: random.Random) -> Results:
    """An empty directory."""
    return Results({}, {f"new-{n}": frame(f"new-{n}", rng.choice((10, 9000))) for n in range(2)})


def old_results(folder: Path, rng: random.Random) -> Results:
    """Some results are older than any that is kept."""
    results = some_results(folder, rng)
    with sqlite3.connect(folder / SPOOL_FILE) as connection:
        # Today is the day that is one too many.
        connection.execute(
            "UPDATE results SET days = ? WHERE block_id IN ('kept-0', 'kept-2')",
            (DEFAULT_KEEP_DAYS,),
        )
        connection.execute("UPDATE days SET counted_at = ?", (time.time() - 1.5 * DAY,))
        connection.execute("INSERT INTO running VALUES ('lapsed', 1.0, 2.0)")
    connection.close()
    for block_id in ("kept-0", "kept-2"):
        del results.kept[block_id]
    return results


def check_results(folder: Path, results: Results, told: Told) -> None:
    """The spool opens; what was kept is there, byte for byte, and nothing that nobody wrote."""

    async def look() -> dict[str, bytes]:
        async with Spool.open(folder / SPOOL_FILE) as spool:
            return dict(spool.pending())

    pending = asyncio.run(look())
    everything = results.kept | results.fresh | {AFTER: frame(AFTER, 700)}
    for block_id in [*results.kept, *told.of("committed")]:
        if block_id in told.of("forgetting"):
            assert block_id not in told.of("forgotten") or block_id not in pending, (
                f"{block_id} came back after it was forgotten"
            )
        else:
            assert block_id in pending, f"{block_id} is lost"
    for block_id, payload in pending.items():
        assert everything.get(block_id, b"") == payload, f"{block_id} is not what was kept"


def spool_act(work: Callable[[Spool, Results, Tell], Any]) -> Callable[[Path, Any, Tell], None]:
    """An act on a spool that is opened, worked on and closed.

    When the disk fails it, the disk recovers, and so must the spool that is open.
    """

    def act(folder: Path, results: Results, tell: Tell) -> None:
        async def run() -> None:
            spool = Spool.open(folder / SPOOL_FILE)
            before = dict(spool.pending())
            try:
                await work(spool, results, tell)
            except SpoolError as error:
                tell("failed", str(error))
                disk_faults.disarm()
                assert spool.has(AFTER) is False
                await spool.commit(AFTER, frame(AFTER, 700))
                tell("committed", AFTER)
                pending = dict(spool.pending())
                assert spool.bytes_used == sum(map(len, pending.values()))
                assert before.items() <= (pending | results.kept).items()
            finally:
                await spool.close()

        asyncio.run(run())

    return act


async def only_open(_spool: Spool, _results: Results, _tell: Tell) -> None:
    """Open and close."""


async def note_running(spool: Spool, results: Results, _tell: Tell) -> None:
    """Begin blocks, end some."""
    for number in range(3):
        spool.begin(f"running-{number}", time.time() + 60)
        # The notes go in a transaction of their own, and then in that of a result.
        await asyncio.sleep(0.06)
        spool.ended(f"running-{number - 1}")


async def commit_one_by_one(spool: Spool, results: Results, tell: Tell) -> None:
    """Commit results, each in a transaction of its own."""
    for block_id, payload in results.fresh.items():
        spool.begin(block_id, time.time() + 60)
        await spool.commit(block_id, payload)
        tell("committed", block_id)


async def commit_together(spool: Spool, results: Results, tell: Tell) -> None:
    """Commit results that share a transaction."""

    async def one(block_id: str, payload: bytes) -> None:
        await spool.commit(block_id, payload)
        tell("committed", block_id)

    outcomes = await asyncio.gather(
        *(one(*each) for each in results.fresh.items()), return_exceptions=True
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def forget(spool: Spool, results: Results, tell: Tell) -> None:
    """Forget results that were acknowledged."""
    for block_id in list(results.kept)[:3]:
        tell("forgetting", block_id)
        await spool.forget(block_id)
        tell("forgotten", block_id)


async def commit_and_forget(spool: Spool, results: Results, tell: Tell) -> None:
    """What a worker does all day."""
    for (old, _), (block_id, payload) in zip(
        results.kept.items(), results.fresh.items(), strict=False
    ):
        spool.begin(block_id, time.time() + 60)
        tell("forgetting", old)
        forgetting = asyncio.ensure_future(spool.forget(old))
        try:
            await spool.commit(block_id, payload)
        finally:
            outcome = (await asyncio.gather(forgetting, return_exceptions=True))[0]
        if outcome is not None:
            raise outcome
        tell("committed", block_id)
        tell("forgotten", old)


SPOOL_POINTS = (
    Point("the spool is made", nothing, spool_act(commit_one_by_one), check_results, True),
    Point("the spool is opened", some_results, spool_act(only_open), check_results, True),
    Point("a log is played in", with_an_open_log, spool_act(only_open), check_results, True),
    Point("a block begins", some_results, spool_act(note_running), check_results, True),
    Point("a result is committed", some_results, spool_act(commit_one_by_one), check_results, True),
    Point("results share a commit", some_results, spool_act(commit_together), check_results, True),
    Point("a result is forgotten", some_results, spool_act(forget), check_results, True),
    Point("both at once", some_results, spool_act(commit_and_forget), check_results, True),
    Point("old results expire", old_results, spool_act(only_open), check_results, True),
    Point("damage is repaired", damaged, spool_act(only_open), check_results, True),
    Point("the schema is brought up", of_version_1, spool_act(only_open), check_results, True),
)
