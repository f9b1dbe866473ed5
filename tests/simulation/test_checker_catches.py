"""The simulation can fail: workers that are broken on purpose, and what is said of them.

Each is a mistake that somebody could make in the product. It must be found within a few seeds.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ujson
from simulation.run import simulate

from ai4all.blocks import Block, Slots
from ai4all.coordinator.ledger import BlockState, Ledger
from ai4all.delivery import results_file
from ai4all.delivery.backoff import Attempts
from ai4all.delivery.spool import ResultConflict, Spool
from ai4all.errors import Cancelled, ComputeError
from ai4all.protocol.messages import NoWork, ResultAck, ServerMessage
from ai4all.protocol.session import Session
from ai4all.suspend import SuspendWatch
from ai4all.types.task import ErrorInfo, TaskResult
from ai4all.worker import Worker
from ai4all.worker_delivery import Delivery

Patch = pytest.MonkeyPatch

MOST_SEEDS = 30


def forgets_before_the_acknowledgement(patch: Patch) -> None:
    submit = Delivery.submit

    async def broken(self: Delivery, block_id: str, result: TaskResult) -> None:
        await submit(self, block_id, result)
        await self._spool.forget(block_id)

    patch.setattr(Delivery, "submit", broken)


def does_not_wait_until_it_is_kept(patch: Patch) -> None:
    async def broken(self: Delivery, block_id: str, result: TaskResult) -> None:
        frame = self._session.result_frame(block_id, result)
        committing = asyncio.ensure_future(self._spool.commit(block_id, frame.encode()))
        self._forgetting.add(committing)
        committing.add_done_callback(self._forgetting.discard)
        self._send(block_id, frame)

    patch.setattr(Delivery, "submit", broken)


def sends_other_bytes_the_second_time(patch: Patch) -> None:
    receive = Session._receive_registered

    def broken(self: Session, message: Any, now: float) -> None:
        for block_id, frame in self._unacknowledged.items():
            again = ujson.loads(frame) | {"id": "another"}
            self._unacknowledged[block_id] = ujson.dumps(again, escape_forward_slashes=False)
        receive(self, message, now)

    patch.setattr(Session, "_receive_registered", broken)


def does_not_heed_acknowledgements(patch: Patch) -> None:
    receive = Session._receive_message

    def broken(self: Session, message: ServerMessage, now: float) -> None:
        if not isinstance(message, ResultAck):
            receive(self, message, now)

    patch.setattr(Session, "_receive_message", broken)


def does_not_take_over_what_was_kept(patch: Patch) -> None:
    patch.setattr(Delivery, "take_over", lambda self: None)


def does_not_send_again_after_a_reconnect(patch: Patch) -> None:
    receive = Session._receive_registered

    def broken(self: Session, message: Any, now: float) -> None:
        kept, self._unacknowledged = self._unacknowledged, {}
        receive(self, message, now)
        self._unacknowledged = kept

    patch.setattr(Session, "_receive_registered", broken)


def computes_a_block_twice_and_sends_both(patch: Patch) -> None:
    receive, commit = Session._receive_block, Spool.commit

    def twice(self: Session, block_id: str, event: Any, now: float) -> None:
        self._running.pop(block_id, None)
        receive(self, block_id, event, now)

    async def lenient(self: Spool, block_id: str, payload: bytes, kept: Callable[[], None]) -> None:
        try:
            await commit(self, block_id, payload, kept)
        except ResultConflict:
            kept()

    patch.setattr(Session, "_receive_block", twice)
    patch.setattr(Spool, "commit", lenient)


def does_not_sync(patch: Patch) -> None:
    prepare = results_file._prepare

    def broken(connection: sqlite3.Connection, path: Path) -> None:
        prepare(connection, path)
        connection.execute("PRAGMA synchronous = NORMAL")

    patch.setattr(results_file, "_prepare", broken)


def drops_results_by_the_clock(patch: Patch) -> None:
    def broken(connection: sqlite3.Connection, now: float, keep_days: float) -> set[str]:
        oldest = now - keep_days * 86_400
        old = connection.execute("SELECT block_id FROM results WHERE committed_at < ?", (oldest,))
        dropped = {block_id for (block_id,) in old.fetchall()}
        connection.execute("DELETE FROM results WHERE committed_at < ?", (oldest,))
        return dropped

    patch.setattr("ai4all.delivery.spool.drop_old", broken)


def declines_and_answers_too(patch: Patch) -> None:
    decline = Session.send_decline

    def broken(self: Session, block_id: str, error: ErrorInfo) -> bool:
        decline(self, block_id, error)
        self._running[block_id] = None
        return False

    patch.setattr(Session, "send_decline", broken)


def answers_for_another_block(patch: Patch) -> None:
    frame_of = Session.result_frame

    def broken(self: Session, block_id: str, result: TaskResult) -> str:
        return frame_of(self, block_id[:-1] + "0", result)

    patch.setattr(Session, "result_frame", broken)


def is_silent_while_it_works(patch: Patch) -> None:
    beat = Worker._on_heartbeat_due

    def broken(self: Worker) -> None:
        if not self._blocks:
            beat(self)

    patch.setattr(Worker, "_on_heartbeat_due", broken)


def connects_without_patience(patch: Patch) -> None:
    patch.setattr(Attempts, "lost", lambda self, now, floor=0.0: 0.0)


def asks_for_work_without_end(patch: Patch) -> None:
    ask = Session.send_request_work

    def broken(self: Session, now: float) -> None:
        ask(self, now)
        self._answer_due = now

    patch.setattr(Session, "send_request_work", broken)


def does_not_come_to_an_end(patch: Patch) -> None:
    async def broken(self: Worker, work: Any, limit: float, interrupt: Any = None) -> None:
        await work

    patch.setattr(Worker, "_until", broken)


def dies_of_a_bad_frame(patch: Patch) -> None:
    def broken(self: Session, kind: str) -> None:
        raise ValueError(kind)

    patch.setattr(Session, "_report_unknown", broken)


def loses_a_task(patch: Patch) -> None:
    async def broken(self: Spool, block_id: str) -> None:
        raise RuntimeError("a bug")

    patch.setattr(Spool, "forget", broken)


def never_asks_again_after_no_work(patch: Patch) -> None:
    receive = Session._receive_message

    def broken(self: Session, message: ServerMessage, now: float) -> None:
        receive(self, message, now)
        if isinstance(message, NoWork):
            self._retry_at = now + 1e9

    patch.setattr(Session, "_receive_message", broken)


def is_silent_about_what_it_left_running(patch: Patch) -> None:
    patch.setattr(Delivery, "_interrupted", lambda self: [])


def hands_back_what_it_finished(patch: Patch) -> None:
    # A commit that leaves the note that the block runs, and nobody who looks at the results.
    patch.setattr("ai4all.delivery.spool.DELETE_RUNNING", "DELETE FROM running WHERE 0 AND ?")
    patch.setattr(Delivery, "_interrupted", lambda self: list(self._spool.interrupted))


def keeps_a_line_over_a_sleep(patch: Patch) -> None:
    patch.setattr(SuspendWatch, "look", lambda self: None)


def lets_a_block_fall_when_it_is_cancelled(patch: Patch) -> None:
    stop = Block.stop

    def broken(self: Block, why: ComputeError) -> None:
        if isinstance(why, Cancelled) and self.task is not None:
            self.task.cancel()
        else:
            stop(self, why)

    patch.setattr(Block, "stop", broken)


def does_not_survive_a_reload(patch: Patch) -> None:
    def broken(self: Slots, count: int) -> None:
        self._count = 0

    patch.setattr(Slots, "resize", broken)


# Mistakes of a coordinator.


def a_ledger_that_accepts_a_second_result(patch: Patch) -> None:
    judge = Ledger._judge

    def broken(self: Ledger, block_id: str, block: Any, *rest: Any) -> Any:
        if block.state is BlockState.DELIVERED and rest[1].success:
            block.state = BlockState.LEASED
            self._open += 1
        return judge(self, block_id, block, *rest)

    patch.setattr(Ledger, "_judge", broken)


def a_ledger_that_gives_out_what_is_over(patch: Patch) -> None:
    close = Ledger._close

    def broken(self: Ledger, block_id: str, block: Any, state: BlockState) -> None:
        close(self, block_id, block, state)
        self._waiting.append(block_id)

    patch.setattr(Ledger, "_close", broken)


def a_ledger_that_loses_what_was_handed_back(patch: Patch) -> None:
    requeue = Ledger._requeue

    def broken(self: Ledger, block_id: str, *rest: Any) -> None:
        requeue(self, block_id, *rest)
        if block_id in self._waiting:
            self._waiting.remove(block_id)
            self._blocks[block_id].state = BlockState.LEASED

    patch.setattr(Ledger, "_requeue", broken)


@pytest.mark.parametrize(
    ("broken", "says", "faults"),
    [
        (forgets_before_the_acknowledgement, "before it was acknowledged", ()),
        (does_not_wait_until_it_is_kept, "before it kept it", ()),
        (sends_other_bytes_the_second_time, "keeps one result of .* and sent another", ()),
        (does_not_heed_acknowledgements, "not done|still keeps", ()),
        (does_not_take_over_what_was_kept, "still keeps", ("kill", "unplug", "lose_acks")),
        (does_not_send_again_after_a_reconnect, "not done|still keeps", ("cut", "lose_acks")),
        (computes_a_block_twice_and_sends_both, "and sent another", ("give_again",)),
        (does_not_sync, "lost a committed result", ("unplug", "stick")),
        (drops_results_by_the_clock, "lost a committed result", ("set_clock", "kill", "lose_acks")),
        (declines_and_answers_too, "declined .* and then sent it", ()),
        (answers_for_another_block, "was never given", ()),
        (is_silent_while_it_works, "a heartbeat came", ("trouble",)),
        (connects_without_patience, "times within a minute", ("restart_whole", "slam")),
        (asks_for_work_without_end, "does not stop computing", ()),
        (does_not_come_to_an_end, "stop|not done", ("stop", "trouble", "lose_acks")),
        (dies_of_a_bad_frame, "ended by itself", ("babble", "trouble")),
        (loses_a_task, "nobody caught", ()),
        (never_asks_again_after_no_work, "not done", ()),
        (
            is_silent_about_what_it_left_running,
            "keeps quiet",
            ("unplug", "kill", "trouble", "slow"),
        ),
        (hands_back_what_it_finished, "that it finished", ("kill", "lose_acks")),
        (keeps_a_line_over_a_sleep, "though the machine slept", ("suspend",)),
        (lets_a_block_fall_when_it_is_cancelled, "not done|is still with", ("cancel", "slow")),
        (does_not_survive_a_reload, "not done", ("reload", "kill")),
        (a_ledger_that_accepts_a_second_result, "ended as delivered before", ("restart_empty",)),
        (a_ledger_that_gives_out_what_is_over, "was given out after its end", ()),
        (a_ledger_that_loses_what_was_handed_back, "not done", ()),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_it_is_found(
    broken: Callable[[Patch], None],
    says: str,
    faults: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    found: list[str] = []
    for seed in range(MOST_SEEDS):
        found += simulate(seed, 80, only=faults, done_within=300.0).faults
        if any(re.search(says, fault) for fault in found):
            return
    pytest.fail(f"in {MOST_SEEDS} seeds only: {found}")


def test_the_worker_as_it_is_passes_the_same_seeds() -> None:
    for seed in range(5):
        assert simulate(seed, 80, done_within=300.0).faults == []
