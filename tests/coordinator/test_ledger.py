from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ai4all.coordinator.history import Event, EventKind
from ai4all.coordinator.ledger import BlockState, LeaseRules, Ledger
from ai4all.coordinator.tasks import TaskSpec
from ai4all.types.task import (
    BlockMetrics,
    ErrorCode,
    ErrorInfo,
    FinishReason,
    TaskResult,
    TaskType,
    TextCompletionOutput,
    Usage,
)

METRICS = BlockMetrics(queue_time_ms=0.0, execution_time_ms=1.0, total_time_ms=1.0)
OFFERS = (TaskType.TEXT_COMPLETION,)
RULES = LeaseRules(lease=100.0, slack=2.0, grace=10.0, max_failures=3, max_assignments=6)


def success(text: str = "x") -> TaskResult:
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    output = TextCompletionOutput(
        text=text, finish_reason=FinishReason.STOP, usage=usage, generation_time_ms=1
    )
    return TaskResult(success=True, output=output, error=None, metrics=METRICS)


def failure(code: ErrorCode, *, retryable: bool = True) -> TaskResult:
    error = ErrorInfo(code=code, message="", retryable=retryable)
    return TaskResult(success=False, output=None, error=error, metrics=METRICS)


def ledger(count: int = 1, rules: LeaseRules = RULES) -> Ledger:
    book = Ledger(rules)
    for n in range(count):
        book.add(TaskSpec(block_id=f"b{n}", input={}))
    return book


def give(book: Ledger, worker: str, now: float = 0.0, session: str = "s") -> str | None:
    assigned = book.assign(worker, session, now, offers=OFFERS, capacity=10)
    return None if assigned is None else assigned.block_id


def test_a_lease_ends_a_little_after_its_deadline() -> None:
    book = ledger()
    assigned = book.assign("w", "s", 5.0, offers=OFFERS)
    assert assigned is not None
    assert assigned.seconds == 100.0
    assert book.next_deadline() == 107.0
    book.expire(106.9)
    assert book.state("b0") is BlockState.LEASED
    book.expire(107.0)
    assert book.state("b0") is BlockState.WAITING
    assert book.next_deadline() is None


def test_what_waits_again_goes_first() -> None:
    book = ledger(3)
    assert give(book, "w") == "b0"
    book.disconnected("w", 1.0, grace=0.0)
    assert [give(book, "v", 2.0) for _ in range(4)] == ["b0", "b1", "b2", None]


def test_a_late_success_is_accepted_while_nobody_else_has_delivered() -> None:
    book = ledger()
    give(book, "w")
    book.expire(200.0)
    assert book.submit("w", "b0", success(), "d", 201.0).accepted
    assert book.state("b0") is BlockState.DELIVERED
    assert give(book, "v", 202.0) is None


def test_a_late_success_is_refused_after_another() -> None:
    book = ledger()
    give(book, "w")
    book.expire(200.0)
    give(book, "v", 201.0)
    assert book.submit("v", "b0", success("v"), "dv", 202.0).accepted
    assert not book.submit("w", "b0", success("w"), "dw", 203.0).accepted
    assert book.submit("w", "b0", success("v"), "dv", 203.0).accepted, "the very same bytes"


def test_a_late_failure_does_not_take_the_block_from_its_new_holder() -> None:
    book = ledger()
    give(book, "w")
    book.expire(200.0)
    give(book, "v", 201.0)
    late = book.submit("w", "b0", failure(ErrorCode.DEADLINE_EXCEEDED), "d", 202.0)
    assert not late.accepted
    assert book.held_by("v") == ["b0"]


def test_a_failure_that_is_sent_again_counts_once() -> None:
    book = ledger()
    for round_ in range(2):
        give(book, "w", round_)
        for _ in range(3):
            assert book.submit(
                "w", "b0", failure(ErrorCode.ENGINE_CRASHED), f"d{round_}", round_ + 0.5
            ).accepted
    assert book.state("b0") is BlockState.WAITING
    give(book, "w", 5.0)
    book.submit("w", "b0", failure(ErrorCode.ENGINE_CRASHED), "d", 6.0)
    assert book.state("b0") is BlockState.FAILED


def test_an_owner_who_hands_back_is_not_the_blocks_failure() -> None:
    book = ledger()
    for n in range(5):
        give(book, "w", n)
        book.submit("w", "b0", failure(ErrorCode.PREEMPTED), f"d{n}", n + 0.5)
        assert book.state("b0") is BlockState.WAITING
    give(book, "w", 9.0)
    book.submit("w", "b0", failure(ErrorCode.PREEMPTED), "d", 9.5)
    assert book.state("b0") is BlockState.FAILED, "and yet there is an end to it"


def test_a_block_that_takes_its_workers_with_it_is_given_up() -> None:
    book = ledger()
    for n in range(6):
        assert give(book, f"w{n}", n) == "b0"
        book.disconnected(f"w{n}", n + 0.5, grace=0.0)
    assert book.state("b0") is BlockState.FAILED


def test_a_worker_that_returns_in_time_keeps_its_block() -> None:
    book = ledger()
    give(book, "w")
    book.disconnected("w", 1.0)
    assert book.next_deadline() == 11.0
    book.returned("w")
    book.expire(11.0)
    assert book.held_by("w") == ["b0"]
    book.disconnected("w", 20.0)
    book.expire(30.0)
    assert book.held_by("w") == []


def test_a_worker_that_returns_late_gets_its_block_back_if_nobody_has_it() -> None:
    book = ledger(2)
    give(book, "w")
    give(book, "w")
    book.disconnected("w", 1.0)
    book.expire(11.0)
    assert give(book, "v", 12.0) == "b1"
    book.events()
    book.returned("w")
    book.reconcile("w", "s2", ["b0", "b1"], [], 13.0)
    assert book.held_by("w") == ["b0"]
    assert [(e.kind, e.block_id) for e in book.events()] == [(EventKind.KEPT, "b0")]
    assert book.next_deadline() == 102.0, "and no more time than before"
    book.submit("v", "b1", success(), "d", 14.0)
    book.events()
    book.reconcile("w", "s3", ["b0", "b1"], [], 15.0)
    assert [(e.kind, e.block_id) for e in book.events()] == [(EventKind.WITHDRAWN, "b1")]


def test_a_block_that_may_never_have_arrived_is_given_again() -> None:
    book = ledger(2)
    assert give(book, "w", 0.0, "s1") == "b0"
    book.disconnected("w", 1.0)
    book.returned("w")
    assert give(book, "w", 2.0, "s2") == "b1", "something new first"
    assert give(book, "w", 3.0, "s2") == "b0", "and then what it may not have"
    assert give(book, "w", 4.0, "s2") is None, "but not twice in one session"
    assert book.submit("w", "b0", success(), "d", 5.0).accepted


def test_what_an_earlier_run_knew_is_known_again() -> None:
    first = ledger(2)
    give(first, "w")
    first.submit("w", "b0", success(), "d", 1.0)
    (outcome,) = [e.data["outcome"] for e in first.events() if e.kind is EventKind.DELIVERED]

    second = ledger(2)
    second.restore_given("b0", "w", 0.0)
    second.restore_given("b1", "v", 0.0)
    second.restore_given("b1", "w", 0.0)
    second.restore_given("gone", "w", 0.0)
    second.restore_outcome(outcome, "d")
    assert second.unfinished == 1
    assert second.submit("w", "b0", success(), "d", 1.0).accepted
    assert second.held_by("w") == ["b1"]
    assert second.submit("v", "b1", success(), "d", 1.0).accepted, "given to it once"
    assert second.unfinished == 0


def test_a_block_needs_a_name_of_its_own() -> None:
    book = ledger()
    with pytest.raises(ValueError, match="new block_id"):
        book.add(TaskSpec(block_id="b0", input={}))
    with pytest.raises(ValueError, match="new block_id"):
        book.add(TaskSpec(input={}))


WORKERS = st.sampled_from(["u", "v", "w"])
BLOCKS = st.sampled_from([f"b{n}" for n in range(4)])


class LedgerUnderFire(RuleBasedStateMachine):
    """Workers that come, go, repeat themselves and lie, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.book = Ledger(RULES)
        for n in range(4):
            self.book.add(
                TaskSpec(block_id=f"b{n}", input={}), expires_at=400.0 if n == 3 else None
            )
        self.given: set[tuple[str, str]] = set()
        self.accepted: dict[str, str] = {}
        self.history: list[Event] = []
        self.session = 0

    def note(self) -> None:
        self.history += self.book.events()

    @rule(worker=WORKERS)
    def ask(self, worker: str) -> None:
        assigned = self.book.assign(worker, f"s{self.session}", self.now, offers=OFFERS, capacity=2)
        if assigned is not None:
            self.given.add((worker, assigned.block_id))
            assert assigned.seconds <= RULES.lease
        self.note()

    @rule(worker=WORKERS, block=BLOCKS, text=st.sampled_from("xyz"))
    def succeed(self, worker: str, block: str, text: str) -> None:
        verdict = self.book.submit(worker, block, success(text), text, self.now)
        if verdict.accepted:
            assert (worker, block) in self.given, "accepted from one who was never given it"
            assert self.accepted.setdefault(block, text) == text, "two different results"
        self.note()

    @rule(worker=WORKERS, block=BLOCKS, code=st.sampled_from(ErrorCode), retryable=st.booleans())
    def fail(self, worker: str, block: str, code: ErrorCode, retryable: bool) -> None:
        result = failure(code, retryable=retryable)
        self.book.submit(worker, block, result, f"{code}{retryable}", self.now)
        self.note()

    @rule(worker=WORKERS, block=BLOCKS)
    def decline(self, worker: str, block: str) -> None:
        error = ErrorInfo(code=ErrorCode.MODEL_NOT_FOUND, message="", retryable=True)
        self.book.decline(worker, block, error, self.now)
        self.note()

    @rule(worker=WORKERS, grace=st.sampled_from([None, 0.0]))
    def cut(self, worker: str, grace: float | None) -> None:
        self.book.disconnected(worker, self.now, grace=grace)
        self.note()

    @rule(worker=WORKERS, running=st.sets(BLOCKS), unacknowledged=st.sets(BLOCKS))
    def come_back(self, worker: str, running: set[str], unacknowledged: set[str]) -> None:
        self.session += 1
        self.book.returned(worker)
        self.book.reconcile(worker, f"s{self.session}", running, unacknowledged, self.now)
        self.note()

    @rule(seconds=st.sampled_from([0.5, 11.0, 103.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.book.expire(self.now)
        due = self.book.next_deadline()
        assert due is None or due > self.now
        self.note()

    @invariant()
    def every_block_ends_at_most_once(self) -> None:
        ends = Counter(
            event.block_id
            for event in self.history
            if event.kind in (EventKind.DELIVERED, EventKind.FAILED)
        )
        assert all(count == 1 for count in ends.values())
        assert self.book.unfinished == 4 - len(ends)

    @invariant()
    def a_block_has_one_holder_or_waits(self) -> None:
        held = [block for worker in "uvw" for block in self.book.held_by(worker)]
        assert len(held) == len(set(held))
        for n in range(4):
            assert (f"b{n}" in held) == (self.book.state(f"b{n}") is BlockState.LEASED)

    def teardown(self) -> None:
        """One good worker finishes what is left."""
        for worker in "uvw":
            self.book.disconnected(worker, self.now, grace=0.0)
        while (block := give(self.book, "good", self.now, "last")) is not None:
            assert self.book.submit("good", block, success("g"), "g", self.now).accepted
        self.note()
        self.every_block_ends_at_most_once()
        assert self.book.unfinished == 0
        assert self.book.next_deadline() is None or self.book.next_deadline() == 400.0


TestLedgerUnderFire = LedgerUnderFire.TestCase
TestLedgerUnderFire.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
