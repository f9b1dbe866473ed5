"""What becomes of each block, without a socket and without a clock.

A block waits, is leased to a worker, and ends once: delivered or failed. The rules:

- A lease ends at its deadline, and a little later for the answer that is still under way. The
  block then waits again, and that counts as a failure of the block.
- A worker that is cut off keeps its leases for a grace period; then the blocks wait again.
- The first success from a worker that was ever given the block is accepted, late or not: work
  that is done is not thrown away because someone else was asked to do it too. Who else holds the
  block is told that it need not go on.
- The same bytes again get the same answer again. Other bytes for a delivered block are refused.
- A failure counts only from the worker that holds the lease. A retryable one lets the block wait
  again, up to ``max_failures`` in all; a block that is handed back by an owner
  (``shutting_down``, ``preempted``) or lost with its worker has not failed, but is not given out
  more than ``max_assignments`` times either.
- A result for a block that its sender was never given is refused.

``now`` is any monotonic clock in seconds.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ai4all.coordinator.history import Event, EventKind
from ai4all.coordinator.tasks import TaskSpec
from ai4all.types.task import BlockMetrics, ErrorCode, ErrorInfo, TaskResult, TaskType

__all__ = ["Assigned", "BlockState", "Ledger", "LeaseRules", "Outcome", "Verdict"]

_HANDED_BACK = frozenset({ErrorCode.SHUTTING_DOWN, ErrorCode.PREEMPTED})
_NO_METRICS = BlockMetrics(queue_time_ms=0.0, execution_time_ms=0.0, total_time_ms=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRules:
    """How long and how often. Times are in seconds.

    Attributes:
        lease: Time that a worker gets when the task names none.
        slack: How long after its deadline an answer may still be under way.
        grace: How long a worker that is cut off keeps its blocks.
        max_failures: Failures after which a block is given up.
        max_assignments: Assignments after which a block is given up, whatever became of them.
    """

    lease: float = 300.0
    slack: float = 2.0
    grace: float = 60.0
    max_failures: int = 3
    max_assignments: int = 30


class BlockState(enum.Enum):
    """Where a block is."""

    WAITING = enum.auto()
    LEASED = enum.auto()
    DELIVERED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Assigned:
    """A block for a worker. ``seconds`` is what it has until its deadline."""

    block_id: str
    task: TaskSpec
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a result: the fields of ``ResultAck``."""

    accepted: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a block ended with.

    Attributes:
        block_id: The block.
        accepted: Whether a worker's result was accepted; a failure that ended the block was
            accepted too. False when the coordinator gave up by itself.
        worker_id: Whose result it is.
        result: The result, or the coordinator's own word on why there is none.
    """

    block_id: str
    accepted: bool
    worker_id: str | None
    result: TaskResult


@dataclass(slots=True)
class _Lease:
    worker_id: str
    session_id: str
    deadline: float
    release_at: float | None = None


@dataclass(slots=True)
class _Block:
    task: TaskSpec
    expires_at: float | None
    state: BlockState = BlockState.WAITING
    lease: _Lease | None = None
    failures: int = 0
    assignments: int = 0
    # The deadline of the last lease of each worker that was ever given it.
    given: dict[str, float] = field(default_factory=dict)
    # What each result that has been judged was told, by its sender and digest.
    answers: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    delivered_digest: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state in (BlockState.DELIVERED, BlockState.FAILED)


class Ledger:
    """The blocks of one coordinator.

    Args:
        rules: How long and how often.
    """

    def __init__(self, rules: LeaseRules | None = None) -> None:
        self.rules = LeaseRules() if rules is None else rules
        self._blocks: dict[str, _Block] = {}
        self._waiting: deque[str] = deque()
        self._leased: dict[str, _Lease] = {}
        self._expiring: list[tuple[float, str]] = []
        self._open = 0
        self._events: list[Event] = []

    @property
    def unfinished(self) -> int:
        """Blocks that have not ended."""
        return self._open

    def state(self, block_id: str) -> BlockState:
        """Where a block is.

        Raises:
            KeyError: There is no such block.
        """
        return self._blocks[block_id].state

    def held_by(self, worker_id: str) -> list[str]:
        """Blocks that are leased to a worker."""
        return [b for b, lease in self._leased.items() if lease.worker_id == worker_id]

    def events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do, or None."""
        times = [self._ends_at(lease) for lease in self._leased.values()]
        times += [at for at, _ in self._expiring[:1]]
        return min(times, default=None)

    # What there is to do.

    def add(self, task: TaskSpec, *, expires_at: float | None = None) -> str:
        """Add a block at the end of the queue.

        Args:
            task: The task; it has a ``block_id`` that is new.
            expires_at: When nobody wants the result any more.

        Returns:
            The ``block_id``.

        Raises:
            ValueError: It has none, or one that is taken.
        """
        block_id = task.block_id
        if block_id is None or block_id in self._blocks:
            raise ValueError(f"a block needs a new block_id, not {block_id!r}")
        self._blocks[block_id] = _Block(task, expires_at)
        self._waiting.append(block_id)
        self._open += 1
        if expires_at is not None:
            heapq.heappush(self._expiring, (expires_at, block_id))
        return block_id

    def restore_given(self, block_id: str, worker_id: str, now: float) -> None:
        """Know from an earlier run that a worker was given a block: it may still have it.

        The worker counts as cut off just now.
        """
        block = self._blocks.get(block_id)
        if block is None or block.is_over:
            return
        if block.lease is not None:
            self._take(block_id, block)
        self._lease(block_id, block, worker_id, "", now)
        assert block.lease is not None
        block.lease.release_at = now + self.rules.grace

    def restore_outcome(self, outcome: Outcome, digest: str) -> None:
        """Know from an earlier run how a block ended."""
        block = self._blocks.get(outcome.block_id)
        if block is None or block.is_over:
            return
        self._close(
            outcome.block_id,
            block,
            BlockState.DELIVERED if outcome.result.success else BlockState.FAILED,
        )
        block.delivered_digest = digest if outcome.result.success else None
        if outcome.worker_id is not None:
            block.given.setdefault(outcome.worker_id, 0.0)
            block.answers[outcome.worker_id, digest] = Verdict(accepted=True)

    # What workers do.

    def assign(
        self,
        worker_id: str,
        session_id: str,
        now: float,
        *,
        offers: Collection[TaskType],
        capacity: int = 1,
    ) -> Assigned | None:
        """Give a worker a block that suits it, or any, so that it can say why not.

        Blocks that it holds from an earlier session may never have reached it, and without
        ``reconcile`` nobody can know. It is given them again when there is nothing else, or when
        they fill it: to a worker that has them, that is a repetition without a meaning.
        """
        held = self.held_by(worker_id)
        if len(held) >= capacity or not self._waiting:
            stale = (b for b in held if self._leased[b].session_id != session_id)
            if (block_id := next(stale, None)) is not None:
                self._requeue(block_id, now, "its worker came back and asked for work")
        if not self._waiting:
            return None
        suited = (b for b in self._waiting if self._blocks[b].task.task_type in offers)
        block_id = next(suited, self._waiting[0])
        block = self._blocks[block_id]
        lease = self._lease(block_id, block, worker_id, session_id, now)
        self._note(EventKind.ASSIGNED, now, block_id, worker_id)
        return Assigned(block_id, block.task, lease.deadline - now)

    def submit(
        self, worker_id: str, block_id: str, result: TaskResult, digest: str, now: float
    ) -> Verdict:
        """Judge a result.

        Args:
            worker_id: Who sent it.
            block_id: The block it is for.
            result: The result.
            digest: Of its bytes; equal results have equal digests.
            now: The time.
        """
        block = self._blocks.get(block_id)
        if block is None:
            return self._refuse(worker_id, block_id, now, "there is no such block")
        if worker_id not in block.given:
            return self._refuse(worker_id, block_id, now, "this worker was not given that block")
        known = block.answers.get((worker_id, digest))
        if known is not None:
            self._note(EventKind.REPEATED, now, block_id, worker_id)
            return known
        verdict = self._judge(block_id, block, worker_id, result, digest, now)
        block.answers[worker_id, digest] = verdict
        return verdict

    def decline(self, worker_id: str, block_id: str, error: ErrorInfo, now: float) -> Verdict:
        """A worker did not begin a block that it holds."""
        block = self._blocks.get(block_id)
        if block is None or block.lease is None or block.lease.worker_id != worker_id:
            return self._refuse(worker_id, block_id, now, "this worker does not hold that block")
        return self._failed(block_id, block, worker_id, _failure(error), now)

    def handed_back(self, worker_id: str, blocks: Iterable[str], now: float) -> None:
        """A worker leaves these blocks on purpose."""
        for block_id in blocks:
            lease = self._leased.get(block_id)
            if lease is not None and lease.worker_id == worker_id:
                self._requeue(block_id, now, "handed back")

    def disconnected(self, worker_id: str, now: float, *, grace: float | None = None) -> None:
        """A worker is cut off. ``grace`` in place of the rules': 0 when it is given up."""
        grace = self.rules.grace if grace is None else grace
        for block_id in self.held_by(worker_id):
            if grace <= 0:
                self._requeue(block_id, now, "its worker is gone")
            else:
                self._leased[block_id].release_at = now + grace

    def returned(self, worker_id: str) -> None:
        """A worker is back: what it held, it still holds."""
        for block_id in self.held_by(worker_id):
            self._leased[block_id].release_at = None

    def reconcile(
        self,
        worker_id: str,
        session_id: str,
        running: Collection[str],
        unacknowledged: Collection[str],
        now: float,
    ) -> None:
        """A worker that came back says what it holds."""
        for block_id in self.held_by(worker_id):
            if block_id not in running and block_id not in unacknowledged:
                self._requeue(block_id, now, "its worker came back without it")
        for block_id in dict.fromkeys(running):
            block = self._blocks.get(block_id)
            if block is None or worker_id not in block.given:
                self._withdraw(block_id, worker_id, now, "not given to this worker")
            elif block.is_over:
                self._withdraw(block_id, worker_id, now, "no longer wanted")
            elif block.lease is not None and block.lease.worker_id == worker_id:
                block.lease.session_id = session_id
            elif block.lease is None and now < block.given[worker_id]:
                # Nobody else has it yet, and its time is not over.
                deadline = block.given[worker_id]
                self._lease(block_id, block, worker_id, session_id, now).deadline = deadline
                block.given[worker_id] = deadline
                self._note(EventKind.KEPT, now, block_id, worker_id)

    def cancel(self, block_id: str, reason: str, now: float) -> bool:
        """Give a block up because nobody wants it. False when it is over already."""
        block = self._blocks[block_id]
        if block.is_over:
            return False
        self._give_up(block_id, block, ErrorCode.CANCELLED, reason, now)
        return True

    def expire(self, now: float) -> None:
        """Do what is due."""
        due = [b for b, lease in self._leased.items() if self._ends_at(lease) <= now]
        for block_id in due:
            block, lease = self._blocks[block_id], self._leased[block_id]
            if lease.deadline + self.rules.slack > now:
                self._requeue(block_id, now, "its worker did not come back")
                continue
            block.failures += 1
            if block.failures < self.rules.max_failures:
                self._requeue(block_id, now, "no result by the deadline")
            else:
                times = f"no result by the deadline, {block.failures} times"
                self._give_up(block_id, block, ErrorCode.DEADLINE_EXCEEDED, times, now)
        while self._expiring and self._expiring[0][0] <= now:
            _, block_id = heapq.heappop(self._expiring)
            block = self._blocks[block_id]
            if not block.is_over:
                self._give_up(
                    block_id, block, ErrorCode.DEADLINE_EXCEEDED, "its deadline passed", now
                )

    # The moves.

    def _judge(
        self,
        block_id: str,
        block: _Block,
        worker_id: str,
        result: TaskResult,
        digest: str,
        now: float,
    ) -> Verdict:
        if block.state is BlockState.DELIVERED:
            if digest == block.delivered_digest:
                self._note(EventKind.REPEATED, now, block_id, worker_id)
                return Verdict(accepted=True)
            return self._refuse(worker_id, block_id, now, "another result was delivered before")
        if block.state is BlockState.FAILED:
            return self._refuse(worker_id, block_id, now, "the block was given up before")
        if result.success:
            holder = block.lease.worker_id if block.lease is not None else None
            self._close(block_id, block, BlockState.DELIVERED)
            block.delivered_digest = digest
            outcome = Outcome(block_id, True, worker_id, result)
            self._note(EventKind.DELIVERED, now, block_id, worker_id, outcome=outcome)
            if holder is not None and holder != worker_id:
                self._withdraw(block_id, holder, now, "delivered by another worker")
            return Verdict(accepted=True)
        if block.lease is None or block.lease.worker_id != worker_id:
            return self._refuse(worker_id, block_id, now, "the block is no longer this worker's")
        return self._failed(block_id, block, worker_id, result, now)

    def _failed(
        self, block_id: str, block: _Block, worker_id: str, result: TaskResult, now: float
    ) -> Verdict:
        error = result.error
        code = error.code if error is not None else None
        if code not in _HANDED_BACK:
            block.failures += 1
        retry = error is not None and error.retryable and block.failures < self.rules.max_failures
        if retry:
            self._requeue(
                block_id, now, f"failed: {code}", Outcome(block_id, True, worker_id, result)
            )
        else:
            outcome = Outcome(block_id, True, worker_id, result)
            self._close(block_id, block, BlockState.FAILED)
            self._note(EventKind.FAILED, now, block_id, worker_id, str(code), outcome)
        return Verdict(accepted=True)

    def _give_up(
        self, block_id: str, block: _Block, code: ErrorCode, reason: str, now: float
    ) -> None:
        holder = block.lease.worker_id if block.lease is not None else None
        self._close(block_id, block, BlockState.FAILED)
        error = ErrorInfo(code=code, message=reason, retryable=False)
        outcome = Outcome(block_id, False, None, _failure(error))
        self._note(EventKind.FAILED, now, block_id, None, reason, outcome)
        if holder is not None:
            self._withdraw(block_id, holder, now, reason)

    def _lease(
        self, block_id: str, block: _Block, worker_id: str, session_id: str, now: float
    ) -> _Lease:
        self._waiting.remove(block_id)
        seconds = self.rules.lease
        if block.task.deadline_ms is not None:
            seconds = block.task.deadline_ms / 1000.0
        deadline = now + seconds
        if block.expires_at is not None:
            deadline = min(deadline, block.expires_at)
        lease = block.lease = self._leased[block_id] = _Lease(worker_id, session_id, deadline)
        block.state = BlockState.LEASED
        block.assignments += 1
        block.given[worker_id] = deadline
        # A worker that is given a block anew may fail it anew, in the same words.
        for key in [key for key in block.answers if key[0] == worker_id]:
            del block.answers[key]
        return lease

    def _take(self, block_id: str, block: _Block) -> None:
        """End the lease; the block goes to the front, so that old work ends first."""
        block.lease = None
        del self._leased[block_id]
        block.state = BlockState.WAITING
        self._waiting.appendleft(block_id)

    def _requeue(self, block_id: str, now: float, reason: str, last: Outcome | None = None) -> None:
        block = self._blocks[block_id]
        assert block.lease is not None
        worker_id = block.lease.worker_id
        if block.assignments < self.rules.max_assignments:
            self._take(block_id, block)
            self._note(EventKind.REQUEUED, now, block_id, worker_id, reason)
        elif last is not None:
            self._close(block_id, block, BlockState.FAILED)
            self._note(EventKind.FAILED, now, block_id, worker_id, reason, last)
        else:
            times = f"given out {block.assignments} times; the last: {reason}"
            self._give_up(block_id, block, ErrorCode.ENGINE_CRASHED, times, now)

    def _close(self, block_id: str, block: _Block, state: BlockState) -> None:
        if block.state is BlockState.WAITING:
            self._waiting.remove(block_id)
        self._leased.pop(block_id, None)
        block.lease = None
        block.state = state
        self._open -= 1

    def _refuse(self, worker_id: str, block_id: str, now: float, reason: str) -> Verdict:
        self._note(EventKind.REFUSED, now, block_id, worker_id, reason)
        return Verdict(accepted=False, error=reason)

    def _withdraw(self, block_id: str, worker_id: str, now: float, reason: str) -> None:
        self._note(EventKind.WITHDRAWN, now, block_id, worker_id, reason)

    def _ends_at(self, lease: _Lease) -> float:
        end = lease.deadline + self.rules.slack
        return end if lease.release_at is None else min(end, lease.release_at)

    def _note(
        self,
        kind: EventKind,
        now: float,
        block_id: str,
        worker_id: str | None,
        detail: str = "",
        outcome: Outcome | None = None,
    ) -> None:
        data = {} if outcome is None else {"outcome": outcome}
        self._events.append(Event(kind, now, worker_id, block_id, detail, data))


def _failure(error: ErrorInfo) -> TaskResult:
    return TaskResult(success=False, output=None, error=error, metrics=_NO_METRICS)
