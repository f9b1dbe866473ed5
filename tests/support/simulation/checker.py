"""Reads a history and says what in it must not be.

Safety: every block ends exactly once, and so does every assignment; accepted ids are unique; equal
ids have equal bytes; there is no result for a block that was never given; nothing is sent before
it was committed, and nothing that was committed vanishes before its acknowledgement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from simulation.history import LEFT_RUNNING, Kind, Record

# By design not kept: they hand a block back, and can be said again at any time.
_NOT_KEPT: Final = ("shutting_down", "preempted", LEFT_RUNNING)


@dataclass(slots=True)
class _Result:
    """What is known of the result that a worker has of a block.

    ``digest`` is None when none is kept; ``last`` is the one that was kept last, ``sent`` the one
    that went out last, and ``acknowledged`` are those that were answered. The doubts are those of
    a power cut: a write or a delete of which nobody knows whether it reached the disk.
    """

    digest: str | None = None
    last: str | None = None
    sent: str | None = None
    acknowledged: set[str] = field(default_factory=set)
    doubted_digest: str | None = None
    doubted_delete: bool = False
    # Sent without being kept, because the disk refused.
    refused: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Attempt:
    """An assignment of a block to a worker that has not ended. ``results`` are those that came."""

    results: dict[str, str] = field(default_factory=dict)


class Checker:
    """Follows a history record by record.

    Attributes:
        faults: What must not be, in the order in which it was found.
        unfinished: Blocks that have not ended.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.unfinished: dict[str, None] = {}
        self._ended: dict[str, Kind] = {}
        # How often a worker was told that it has a block, and how often it declined.
        self._given: dict[tuple[str, str], int] = {}
        self._declines: dict[tuple[str, str], int] = {}
        # Which life of the worker it was in: the next one may not know yet, and hands it back.
        self._lives: dict[str, int] = {}
        self._declined_in: dict[tuple[str, str], int] = {}
        self._open: dict[tuple[str, str], _Attempt] = {}
        self._closed: dict[tuple[str, str], Kind] = {}
        self._results: dict[tuple[str, str], _Result] = {}
        self._found: dict[str, dict[str, str]] = {}
        self._opening: str | None = None

    def read(self, record: Record) -> None:
        """Take the next record."""
        if self._opening is not None and record.kind is not Kind.FOUND:
            self._opened(record)
        _RULES[record.kind](self, record)

    def close(self) -> None:
        """Nothing follows: look at what is left open."""
        end = Record(float("inf"), Kind.FORGOT)
        if self._opening is not None:
            self._opened(end)
        for block in self.unfinished:
            self._fault(end, f"block {block} never ended")
        for worker, block in self._open:
            self._fault(end, f"block {block} is still with {worker}, who was given it")
        for (worker, block), result in self._results.items():
            if result.digest is not None:
                self._fault(end, f"{worker} still keeps a result of {block}")

    def _fault(self, record: Record, text: str) -> None:
        self.faults.append(f"{record.at:.3f} {text}")

    # The coordinator's records.

    def _added(self, record: Record) -> None:
        self.unfinished[record.block] = None

    def _given_out(self, record: Record) -> None:
        key = (record.worker, record.block)
        if record.block in self._ended:
            self._fault(record, f"block {record.block} was given out after its end")
        if record.kind is Kind.GIVEN:
            self._given[key] = self._given.get(key, 0) + 1
        self._open[key] = _Attempt()
        self._closed.pop(key, None)

    def _submitted(self, record: Record) -> None:
        key = (record.worker, record.block)
        if not self._check_given(record):
            return
        attempt = self._open.get(key)
        if attempt is None:
            # A block that was given twice, before the first was declined, has two answers.
            is_answered = self._given[key] <= self._declines.get(key, 0)
            is_same_life = self._declined_in.get(key) == self._lives.get(record.worker, 0)
            if is_answered and is_same_life and self._closed.get(key) is Kind.DECLINED:
                self._fault(record, f"{record.worker} declined {record.block} and then sent it")
            return
        attempt.results[record.digest] = record.detail
        kept = [digest for digest, code in attempt.results.items() if code not in _NOT_KEPT]
        if len(kept) > 1 and not set(kept) & self._results[key].refused:
            self._fault(record, f"{record.worker} sent {len(kept)} results of one assignment")

    def _declined(self, record: Record) -> None:
        key = (record.worker, record.block)
        if not self._check_given(record):
            return
        attempt = self._open.pop(key, None)
        if attempt is not None and attempt.results:
            self._fault(record, f"{record.worker} sent {record.block} and then declined it")
        self._closed[key] = Kind.DECLINED
        self._declined_in[key] = self._lives.get(record.worker, 0)
        self._declines[key] = self._declines.get(key, 0) + 1

    def _abandoned(self, record: Record) -> None:
        if self._check_given(record):
            self._end_attempt(record)

    def _requeued(self, record: Record) -> None:
        self._end_attempt(record)

    def _over(self, record: Record) -> None:
        block = record.block
        if block in self._ended:
            self._fault(record, f"block {block} ended as {self._ended[block]} before")
        elif block not in self.unfinished:
            self._fault(record, f"block {block} ended, which nobody asked for")
        self._ended[block] = record.kind
        self.unfinished.pop(block, None)
        for worker, other in list(self._open):
            if other == block:
                self._closed[worker, block] = record.kind
                del self._open[worker, block]

    def _forgot(self, record: Record) -> None:
        self._open.clear()

    def _violation(self, record: Record) -> None:
        self._fault(record, f"{record.worker} broke the protocol: {record.detail}")

    def _check_given(self, record: Record) -> bool:
        if (record.worker, record.block) in self._given:
            return True
        self._fault(record, f"{record.worker} was never given {record.block}")
        return False

    def _end_attempt(self, record: Record) -> None:
        key = (record.worker, record.block)
        if self._open.pop(key, None) is not None:
            self._closed[key] = record.kind

    # The records of the disk and the ear.

    def _begin_opening(self, record: Record) -> None:
        self._opening = record.worker
        self._found[record.worker] = {}
        self._lives[record.worker] = self._lives.get(record.worker, 0) + 1

    def _found_one(self, record: Record) -> None:
        self._found[record.worker][record.block] = record.digest

    def _opened(self, record: Record) -> None:
        """All that an opened spool holds is known: compare."""
        opened, self._opening = self._opening, None
        assert opened is not None
        found = self._found[opened]
        for (worker, block), result in self._results.items():
            if worker != opened:
                continue
            now = found.pop(block, None)
            if now is None:
                if result.digest is not None and not result.doubted_delete:
                    self._fault(record, f"{worker} lost a committed result of {block}")
            elif now != result.digest and now != result.doubted_digest:
                self._fault(record, f"{worker} found another result of {block} than it kept")
            result.digest = now
            result.last = now or result.last
            result.doubted_digest, result.doubted_delete = None, False
        for block in found:
            self._fault(record, f"{opened} found a result of {block} that nobody wrote")

    def _committed(self, record: Record) -> None:
        result = self._results.setdefault((record.worker, record.block), _Result())
        if result.digest is not None and result.digest != record.digest:
            self._fault(record, f"{record.worker} keeps two results of {record.block}")
        result.digest = result.last = record.digest

    def _not_committed(self, record: Record) -> None:
        result = self._results.setdefault((record.worker, record.block), _Result())
        result.refused.add(record.digest)

    def _forgotten(self, record: Record) -> None:
        result = self._results.setdefault((record.worker, record.block), _Result())
        self._check_acknowledged(record, result)
        result.digest = None

    def _in_doubt(self, record: Record) -> None:
        result = self._results.setdefault((record.worker, record.block), _Result())
        if record.detail == "insert":
            result.doubted_digest = record.digest
        else:
            self._check_acknowledged(record, result)
            result.doubted_delete = True

    def _sent(self, record: Record) -> None:
        result = self._results.setdefault((record.worker, record.block), _Result())
        result.sent = record.digest
        if record.detail in _NOT_KEPT:
            if record.detail == LEFT_RUNNING and result.digest is not None:
                self._fault(record, f"{record.worker} hands back {record.block} that it finished")
            return
        if record.digest == result.last or record.digest in result.refused:
            return
        if result.last is None:
            self._fault(
                record, f"{record.worker} sent a result of {record.block} before it kept it"
            )
        else:
            self._fault(
                record, f"{record.worker} keeps one result of {record.block} and sent another"
            )

    def _acknowledged(self, record: Record) -> None:
        result = self._results.get((record.worker, record.block))
        if result is not None and result.sent is not None:
            result.acknowledged.add(result.sent)

    def _check_acknowledged(self, record: Record, result: _Result) -> None:
        if result.digest is not None and result.digest not in result.acknowledged:
            self._fault(record, f"{record.worker} forgot {record.block} before it was acknowledged")


_RULES: Final = {
    Kind.ADDED: Checker._added,
    Kind.GIVEN: Checker._given_out,
    Kind.KEPT: Checker._given_out,
    Kind.SUBMITTED: Checker._submitted,
    Kind.DECLINED: Checker._declined,
    Kind.ABANDONED: Checker._abandoned,
    Kind.REQUEUED: Checker._requeued,
    Kind.DELIVERED: Checker._over,
    Kind.FAILED: Checker._over,
    Kind.FORGOT: Checker._forgot,
    Kind.VIOLATION: Checker._violation,
    Kind.OPENED: Checker._begin_opening,
    Kind.FOUND: Checker._found_one,
    Kind.COMMITTED: Checker._committed,
    Kind.NOT_COMMITTED: Checker._not_committed,
    Kind.FORGOTTEN: Checker._forgotten,
    Kind.IN_DOUBT: Checker._in_doubt,
    Kind.SENT: Checker._sent,
    Kind.ACKNOWLEDGED: Checker._acknowledged,
}


def check(history: Iterable[Record]) -> list[str]:
    """What must not be in a whole history."""
    checker = Checker()
    for record in history:
        checker.read(record)
    checker.close()
    return checker.faults
