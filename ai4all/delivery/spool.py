"""Results that are not yet acknowledged, kept where a crash cannot take them.

A finished result is committed here before it is sent and forgotten only when the coordinator has
acknowledged it, so it goes out at least once; the coordinator drops repeats by ``block_id``. The
bytes kept are the bytes sent, the same each time.

One thread writes (``group_commit``), and the event loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

import structlog

from ai4all.delivery.group_commit import Operation, SpoolWriter, Statement, Writer, call_on
from ai4all.delivery.results_file import (
    DELETE_RESULT,
    DELETE_RUNNING,
    INSERT_RESULT,
    INSERT_RUNNING,
    Recovery,
    Row,
    Running,
    drop_old,
    open_file,
    problem,
)
from ai4all.errors import SpoolError

__all__ = [
    "DEFAULT_KEEP_DAYS",
    "DEFAULT_MAX_BYTES",
    "MemorySpool",
    "Recovery",
    "ResultConflict",
    "ResultSpool",
    "Spool",
]

DEFAULT_MAX_BYTES = 256 * 1024 * 1024
"""Most bytes of results that a spool holds."""

DEFAULT_KEEP_DAYS = 14
"""Days that a result is kept for a coordinator that never acknowledges it."""

_log = structlog.get_logger(__name__)


class ResultConflict(SpoolError, ValueError):
    """A block already has a result, and it is another one."""

    def __init__(self, path: object, block_id: str) -> None:
        super().__init__(path, f"block {block_id!r} already has another result")
        self.block_id = block_id


class ResultSpool(Protocol):
    """What a worker needs of a spool. All calls belong to one event loop's thread."""

    async def commit(
        self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
    ) -> None:
        """Keep a result, and note that its block no longer runs.

        It is durable when this returns. The same bytes for the same block again change nothing.

        Args:
            block_id: The block.
            payload: The result.
            kept: Called as soon as the result is durable, on the loop and before this returns:
                all results of one transaction are told of in one turn of the loop.

        Raises:
            ResultConflict: The block has another result.
            SpoolError: It could not be kept; what was kept before still is.
        """

    def forget(self, block_id: str) -> Awaitable[None]:
        """Drop an acknowledged result. One that is not here is no error.

        Raises:
            SpoolError: It could not be dropped, and is still pending.
        """

    def pending(self) -> list[tuple[str, bytes]]:
        """Results to be sent, in the order of their commits."""

    def has(self, block_id: str) -> bool:
        """Whether a result for the block is kept here."""

    def begin(self, block_id: str, deadline: float | None = None) -> None:
        """Note that a block runs. Not waited for: losing the note costs a lease, not a result.

        Args:
            block_id: The block.
            deadline: When its coordinator no longer waits for it, in seconds since the epoch.
        """

    def ended(self, block_id: str) -> None:
        """Note that a block no longer runs, and left no result."""

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Blocks that ran when the process before this one ended, and have not ended since.

        Without those whose deadline had passed by then: nobody waits for them.
        """

    @property
    def bytes_used(self) -> int:
        """Bytes of results kept, or on their way to the disk."""

    @property
    def max_bytes(self) -> int:
        """Most bytes of results that are kept."""

    async def close(self) -> None:
        """Finish what was asked and let go. May be called again."""


class Spool:
    """A ``ResultSpool`` on disk. Made by ``Spool.open``.

    The results themselves are in memory too: there are as many as a worker finishes while its
    coordinator is away, and sending them again must not wait for the disk.

    Attributes:
        path: The database.
        recovery: What was done about a damaged file, if it was damaged.
        expired: Results that were dropped on opening because they were too old.
    """

    def __init__(
        self,
        path: Path,
        writer: SpoolWriter,
        *,
        rows: Sequence[Row],
        interrupted: Sequence[str],
        max_bytes: int,
        recovery: Recovery | None,
        expired: int,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self.recovery = recovery
        self.expired = expired
        self._writer = writer
        self._clock = clock
        self._max_bytes = max_bytes
        self._results = {row.block_id: row.payload for row in rows}
        self._bytes = sum(len(row.payload) for row in rows)
        self._interrupted = dict.fromkeys(interrupted)
        # The notes of blocks that run; None for one that another note of its block came before.
        self._begun: dict[str, Operation | None] = {}
        # One operation of a block at a time, and who waits for its end.
        self._busy: dict[str, list[asyncio.Future[None]]] = {}
        self._closing: asyncio.Future[None] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        keep_days: float = DEFAULT_KEEP_DAYS,
        clock: Callable[[], float] = time.time,
        writer: Callable[[Path, sqlite3.Connection], SpoolWriter] = Writer,
    ) -> Self:
        """Open a spool, create it if it is missing, recover it if it is damaged. Blocks.

        Args:
            path: The database; ``results.sqlite3`` in the data directory.
            max_bytes: Most bytes of results to keep.
            keep_days: Results that were here on more days than this are dropped now.
            clock: Seconds since the epoch.
            writer: Makes what writes; by default a thread.

        Raises:
            SpoolError: It cannot be used; the text says why.
        """
        path = Path(path)
        connection, contents, recovery = open_file(path)
        lapsed = [
            each.block_id
            for each in contents.running
            if each.deadline is not None and each.deadline <= clock()
        ]
        dropped: set[str] = set()
        try:
            dropped = drop_old(connection, clock(), keep_days)
            connection.executemany(DELETE_RUNNING, ((block_id,) for block_id in lapsed))
        except sqlite3.Error as exc:
            # A full disk, most likely, and no reason not to start: the next start tidies up.
            _log.warning("spool_not_tidied", problem=problem(exc))
        rows = [row for row in contents.rows if row.block_id not in dropped]
        expired = len(dropped)
        if recovery is not None:
            _log.error(
                "spool_recovered",
                set_aside=str(recovery.set_aside),
                damage=recovery.damage,
                salvaged=recovery.salvaged,
                damaged=recovery.damaged,
            )
        if expired:
            _log.warning("spool_expired", results=expired, keep_days=keep_days)
        for block_id in lapsed:
            _log.warning("block_lost_in_restart", block_id=block_id, handed_back=False)
        return cls(
            path,
            writer(path, connection),
            rows=rows,
            interrupted=[b.block_id for b in contents.running if b.block_id not in lapsed],
            max_bytes=max_bytes,
            recovery=recovery,
            expired=expired,
            clock=clock,
        )

    def __del__(self) -> None:
        # A failed __init__ of a subclass may leave no attributes.
        writer = getattr(self, "_writer", None)
        if writer is not None and self._closing is None:
            warnings.warn(f"the spool {self.path} was not closed", ResourceWarning, stacklevel=2)
            writer.stop(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Blocks that ran when the process before this one ended, and have not ended since."""
        return tuple(self._interrupted)

    @property
    def bytes_used(self) -> int:
        """Bytes of results kept, or on their way to the disk."""
        return self._bytes

    @property
    def max_bytes(self) -> int:
        """Most bytes of results that are kept."""
        return self._max_bytes

    def pending(self) -> list[tuple[str, bytes]]:
        """Results to be sent, in the order of their commits."""
        return list(self._results.items())

    def has(self, block_id: str) -> bool:
        """Whether a result for the block is kept here."""
        return block_id in self._results

    async def commit(
        self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
    ) -> None:
        """Keep a result; see ``ResultSpool``."""
        if block_id in self._busy:
            await self._turn(block_id)
        self._check_open()
        known = self._results.get(block_id)
        if known is not None:
            if known != payload:
                raise ResultConflict(self.path, block_id)
            if kept is not None:
                kept()
            return
        if self._bytes + len(payload) > self._max_bytes:
            raise SpoolError(
                self.path,
                f"it holds {self._bytes} bytes of results that wait for the coordinator, and"
                f" {len(payload)} more are beyond the limit of {self._max_bytes}",
            )
        self._bytes += len(payload)
        row = Row(block_id, payload, self._clock())
        statements: list[Statement] = [(INSERT_RESULT, row.values())]
        begun = self._begun.pop(block_id, None)
        if begun is None or not self._writer.withdraw(begun):
            begun = None
            statements.append((DELETE_RUNNING, (block_id,)))
        # Else it was a block of a moment: nobody needs to have known that it ran.

        def settled(error: SpoolError | None) -> None:
            if error is None:
                self._results[block_id] = payload
                self._interrupted.pop(block_id, None)
                if kept is not None:
                    kept()
                return
            self._bytes -= len(payload)
            if begun is not None and self._closing is None:
                self._begun[block_id] = begun
                self._writer.put(begun)

        await self._write(block_id, settled, statements)

    def forget(self, block_id: str) -> Awaitable[None]:
        """Drop an acknowledged result; see ``ResultSpool``."""
        if self._closing is None and block_id in self._results and block_id not in self._busy:
            return self._drop(block_id)
        return self._drop_in_turn(block_id)

    async def _drop_in_turn(self, block_id: str) -> None:
        await self._turn(block_id)
        self._check_open()
        if block_id in self._results:
            await self._drop(block_id)

    def _drop(self, block_id: str) -> asyncio.Future[None]:
        def settled(error: SpoolError | None) -> None:
            if error is None:
                self._bytes -= len(self._results.pop(block_id))

        # Nobody waits for it but the next result, which can take it along.
        return self._write(block_id, settled, [(DELETE_RESULT, (block_id,))], urgent=False)

    def begin(self, block_id: str, deadline: float | None = None) -> None:
        """Note that a block runs; see ``ResultSpool``."""
        self._check_open()
        running = Running(block_id, self._clock(), deadline)
        note = Operation.note(INSERT_RUNNING, running.values())
        # One that may be on the disk already is deleted there.
        self._begun[block_id] = None if self._may_run(block_id) else note
        self._writer.put(note)

    def ended(self, block_id: str) -> None:
        """Note that a block no longer runs; see ``ResultSpool``."""
        self._check_open()
        self._interrupted.pop(block_id, None)
        begun = self._begun.pop(block_id, None)
        if begun is None or not self._writer.withdraw(begun):
            self._writer.put(Operation.note(DELETE_RUNNING, (block_id,)))

    async def close(self) -> None:
        """Finish what was asked and let go. May be called again."""
        if self._closing is None:
            loop = asyncio.get_running_loop()
            closing = self._closing = loop.create_future()
            self._writer.stop(lambda: call_on(loop, lambda: closing.set_result(None)))
        await asyncio.shield(self._closing)

    async def _turn(self, block_id: str) -> None:
        while (waiting := self._busy.get(block_id)) is not None:
            waiter = asyncio.get_running_loop().create_future()
            waiting.append(waiter)
            await waiter

    def _check_open(self) -> None:
        if self._closing is not None:
            raise SpoolError(self.path, "it is closed")

    def _may_run(self, block_id: str) -> bool:
        return block_id in self._begun or block_id in self._interrupted

    def _write(
        self,
        block_id: str,
        settled: Callable[[SpoolError | None], None],
        statements: list[Statement],
        *,
        urgent: bool = True,
    ) -> asyncio.Future[None]:
        written = asyncio.get_running_loop().create_future()
        waiting = self._busy[block_id] = []

        def done(error: SpoolError | None) -> None:
            # Who has stopped waiting has not undone what was on its way to the disk.
            del self._busy[block_id]
            failure: Exception | None = error
            try:
                settled(error)
            except Exception as exc:  # noqa: BLE001 - whoever waits hears of what his call raised.
                failure = exc
            if not written.done():
                if failure is None:
                    written.set_result(None)
                else:
                    written.set_exception(failure)
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

        self._writer.put(Operation.awaited(statements, done, urgent=urgent))
        return written


class MemorySpool:
    """A ``ResultSpool`` that lasts as long as its process, for tests and demonstrations.

    Args:
        max_bytes: Most bytes of results to keep.
        interrupted: What to say that the process before left running.
    """

    def __init__(
        self, *, max_bytes: int = DEFAULT_MAX_BYTES, interrupted: Sequence[str] = ()
    ) -> None:
        self._max_bytes = max_bytes
        self._results: dict[str, bytes] = {}
        self._interrupted = dict.fromkeys(interrupted)
        self._closed = False

    async def commit(
        self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
    ) -> None:
        """Keep a result; see ``ResultSpool``."""
        self._check_open()
        if self._results.get(block_id, payload) != payload:
            raise ResultConflict("(memory)", block_id)
        if block_id not in self._results and self.bytes_used + len(payload) > self._max_bytes:
            raise SpoolError("(memory)", f"the limit of {self._max_bytes} bytes is reached")
        self._results[block_id] = payload
        self._interrupted.pop(block_id, None)
        if kept is not None:
            kept()

    async def forget(self, block_id: str) -> None:
        """Drop an acknowledged result; see ``ResultSpool``."""
        self._check_open()
        self._results.pop(block_id, None)

    def pending(self) -> list[tuple[str, bytes]]:
        """Results to be sent, in the order of their commits."""
        return list(self._results.items())

    def has(self, block_id: str) -> bool:
        """Whether a result for the block is kept here."""
        return block_id in self._results

    def begin(self, block_id: str, deadline: float | None = None) -> None:
        """Note that a block runs: of no use after the process, and so not kept."""
        self._check_open()

    def ended(self, block_id: str) -> None:
        """Note that a block no longer runs."""
        self._check_open()
        self._interrupted.pop(block_id, None)

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Blocks that ran when the process before this one ended, and have not ended since."""
        return tuple(self._interrupted)

    @property
    def bytes_used(self) -> int:
        """Bytes of results kept."""
        return sum(map(len, self._results.values()))

    @property
    def max_bytes(self) -> int:
        """Most bytes of results that are kept."""
        return self._max_bytes

    async def close(self) -> None:
        """Let go. May be called again."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolError("(memory)", "it is closed")
