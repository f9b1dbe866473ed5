from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ai4all.delivery import group_commit
from ai4all.delivery.group_commit import Operation
from ai4all.delivery.results_file import INSERT_RESULT, Row
from ai4all.delivery.spool import MemorySpool, ResultConflict, ResultSpool, Spool
from ai4all.errors import SpoolError

DAY = 86_400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.sqlite3"


@pytest.fixture(params=["disk", "memory"])
async def spool(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[ResultSpool]:
    opened: ResultSpool = (
        Spool.open(path, max_bytes=1000) if request.param == "disk" else MemorySpool(max_bytes=1000)
    )
    yield opened
    await opened.close()


async def filled(path: Path, count: int, size: int = 10) -> list[tuple[str, bytes]]:
    """A closed spool with results in it."""
    async with Spool.open(path) as spool:
        for n in range(count):
            await spool.commit(f"b{n}", bytes([n % 256]) * size)
        return spool.pending()


def content(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, data: bytes, mode: int = 0o600) -> None:
    path.write_bytes(data)
    path.chmod(mode)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


# What every spool does.


async def test_results_are_pending_in_the_order_of_their_commits(spool: ResultSpool) -> None:
    for block_id in ("c", "a", "b"):
        await spool.commit(block_id, block_id.encode())
    assert spool.pending() == [("c", b"c"), ("a", b"a"), ("b", b"b")]
    assert spool.bytes_used == 3
    await spool.forget("a")
    assert spool.pending() == [("c", b"c"), ("b", b"b")]
    assert (spool.has("a"), spool.has("b")) == (False, True)
    assert spool.bytes_used == 2


async def test_the_same_bytes_again_change_nothing(spool: ResultSpool) -> None:
    await spool.commit("a", b"1")
    await spool.commit("a", b"1")
    assert spool.pending() == [("a", b"1")]
    with pytest.raises(ResultConflict, match="another result"):
        await spool.commit("a", b"2")
    assert spool.pending() == [("a", b"1")]


async def test_it_tells_when_a_result_is_kept_and_only_then(spool: ResultSpool) -> None:
    told: list[tuple[str, bool]] = []

    def kept(block_id: str) -> Callable[[], None]:
        return lambda: told.append((block_id, spool.has(block_id)))

    await spool.commit("a", b"1", kept("a"))
    assert told == [("a", True)]
    await spool.commit("a", b"1", kept("a"))
    with pytest.raises(ResultConflict):
        await spool.commit("a", b"2", kept("other"))
    with pytest.raises(SpoolError):
        await spool.commit("too long", b"x" * 1001, kept("too long"))
    assert told == [("a", True)] * 2


async def test_results_of_one_transaction_are_told_of_before_any_of_their_waiters(
    path: Path,
) -> None:
    order: list[str] = []

    async def commit(spool: Spool, block_id: str) -> None:
        await spool.commit(block_id, b"x", lambda: order.append(f"kept {block_id}"))
        order.append(f"returned {block_id}")

    async with Spool.open(path) as spool:
        await asyncio.gather(commit(spool, "a"), commit(spool, "b"))
    assert order == ["kept a", "kept b", "returned a", "returned b"]


async def test_what_goes_wrong_in_being_told_is_the_callers_own(path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("not the spool's")

    async with Spool.open(path) as spool:
        outcomes = await asyncio.gather(
            spool.commit("a", b"1", broken), spool.commit("b", b"2"), return_exceptions=True
        )
    assert [str(outcome) for outcome in outcomes] == ["not the spool's", "None"]
    async with Spool.open(path) as spool:
        assert spool.pending() == [("a", b"1"), ("b", b"2")]


async def test_what_is_not_here_can_be_forgotten(spool: ResultSpool) -> None:
    await spool.forget("never")
    await spool.commit("a", b"1")
    await spool.forget("a")
    await spool.forget("a")
    await spool.commit("a", b"2")
    assert spool.pending() == [("a", b"2")]


async def test_it_holds_no_more_than_it_may(spool: ResultSpool) -> None:
    await spool.commit("a", b"x" * 600)
    with pytest.raises(SpoolError, match="limit of 1000"):
        await spool.commit("b", b"x" * 401)
    await spool.commit("c", b"x" * 400)
    assert spool.bytes_used == spool.max_bytes == 1000
    await spool.forget("a")
    await spool.commit("b", b"x" * 401)


async def test_a_closed_spool_takes_nothing(spool: ResultSpool) -> None:
    await spool.close()
    await spool.close()
    with pytest.raises(SpoolError, match="closed"):
        await spool.commit("a", b"1")
    with pytest.raises(SpoolError, match="closed"):
        await spool.forget("a")
    with pytest.raises(SpoolError, match="closed"):
        spool.begin("a")


async def test_interrupted_blocks_are_told_until_they_end() -> None:
    spool = MemorySpool(interrupted=["a", "b"])
    assert spool.interrupted == ("a", "b")
    spool.ended("a")
    await spool.commit("b", b"")
    assert spool.interrupted == ()


# What the one on disk does.


async def test_results_survive_a_restart_byte_for_byte(path: Path) -> None:
    payloads = [b"", b"\x00\xff" * 1000, "é\u2028".encode(), b"x" * 1_000_000]
    async with Spool.open(path) as spool:
        for n, payload in enumerate(payloads):
            await spool.commit(f"block/{n}\n'\"", payload)
        expected = spool.pending()
    async with Spool.open(path) as spool:
        assert spool.pending() == expected
        assert spool.bytes_used == sum(map(len, payloads))
        assert spool.recovery is None
        with pytest.raises(ResultConflict):
            await spool.commit(expected[1][0], b"other")
    assert os.listdir(path.parent) == [path.name], "the log is played into the file on closing"


async def test_only_its_owner_can_read_it(path: Path) -> None:
    put(path, b"", mode=0o666)
    async with Spool.open(path) as spool:
        await spool.commit("a", b"1")
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_one_process_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai4all.delivery.results_file._LOCK_WAIT_S", 0.05)
    async with Spool.open(path):
        with pytest.raises(SpoolError, match="another process"):
            Spool.open(path)
    async with Spool.open(path):
        pass


async def test_blocks_that_were_running_are_known_after_a_crash(path: Path) -> None:
    code = """
        import asyncio, os, sys
        from pathlib import Path
        from ai4all.delivery.spool import Spool

        async def main():
            spool = Spool.open(Path(sys.argv[1]))
            for block_id in ("done", "ended", "lost-1", "lost-2"):
                spool.begin(block_id)
            spool.ended("ended")
            await spool.commit("done", b"result")
            os.kill(os.getpid(), 9)

        asyncio.run(main())
    """
    assert run_script(code, path).returncode == -signal.SIGKILL
    async with Spool.open(path) as spool:
        assert spool.interrupted == ("lost-1", "lost-2")
        assert spool.pending() == [("done", b"result")]
        spool.ended("lost-1")
        await spool.commit("lost-2", b"after all")
        assert spool.interrupted == ()
    async with Spool.open(path) as spool:
        assert spool.interrupted == ()


def run_script(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


async def test_whatever_was_committed_survives_sigkill(path: Path) -> None:
    code = """
        import asyncio, sys
        from pathlib import Path
        from ai4all.delivery.spool import Spool

        async def main():
            spool = Spool.open(Path(sys.argv[1]))
            async def one(k):
                n = 0
                while True:
                    await spool.commit(f"{k}-{n}", f"payload {k}-{n}".encode() * 50)
                    print(f"{k}-{n}", flush=True)
                    n += 1
            await asyncio.gather(*(one(k) for k in range(8)))

        asyncio.run(main())
    """
    rng = random.Random(4)
    committed: set[str] = set()
    for _ in range(3):
        remove(path)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            textwrap.dedent(code),
            str(path),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        committed = {(await process.stdout.readline()).decode().strip()}
        await asyncio.sleep(rng.uniform(0, 0.05))
        process.kill()
        committed |= {line.decode().strip() for line in (await process.stdout.read()).splitlines()}
        await process.wait()
        async with Spool.open(path) as spool:
            assert spool.recovery is None
            kept = dict(spool.pending())
        assert committed <= kept.keys()
        assert all(kept[name] == f"payload {name}".encode() * 50 for name in kept)


async def test_old_results_are_dropped_on_opening(path: Path) -> None:
    async with Spool.open(path, clock=lambda: 1000 * DAY) as spool:
        await spool.commit("old", b"1")
    for day in range(1, 16):
        async with Spool.open(path, clock=lambda: (1000 + day) * DAY) as spool:  # noqa: B023
            assert spool.expired == (day == 15), day
            if day == 10:
                await spool.commit("young", b"2")
    async with Spool.open(path, clock=lambda: 1015 * DAY) as spool:
        assert spool.expired == 0
        assert spool.pending() == [("young", b"2")]


async def test_days_are_counted_and_not_starts(path: Path) -> None:
    async with Spool.open(path, clock=lambda: 1000 * DAY) as spool:
        await spool.commit("b", b"1")
    for hour in range(1, 48):
        async with Spool.open(path, clock=lambda: 1000 * DAY + hour * 3600.0) as spool:  # noqa: B023
            assert spool.expired == 0


@pytest.mark.parametrize("wrong", [3650 * DAY, 0.0, 1000 * DAY - 3600.0])
async def test_a_clock_that_jumps_drops_nothing(path: Path, wrong: float) -> None:
    async with Spool.open(path, clock=lambda: wrong) as spool:
        await spool.commit("under-the-wrong-clock", b"1")
    async with Spool.open(path, clock=lambda: 1000 * DAY) as spool:
        await spool.commit("under-the-right-one", b"2")
    for clock in (wrong, 1000 * DAY) * 5:
        async with Spool.open(path, clock=lambda: clock) as spool:  # noqa: B023
            assert spool.expired == 0
            assert len(spool.pending()) == 2


async def test_a_start_does_not_fail_because_days_cannot_be_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(path, 1)

    def full(*_: object) -> set[str]:
        raise sqlite3.OperationalError("database or disk is full")

    # As on a full disk, which takes no new pages.
    monkeypatch.setattr("ai4all.delivery.spool.drop_old", full)
    async with Spool.open(path) as spool:
        assert len(spool.pending()) == 1


async def test_commits_that_wait_together_share_a_transaction(path: Path) -> None:
    async with Spool.open(path) as spool:
        statements: list[str] = []
        spool._writer._connection.set_trace_callback(statements.append)
        await asyncio.gather(*(spool.commit(f"b{n}", b"x") for n in range(200)))
        commits = statements.count("COMMIT")
        rows = sum(text.count("('b") for text in statements if "INSERT INTO results" in text)
    assert rows == 200
    assert commits <= 5


async def test_a_note_shares_the_transaction_of_its_result(path: Path) -> None:
    async with Spool.open(path) as spool:
        statements: list[str] = []
        spool._writer._connection.set_trace_callback(statements.append)
        spool.begin("a")
        await spool.commit("a", b"x")
        assert statements.count("COMMIT") == 1


async def test_a_block_of_a_moment_leaves_no_note(path: Path) -> None:
    async with Spool.open(path) as spool:
        statements: list[str] = []
        spool._writer._connection.set_trace_callback(statements.append)
        spool.begin("a")
        await spool.commit("a", b"x")
        spool.begin("b")
        spool.ended("b")
        spool.begin("c")
        await spool.commit("c", b"x")
        assert not any("running" in text for text in statements)


async def test_a_note_that_may_be_on_the_disk_is_deleted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def running() -> tuple[str, ...]:
        async with Spool.open(path) as spool:
            return spool.interrupted

    async with Spool.open(path) as spool:
        for block in ("a", "b", "c", "d"):
            spool.begin(block)
        await spool.commit("other", b"x")  # Takes the notes along.
        await spool.commit("a", b"x")
        spool.ended("b")
        spool.begin("c")  # Again, and then over before this note is written.
        await spool.commit("c", b"x")
    assert await running() == ("d",)
    async with Spool.open(path) as spool:
        spool.begin("d")  # Given to us again.
        await spool.commit("d", b"x")
    assert await running() == ()


async def test_a_result_that_cannot_be_kept_leaves_its_block_running(path: Path) -> None:
    async with Spool.open(path, max_bytes=1000) as spool:
        transact = spool._writer._transact

        def full(batch: list[Operation]) -> None:
            if any(sql == INSERT_RESULT for each in batch for sql, _ in each.statements):
                raise sqlite3.OperationalError("database or disk is full")
            transact(batch)

        spool._writer._transact = full  # type: ignore[method-assign]
        spool.begin("a")
        with pytest.raises(SpoolError, match="full"):
            await spool.commit("a", b"x")
        with pytest.raises(SpoolError, match="beyond the limit"):
            await spool.commit("a", b"x" * 2000)
        spool._writer._transact = transact  # type: ignore[method-assign]
    async with Spool.open(path) as spool:
        assert spool.interrupted == ("a",)
        await spool.commit("a", b"x")
    async with Spool.open(path) as spool:
        assert spool.interrupted == ()


async def test_many_results_of_one_moment_are_all_kept_and_all_forgotten(path: Path) -> None:
    async with Spool.open(path) as spool:
        await asyncio.gather(*(spool.commit(f"b{n}", bytes([n % 256])) for n in range(700)))
        expected = [(f"b{n}", bytes([n % 256])) for n in range(700)]
        assert spool.pending() == expected
    async with Spool.open(path) as spool:
        assert spool.pending() == expected
        gone = asyncio.gather(*(spool.forget(f"b{n}") for n in range(0, 700, 2)))
        await asyncio.gather(gone, spool.commit("last", b"x"))
    async with Spool.open(path) as spool:
        assert spool.pending() == [*expected[1::2], ("last", b"x")]


async def test_what_is_acknowledged_goes_with_the_next_result(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "_PATIENT_S", 3600.0)
    async with Spool.open(path) as spool:
        await spool.commit("a", b"x")
        statements: list[str] = []
        spool._writer._connection.set_trace_callback(statements.append)
        forgetting = asyncio.ensure_future(spool.forget("a"))
        await asyncio.sleep(0.05)
        assert not forgetting.done()
        await asyncio.gather(forgetting, spool.commit("b", b"y"))
        assert statements.count("COMMIT") == 1
        assert spool.pending() == [("b", b"y")]
        last = asyncio.ensure_future(spool.forget("b"))
        await asyncio.sleep(0)
    await last  # Closing waits for nobody.
    async with Spool.open(path) as spool:
        assert spool.pending() == []


async def test_the_loop_runs_while_the_disk_is_slow(path: Path) -> None:
    async with Spool.open(path) as spool:
        release = threading.Event()
        transact = spool._writer._transact

        def slow(batch: list[object]) -> None:
            assert release.wait(30)
            transact(batch)  # type: ignore[arg-type]

        spool._writer._transact = slow  # type: ignore[method-assign, assignment]
        first = asyncio.ensure_future(spool.commit("a", b"1"))
        again = asyncio.ensure_future(spool.commit("a", b"1"))
        other = asyncio.ensure_future(spool.commit("a", b"2"))
        dropped = asyncio.ensure_future(spool.commit("b", b"3"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not spool.has("a"), "not before it is durable"
        assert not first.done()
        assert not again.done(), "the same bytes are not safe before they are"
        dropped.cancel()
        release.set()
        await first
        await again
        with pytest.raises(ResultConflict):
            await other
        with pytest.raises(asyncio.CancelledError):
            await dropped
        await spool.forget("nothing, but after b")
        while not spool.has("b"):
            await asyncio.sleep(0.001)


async def test_a_spool_that_is_not_closed_warns(path: Path) -> None:
    spool = Spool.open(path)
    await spool.commit("a", b"1")
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031 - two halves of one
        del spool
        gc.collect()
    deadline = time.monotonic() + 10
    while True:
        try:
            reopened = Spool.open(path)
        except SpoolError:
            assert time.monotonic() < deadline
            continue
        break
    assert reopened.pending() == [("a", b"1")]
    await reopened.close()


# A disk that is full.

FULL_DISK = """
    import asyncio, resource, sys
    from pathlib import Path
    from ai4all.delivery.spool import Spool
    from ai4all.errors import SpoolError

    async def main():
        path = Path(sys.argv[1])
        spool = Spool.open(path)
        await spool.commit("before", b"x" * 1000)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = max(f.stat().st_size for f in path.parent.iterdir())
        # Every write beyond this fails, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, unlimited[1]))
        failed = 0
        outcomes = await asyncio.gather(
            *(spool.commit(f"during-{n}", b"y" * 5_000) for n in range(20)),
            return_exceptions=True,
        )
        for n, outcome in enumerate(outcomes):
            assert outcome is None or isinstance(outcome, SpoolError), outcome
            assert spool.has(f"during-{n}") == (outcome is None)
            failed += outcome is not None
        assert failed, "the disk was never full"
        assert "disk" in str(next(o for o in outcomes if o)), outcomes
        assert spool.has("before")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        await spool.commit("after", b"z" * 100_000)
        expected = spool.pending()
        assert spool.bytes_used == sum(len(p) for _, p in expected)
        await spool.close()
        again = Spool.open(path)
        assert again.pending() == expected
        assert again.recovery is None
        await again.close()
        print("survived", failed)

    asyncio.run(main())
"""


def test_a_full_disk_loses_nothing_and_is_recovered_from(path: Path) -> None:
    result = run_script(FULL_DISK, path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("survived")


async def test_a_result_that_cannot_be_dropped_is_still_pending(path: Path) -> None:
    async with Spool.open(path) as spool:
        await spool.commit("a", b"1")
        spool._writer._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(SpoolError, match="cannot be written"):
            await spool.forget("a")
        with pytest.raises(SpoolError, match="cannot be written"):
            await spool.commit("b", b"2")
        assert spool.pending() == [("a", b"1")]
        spool._writer._connection.execute("PRAGMA query_only = OFF")
        await spool.forget("a")
        await spool.commit("b", b"2")
        assert spool.pending() == [("b", b"2")]


async def test_one_bad_operation_does_not_take_the_others_with_it(path: Path) -> None:
    async with Spool.open(path) as spool:
        spool._writer._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        outcomes = await asyncio.gather(
            spool.commit("a", b"1"),
            spool.commit("too long", b"x" * 20_000),
            spool.commit("b", b"2"),
            return_exceptions=True,
        )
        assert [type(o) for o in outcomes] == [type(None), SpoolError, type(None)]
        assert spool.pending() == [("a", b"1"), ("b", b"2")]


# A file that is damaged.


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble_header(path: Path) -> None:
    with path.open("rb+") as file:
        file.write(b"\x00" * 100)


def scribble_middle(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xa5" * 4096)


def flip_a_bit_of_a_result(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"\x07" * 500)
    data[at + 250] ^= 1
    path.write_bytes(data)


def rename_a_table(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"payload BLOB", b"payload BLOT").replace(b"seq INT", b"sec INT"))


def spoil_the_texts_of_ids(path: Path) -> None:
    """What stood for a text is none any more, in the table and in its index."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"b7", b"\xff7").replace(b"b23", b"\xff23"))


def spoil_the_text_of_the_schema(path: Path) -> None:
    """What SQLite says of it quotes what is no text."""
    data = path.read_bytes()
    data = data.replace(b"tableresults", b"table\x8besults").replace(
        b"CREATE TABLE results", b"CREATE TABBLE result"
    )
    path.write_bytes(data)


def replace_by_text(path: Path) -> None:
    path.write_text("this is no database\n" * 100)


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (truncate, 0),
        (scribble_header, 0),
        (scribble_middle, 20),
        (flip_a_bit_of_a_result, 39),
        (rename_a_table, 0),
        (spoil_the_texts_of_ids, 38),
        (spoil_the_text_of_the_schema, 0),
        (replace_by_text, 0),
    ],
)
async def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(
    path: Path, damage: Callable[[Path], None], least: int
) -> None:
    expected = await filled(path, 40, 3000)
    damage(path)
    damaged = content(path)
    async with Spool.open(path) as spool:
        recovery = spool.recovery
        assert recovery is not None
        kept = spool.pending()
        assert set(kept) <= set(expected), "nothing is ever made up"
        assert kept == [row for row in expected if row in kept], "and the order is kept"
        assert recovery.salvaged == len(kept) >= least
        assert content(recovery.set_aside) == damaged, "the evidence is untouched"
        assert stat.S_IMODE(recovery.set_aside.stat().st_mode) == 0o600
        await spool.commit("new", b"1")
    async with Spool.open(path) as spool:
        assert spool.recovery is None
        assert spool.pending() == [*kept, ("new", b"1")]


async def test_an_empty_database_beside_a_full_log_is_damage(path: Path) -> None:
    async with Spool.open(path) as spool:
        await spool.commit("a", b"1")
        wal = path.with_name(path.name + "-wal")
        kept_wal = path.with_name("kept-wal")
        shutil.copy2(wal, kept_wal)
    put(path, b"")
    shutil.move(kept_wal, wal)
    async with Spool.open(path) as spool:
        assert spool.recovery is not None
        aside = spool.recovery.set_aside
        assert aside.with_name(aside.name + "-wal").stat().st_size > 0


@pytest.mark.parametrize("step", ["_copy", "_salvage", "_write_salvaged", "_finish_salvage"])
async def test_a_recovery_that_is_interrupted_is_done_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Killed(BaseException):
        pass

    expected = await filled(path, 20, 3000)
    flip_a_bit_of_a_result(path)
    calls = 0

    def die(*args: object) -> None:
        nonlocal calls
        calls += 1
        # The first call of the last step finds nothing to finish.
        if step != "_finish_salvage" or calls == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"ai4all.delivery.results_file.{step}", die)
        with pytest.raises(Killed):
            Spool.open(path)
    async with Spool.open(path) as spool:
        assert len(spool.pending()) == 19
        assert set(spool.pending()) < set(expected)
    assert not path.with_name(path.name + ".salvaged").exists()


RESULTS_BEFORE_3 = """CREATE TABLE results (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, block_id TEXT NOT NULL UNIQUE, payload BLOB NOT NULL,
    sha256 BLOB NOT NULL, committed_at REAL NOT NULL)"""
RUNNING_BEFORE = {
    1: "CREATE TABLE running (block_id TEXT PRIMARY KEY, begun_at REAL NOT NULL) WITHOUT ROWID",
    2: "CREATE TABLE running (block_id TEXT PRIMARY KEY, begun_at REAL NOT NULL, deadline REAL)"
    " WITHOUT ROWID",
}


@pytest.mark.parametrize("version", [1, 2])
async def test_a_file_of_an_older_version_is_brought_up_to_date(path: Path, version: int) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(RESULTS_BEFORE_3)
        connection.execute(RUNNING_BEFORE[version])
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute(INSERT_RESULT, Row("b", b"kept", 5.0).values())
        connection.execute("INSERT INTO running (block_id, begun_at) VALUES ('r', 5.0)")
    connection.close()
    for _ in range(2):
        async with Spool.open(path) as spool:
            assert spool.recovery is None
            assert spool.pending() == [("b", b"kept")]
            # Of the first version it is not known until when anybody waits for it.
            assert spool.interrupted == (() if version == 1 else ("r",))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT days FROM results").fetchall() == [(0,)]
    connection.close()


async def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    await filled(path, 1)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = content(path)
    with pytest.raises(SpoolError, match="newer version"):
        Spool.open(path)
    assert content(path) == before


async def test_a_database_of_something_else_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    with pytest.raises(SpoolError, match="something else"):
        Spool.open(path)
    assert os.listdir(path.parent) == [path.name]


async def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="file/results"):
        Spool.open(tmp_path / "file" / "results.sqlite3")
    (tmp_path / "directory").mkdir()
    with pytest.raises(SpoolError, match="directory"):
        Spool.open(tmp_path / "directory")


# Everything together, against a model of it.


class SpoolAgainstModel(RuleBasedStateMachine):
    """Commits, repeats, forgets, clean restarts and crashes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.lives = 0
        self.model: dict[str, bytes] = {}
        self.running: set[str] = set()
        self.interrupted: set[str] = set()
        self.path = self.directory / "0" / "results.sqlite3"
        self.spool = self.open()

    def open(self) -> Spool:
        async def opened() -> Spool:
            return Spool.open(self.path)

        return self.runner.run(opened())

    blocks = st.sampled_from([f"b{n}" for n in range(6)])
    payloads = st.binary(max_size=40)

    @rule(block=blocks, payload=payloads)
    def commit(self, block: str, payload: bytes) -> None:
        if self.model.get(block, payload) != payload:
            with pytest.raises(ResultConflict):
                self.runner.run(self.spool.commit(block, payload))
            return
        if block not in self.model:
            self.running.discard(block)
            self.interrupted.discard(block)
        self.runner.run(self.spool.commit(block, payload))
        self.model.setdefault(block, payload)

    @rule(block=blocks)
    def forget(self, block: str) -> None:
        async def forgotten() -> None:
            await self.spool.forget(block)

        self.runner.run(forgotten())
        self.model.pop(block, None)

    @rule(batch=st.lists(st.tuples(blocks, payloads), min_size=2, max_size=8))
    def commit_together(self, batch: list[tuple[str, bytes]]) -> None:
        async def together() -> list[BaseException | None]:
            return await asyncio.gather(
                *(self.spool.commit(*item) for item in batch), return_exceptions=True
            )

        for (block, payload), outcome in zip(batch, self.runner.run(together()), strict=True):
            if outcome is None:
                if block not in self.model:
                    self.running.discard(block)
                    self.interrupted.discard(block)
                assert self.model.setdefault(block, payload) == payload
            else:
                assert isinstance(outcome, ResultConflict)
                assert self.model[block] != payload

    @rule(block=blocks)
    def begin(self, block: str) -> None:
        self.spool.begin(block)
        self.running.add(block)

    @rule(block=blocks)
    def end(self, block: str) -> None:
        self.spool.ended(block)
        self.running.discard(block)
        self.interrupted.discard(block)

    @rule()
    def restart(self) -> None:
        self.runner.run(self.spool.close())
        self.interrupted = self.running | self.interrupted
        self.running = set(self.interrupted)
        self.spool = self.open()

    @precondition(lambda self: self.lives < 4)
    @rule()
    def crash(self) -> None:
        """What is on the disk at this moment is what the next life finds."""
        self.lives += 1
        # A commit that has returned flushes the notes before it too.
        self.runner.run(self.spool.commit(f"flush-{self.lives}", b""))
        self.model[f"flush-{self.lives}"] = b""
        copy = self.directory / str(self.lives)
        shutil.copytree(self.path.parent, copy)
        self.runner.run(self.spool.close())
        self.path = copy / "results.sqlite3"
        self.interrupted = self.running | self.interrupted
        self.running = set(self.interrupted)
        self.spool = self.open()

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert self.spool.pending() == list(self.model.items())
        assert self.spool.bytes_used == sum(map(len, self.model.values()))
        assert set(self.spool.interrupted) == self.interrupted
        assert self.spool.recovery is None

    def teardown(self) -> None:
        self.runner.run(self.spool.close())
        self.runner.close()
        shutil.rmtree(self.directory)


TestSpoolAgainstModel = SpoolAgainstModel.TestCase
TestSpoolAgainstModel.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
