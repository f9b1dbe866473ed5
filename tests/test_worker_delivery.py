from __future__ import annotations

import asyncio
import functools
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ujson
from scripted_coordinator import Coordinator, assignment, serving, tokens, working
from structlog.testing import capture_logs

from ai4all import worker_delivery
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.delivery.spool import MemorySpool, Spool
from ai4all.errors import EngineCrashed, SpoolError
from ai4all.protocol.session import Session
from ai4all.worker_delivery import Delivery, never_begun
from ai4all.worker_events import BlockAcknowledged


class SmallDisk(MemorySpool):
    """A spool whose disk is full while ``is_full``."""

    def __init__(self, *, is_full: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.is_full = is_full
        self.committed: list[str] = []

    async def commit(
        self, block_id: str, payload: bytes, kept: Callable[[], None] | None = None
    ) -> None:
        self._need_room()
        await super().commit(block_id, payload, kept)
        self.committed.append(block_id)

    async def forget(self, block_id: str) -> None:
        self._need_room()
        await super().forget(block_id)

    def _need_room(self) -> None:
        if self.is_full:
            raise SpoolError("results.sqlite3", "the disk is full")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_delivery, "_RETRY_S", 0.02)


# What an earlier process left.


@pytest.mark.parametrize("extensions", [None, ["reconcile"], ["reconcile", "decline"]])
async def test_a_block_that_was_interrupted_is_handed_back(extensions: list[str] | None) -> None:
    spool = MemorySpool(interrupted=["b-0"])
    coordinator = Coordinator(extensions=extensions)
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        await running.until(lambda: BlockAcknowledged("b-0", True, None) in running.events)
        await running.until(lambda: bool(coordinator.of_type("RequestWork")))
    result = coordinator.results()["b-0"]
    assert (result["success"], result["output"]) == (False, None)
    assert result["error"]["code"] == "engine_crashed"
    assert result["error"]["retryable"] is True
    assert spool.interrupted == ()
    assert spool.pending() == []
    kinds = [frame["type"] for frame in coordinator.frames]
    assert kinds.index("SubmitResult") < kinds.index("RequestWork")
    if extensions is not None:
        (reconcile,) = coordinator.of_type("Reconcile")
        assert (reconcile["running"], reconcile["unacknowledged"]) == ([], ["b-0"])


async def test_it_is_handed_back_until_somebody_has_heard_of_it() -> None:
    spool = MemorySpool(interrupted=["b-0"])
    deaf = Coordinator(acknowledge=False)
    async with serving(deaf), working(deaf, spool=spool) as running:
        await running.until(lambda: "b-0" in deaf.results())
    assert spool.interrupted == ("b-0",)
    coordinator = Coordinator()
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        await running.until(lambda: not spool.interrupted)
    assert coordinator.results()["b-0"]["error"]["code"] == "engine_crashed"


async def test_it_can_be_given_to_us_again_and_computed() -> None:
    spool = MemorySpool(interrupted=["b-1"])
    coordinator = Coordinator(deque([assignment("b-1")]))
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        await running.until(lambda: coordinator.results().get("b-1", {}).get("success", False))
        await running.until(lambda: not spool.pending())
    assert len(coordinator.raw_results()) == 2


async def test_a_result_that_was_kept_is_never_followed_by_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite3"
    async with Spool.open(path) as spool:
        spool.begin("b-1", time.time() + 60)
        spool.begin("b-2", time.time() + 60)
        await spool.commit("b-1", b'{"type":"SubmitResult","block_id":"b-1","result":{}}')
    coordinator = Coordinator()
    async with Spool.open(path) as spool, serving(coordinator), working(coordinator, spool=spool):
        while spool.pending() or spool.interrupted:
            await asyncio.sleep(0.005)
    assert [(f["block_id"], bool(f["result"])) for f in coordinator.of_type("SubmitResult")] == [
        ("b-1", False),
        ("b-2", True),
    ]


@pytest.mark.parametrize(("seconds", "handed_back"), [(-1.0, False), (60.0, True)])
async def test_nobody_waits_for_a_block_after_its_deadline(
    tmp_path: Path, seconds: float, handed_back: bool
) -> None:
    path = tmp_path / "results.sqlite3"
    async with Spool.open(path) as spool:
        spool.begin("b-1", time.time() + seconds)
        spool.begin("b-2")
    with capture_logs() as logs:
        async with Spool.open(path) as spool:
            assert spool.interrupted == (("b-1", "b-2") if handed_back else ("b-2",))
    assert [log["block_id"] for log in logs] == ([] if handed_back else ["b-1"])


async def test_a_file_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite3"
    async with Spool.open(path) as spool:
        await spool.commit("b-1", b"kept")
    with sqlite3.connect(path) as old:
        old.execute("ALTER TABLE results DROP COLUMN days")
        old.execute("DROP TABLE days")
        old.execute("DROP TABLE running")
        old.execute(
            "CREATE TABLE running (block_id TEXT PRIMARY KEY, begun_at REAL NOT NULL) WITHOUT ROWID"
        )
        old.execute("INSERT INTO running VALUES ('b-2', 1.0)")
        old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):
        async with Spool.open(path) as spool:
            assert spool.recovery is None
            assert spool.pending() == [("b-1", b"kept")]
            assert spool.interrupted == (), "nobody knows how long it was waited for"
    async with Spool.open(path) as spool:
        spool.begin("b-3", time.time() + 60)
    async with Spool.open(path) as spool:
        assert spool.interrupted == ("b-3",)


# Handed back at the end.


async def test_what_a_stop_hands_back_is_handed_back_again_unless_somebody_heard_of_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.sqlite3"
    backend = FakeBackend(ScriptedGeneration(hang_at=1))
    deaf = Coordinator(deque([assignment("b-1")]), acknowledge=False)
    async with (
        Spool.open(path) as spool,
        serving(deaf),
        working(deaf, backend, spool, stop_grace=0.0) as running,
    ):
        await running.until(lambda: bool(backend.calls.generations))
        running.worker.stop()
        await running.until(lambda: "b-1" in deaf.results())
    assert deaf.results()["b-1"]["error"]["code"] == "shutting_down"
    coordinator = Coordinator()
    async with Spool.open(path) as spool, serving(coordinator), working(coordinator, spool=spool):
        while spool.interrupted:
            await asyncio.sleep(0.005)
    assert coordinator.results()["b-1"]["error"]["code"] == "engine_crashed"
    async with Spool.open(path) as spool:
        assert spool.interrupted == ()


# A disk that is full.


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("acknowledge", [True, False])
async def test_what_could_not_be_kept_is_kept_when_there_is_room(acknowledge: bool) -> None:
    spool = SmallDisk()
    coordinator = Coordinator(
        deque([assignment("b-1"), assignment("b-2")]), acknowledge=acknowledge, heartbeat_ms=100
    )
    with capture_logs() as logs:
        async with serving(coordinator), working(coordinator, spool=spool) as running:
            await running.until(lambda: "b-1" in coordinator.results())
            await running.until(lambda: len(coordinator.of_type("Heartbeat")) >= 3)
            assert "b-2" not in coordinator.results(), "no new work meanwhile"
            spool.is_full = False
            await running.until(lambda: "b-1" in spool.committed)
            await running.until(lambda: "b-2" in coordinator.results())
            status = coordinator.of_type("Heartbeat")[1]["status"]
            assert "the disk is full" in status["Error"]["message"]
            kept = [block_id for block_id, _ in spool.pending()]
            await running.until(lambda: not acknowledge or not spool.pending())
    assert acknowledge or kept == ["b-1", "b-2"]
    events = [log["event"] for log in logs]
    assert events.count("result_not_kept") == 1
    assert "results_kept_again" in events
    raw = coordinator.raw_results()[0].encode()
    assert acknowledge or dict(spool.pending())["b-1"] == raw, "the bytes that were sent"


@pytest.mark.usefixtures("soon")
async def test_a_block_that_arrives_meanwhile_is_refused_with_the_reason() -> None:
    spool = SmallDisk()
    coordinator = Coordinator(deque([assignment("b-1")]))
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        await running.until(lambda: BlockAcknowledged("b-1", True, None) in running.events)
        await coordinator.say(**assignment("pushed"))
        await running.until(lambda: "pushed" in coordinator.results())
        error = coordinator.results()["pushed"]["error"]
        assert (error["code"], error["retryable"]) == ("preempted", True)
        assert "the disk is full" in error["message"]
        await running.until(lambda: BlockAcknowledged("pushed", True, None) in running.events)
        spool.is_full = False
        await running.until(lambda: running.worker._delivery.problem is None)
        await coordinator.say(**assignment("pushed"))
        await running.until(lambda: coordinator.results()["pushed"]["success"])


@pytest.mark.usefixtures("soon")
async def test_one_that_could_not_be_kept_while_others_were_is_kept_as_well() -> None:
    spool = SmallDisk()
    coordinator = Coordinator(deque([assignment("b-1")]), acknowledge=False)
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        delivery = running.worker._delivery
        await running.until(lambda: delivery.problem is not None)
        commit, began, go_on = SmallDisk.commit, asyncio.Event(), asyncio.Event()

        async def slow(*arguments: Any) -> None:
            began.set()
            await go_on.wait()
            await commit(spool, *arguments)

        spool.commit = slow  # type: ignore[method-assign]
        spool.is_full = False
        await began.wait()
        # Now, in the middle of keeping the first, there is no room for a second.
        spool.commit = functools.partial(commit, spool)  # type: ignore[method-assign]
        spool.is_full = True
        await delivery.submit("b-2", never_begun(EngineCrashed("gone")))
        spool.is_full = False
        go_on.set()
        await running.until(lambda: spool.committed == ["b-1", "b-2"])
        await running.until(lambda: delivery.problem is None)


async def test_a_result_that_was_never_kept_and_never_acknowledged_is_said_to_be_lost() -> None:
    coordinator = Coordinator(deque([assignment("b-1")]), acknowledge=False)
    with capture_logs() as logs:
        async with serving(coordinator), working(coordinator, spool=SmallDisk()) as running:
            await running.until(lambda: "b-1" in coordinator.results())
    assert [log["block_id"] for log in logs if log["event"] == "result_lost"] == ["b-1"]


async def test_the_end_is_a_last_chance_to_keep_it() -> None:
    spool = SmallDisk()
    coordinator = Coordinator(deque([assignment("b-1")]), acknowledge=False)
    with capture_logs() as logs:
        async with serving(coordinator), working(coordinator, spool=spool) as running:
            await running.until(lambda: "b-1" in coordinator.results())
            spool.is_full = False
    assert [block_id for block_id, _ in spool.pending()] == ["b-1"]
    assert "result_lost" not in [log["event"] for log in logs]


@pytest.mark.usefixtures("soon")
async def test_room_that_acknowledgements_make_is_used_at_once() -> None:
    spool = MemorySpool(max_bytes=1500)
    coordinator = Coordinator(deque([assignment(f"b-{n}") for n in range(4)]), acknowledge=False)
    async with serving(coordinator), working(coordinator, spool=spool) as running:
        await running.until(lambda: running.worker._delivery.problem is not None)
        assert "limit of 1500" in str(running.worker._delivery.problem)
        # It goes to the coordinator: where the spool lies is no business of others.
        assert "(memory)" not in str(running.worker._delivery.problem)
        n_sent = len(coordinator.results())
        for block_id, _ in spool.pending():
            await coordinator.say(type="ResultAck", block_id=block_id, accepted=True, error=None)
        await running.until(lambda: len(coordinator.results()) > n_sent)


@pytest.mark.usefixtures("soon")
async def test_a_failure_that_could_not_be_forgotten_does_not_answer_for_the_next_attempt() -> None:
    class Stuck(MemorySpool):
        is_stuck = True

        async def forget(self, block_id: str) -> None:
            if self.is_stuck:
                raise SpoolError("results.sqlite3", "the disk is full")
            await super().forget(block_id)

    spool = Stuck()
    scripts = [ScriptedGeneration(error=EngineCrashed("gone")), tokens(" better")]
    coordinator = Coordinator(deque([assignment("b-1")]))
    async with serving(coordinator), working(coordinator, FakeBackend(scripts), spool) as running:
        await running.until(lambda: running.worker._delivery.problem is not None)
        assert spool.has("b-1")
        spool.is_stuck = False
        await running.until(lambda: running.worker._delivery.problem is None)
        await coordinator.say(**assignment("b-1"))
        await running.until(lambda: coordinator.results()["b-1"]["success"])
    assert [ujson.loads(raw)["result"]["success"] for raw in coordinator.raw_results()] == [
        False,
        True,
    ]


@pytest.mark.usefixtures("soon")
async def test_a_late_deletion_does_not_take_the_next_result_of_its_block_along() -> None:
    class Slow(MemorySpool):
        is_stuck = True
        held = asyncio.Event()
        go_on = asyncio.Event()

        async def forget(self, block_id: str) -> None:
            if self.is_stuck:
                raise SpoolError("results.sqlite3", "the disk is full")
            if block_id == "b-1":
                self.held.set()
                await self.go_on.wait()
            await super().forget(block_id)

    session = SimpleNamespace(
        result_frame=lambda block_id, result: "the next",
        send_result=lambda block_id, frame: None,
        unacknowledged=(),
    )
    spool, ended = Slow(), asyncio.Event()
    delivery = Delivery(
        spool, cast(Session, session), 1 << 20, sent=lambda: None, recovered=ended.set
    )
    for block_id in ("b-1", "b-2"):
        await spool.commit(block_id, b"the first")
        delivery.acknowledged(block_id)
    while len(delivery._unforgotten) < 2:
        await asyncio.sleep(0.001)
    spool.is_stuck = False
    await spool.held.wait()
    # Block 2 was given again, and is done before the deletion of its first result has its turn.
    await delivery.submit("b-2", never_begun(EngineCrashed("gone")))
    spool.go_on.set()
    await ended.wait()
    assert spool.pending() == [("b-2", b"the next")]
    await delivery.close()


async def test_a_block_that_comes_again_before_its_result_is_forgotten_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_delivery, "_FORGET_AFTER_S", 3600.0)
    coordinator = Coordinator(deque([assignment("b-1"), assignment("b-1")]))
    path = tmp_path / "results.sqlite3"
    async with (
        Spool.open(path) as spool,
        serving(coordinator),
        working(coordinator, spool=spool) as running,
    ):
        acknowledged = BlockAcknowledged("b-1", True, None)
        await running.until(lambda: running.events.count(acknowledged) == 2)
    first, second = (ujson.loads(frame)["id"] for frame in coordinator.raw_results())
    assert first != second
    # What was still to be forgotten is, at the latest, when the worker ends.
    async with Spool.open(path) as spool:
        assert spool.pending() == []
