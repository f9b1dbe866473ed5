from __future__ import annotations

import asyncio
import errno
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ujson
from watching import Watch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from wire_worker import CAPABILITIES, WireWorker, failure, success

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.errors import ConfigError
from ai4all.types.task import TaskType


def tasks(count: int = 1, **fields: Any) -> list[TaskSpec]:
    return [
        TaskSpec(block_id=f"b-{n}", input={"prompt": f"prompt {n}"}, **fields)
        for n in range(1, count + 1)
    ]


def kinds(coordinator: EmbeddedCoordinator, block_id: str) -> list[str]:
    return [str(event.kind) for event in coordinator.history if event.block_id == block_id]


def is_requeued(event: Event) -> bool:
    return event.kind is EventKind.REQUEUED


async def test_a_block_goes_out_and_its_result_comes_back() -> None:
    seen = []
    async with EmbeddedCoordinator(tasks(), seen.append) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            registered = await worker.register()
            assert registered["heartbeat_interval_ms"] == 10_000
            assert registered["extensions"] == []
            assignment = await worker.ask()
            assert assignment["block_id"] == "b-1"
            assert assignment["task_type"] == "TEXT_COMPLETION"
            assert assignment["input"] == {"prompt": "prompt 1"}
            assert assignment["model_id"] == "benchmark"
            ack = await worker.submit("b-1", success("hello"))
            assert (ack["accepted"], ack["error"]) == (True, None)
            assert ack["version"] == {"major": 1, "minor": 0, "patch": 0}
            assert (await worker.ask("NoWork"))["retry_after_ms"] == 1000
        await coordinator.finished()
    assert [(o.block_id, o.accepted, o.worker_id) for o in seen] == [("b-1", True, "w-1")]
    assert seen[0].result.output.text == "hello"
    assert kinds(coordinator, "b-1") == ["assigned", "delivered"]


async def test_without_tasks_it_is_finished_at_once() -> None:
    async with EmbeddedCoordinator([]) as coordinator:
        await coordinator.finished()


async def test_the_same_result_again_is_acknowledged_again_and_recorded_once() -> None:
    seen = []
    async with (
        EmbeddedCoordinator(tasks(), seen.append) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask()
        for _ in range(3):
            assert (await worker.submit("b-1", success()))["accepted"] is True
        other = await worker.submit("b-1", success("something else"))
        assert other["accepted"] is False
        assert "another result" in other["error"]
    assert len(seen) == 1
    assert kinds(coordinator, "b-1") == [
        "assigned",
        "delivered",
        "repeated",
        "repeated",
        "refused",
    ]


async def test_a_result_for_a_block_that_was_never_given_is_refused() -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        for block_id in ("b-1", "no-such-block"):
            assert (await worker.submit(block_id, success()))["accepted"] is False
        assert coordinator.unfinished == 1


async def test_the_deadline_is_the_earlier_of_the_tasks_two() -> None:
    now = datetime.now(UTC)
    specs = [
        TaskSpec(block_id="lease", input={}, deadline_ms=5_000),
        TaskSpec(
            block_id="end", input={}, deadline_ms=500_000, deadline=now + timedelta(seconds=9)
        ),
        TaskSpec(block_id="default", input={}),
    ]
    rules = LeaseRules(lease=60.0)
    async with (
        EmbeddedCoordinator(specs, rules=rules) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        for seconds in (5, 9, 60):
            deadline = datetime.fromisoformat((await worker.ask())["deadline"])
            assert abs((deadline - now).total_seconds() - seconds) < 1


async def test_a_block_without_a_result_is_given_out_again_and_at_last_given_up() -> None:
    rules = LeaseRules(slack=0.0, max_failures=2)
    watch = Watch[Event]()
    async with (
        EmbeddedCoordinator(tasks(deadline_ms=30), rules=rules, on_event=watch) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask()
        await watch.until(is_requeued)
        await worker.ask()
        await coordinator.finished()
        assert kinds(coordinator, "b-1") == [
            "assigned",
            "requeued",
            "assigned",
            "failed",
            "withdrawn",
        ]
        outcome = coordinator.outcomes["b-1"]
        assert not outcome.accepted
        assert outcome.result.error is not None
        assert outcome.result.error.code == "deadline_exceeded"
        assert (await worker.submit("b-1", success()))["accepted"] is False


async def test_a_task_that_nobody_wants_any_more_fails_without_a_worker() -> None:
    specs = tasks(deadline=datetime.now(UTC) + timedelta(milliseconds=30))
    async with EmbeddedCoordinator(specs) as coordinator:
        await coordinator.finished()
        assert not coordinator.outcomes["b-1"].accepted


async def test_a_failure_that_can_be_retried_is_retried() -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        for _ in range(2):
            await worker.ask()
            failed = await worker.submit("b-1", failure("engine_crashed", retryable=True))
            assert failed["accepted"] is True
        await worker.ask()
        await worker.submit("b-1", success())
        await coordinator.finished()
        assert coordinator.outcomes["b-1"].result.success


async def test_a_failure_that_cannot_be_retried_ends_the_block() -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask()
        await worker.submit("b-1", failure("context_overflow", retryable=False))
        await coordinator.finished()
        outcome = coordinator.outcomes["b-1"]
        assert (outcome.accepted, outcome.result.success) == (True, False)


async def test_a_silent_worker_is_dropped_and_its_block_goes_to_another() -> None:
    async with (
        EmbeddedCoordinator(tasks(), heartbeat_interval_ms=50) as coordinator,
        WireWorker(coordinator.url, "silent") as silent,
    ):
        await silent.register()
        await silent.ask()
        with pytest.raises(ConnectionClosed):
            await silent.hear()
        async with WireWorker(coordinator.url, "other") as other:
            await other.register()
            assert (await other.ask())["block_id"] == "b-1"


async def test_heartbeats_keep_a_worker_and_are_kept() -> None:
    async with (
        EmbeddedCoordinator(tasks(), heartbeat_interval_ms=60) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask()
        for _ in range(15):
            await worker.beat({"Working": {"block_id": "b-1", "progress": 0.5}})
            await asyncio.sleep(0.02)
        assert (await worker.submit("b-1", success()))["accepted"] is True
        link = coordinator.links["w-1"]
        assert link.heartbeats == 15
        assert link.status.Working.progress == 0.5  # type: ignore[union-attr]


async def test_a_worker_that_is_cut_off_keeps_its_block_for_a_while() -> None:
    rules = LeaseRules(grace=30.0)
    async with EmbeddedCoordinator(tasks(), rules=rules) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            await worker.ask()
        async with WireWorker(coordinator.url, "other") as other:
            await other.register()
            await other.ask("NoWork")
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            assert (await worker.submit("b-1", success()))["accepted"] is True
    assert kinds(coordinator, "b-1") == ["assigned", "delivered"]


async def test_a_worker_that_does_not_come_back_loses_its_block() -> None:
    rules = LeaseRules(grace=0.05)
    watch = Watch[Event]()
    async with EmbeddedCoordinator(tasks(), rules=rules, on_event=watch) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            await worker.ask()
        async with WireWorker(coordinator.url, "other") as other:
            await other.register()
            await watch.until(is_requeued)
            await other.ask()
            await other.submit("b-1", success())
    assert kinds(coordinator, "b-1") == ["assigned", "requeued", "assigned", "delivered"]


async def test_a_worker_that_asks_anew_after_a_reconnect_has_lost_its_block() -> None:
    async with EmbeddedCoordinator(tasks()) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            await worker.ask()
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            assert (await worker.ask())["block_id"] == "b-1"


async def test_reconcile_settles_who_holds_what() -> None:
    async with EmbeddedCoordinator(tasks(3)) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register(["reconcile"], max_concurrent_tasks=3)
            for _ in range(3):
                await worker.ask()
        async with WireWorker(coordinator.url) as worker:
            await worker.register(["reconcile", "cancel"], max_concurrent_tasks=3)
            await worker.say("Reconcile", running=["b-1", "strange"], unacknowledged=["b-2"])
            cancel = await worker.hear("Cancel")
            assert cancel["block_id"] == "strange"
            assert (await worker.ask())["block_id"] == "b-3", "which it no longer had"
            for n in (1, 2, 3):
                assert (await worker.submit(f"b-{n}", success()))["accepted"] is True
        assert kinds(coordinator, "b-1") == ["assigned", "delivered"]


async def test_who_computes_in_vain_is_told() -> None:
    rules = LeaseRules(grace=0.01)
    watch = Watch[Event]()
    async with EmbeddedCoordinator(tasks(), rules=rules, on_event=watch) as coordinator:
        async with WireWorker(coordinator.url, "first") as first:
            await first.register()
            await first.ask()
        await watch.until(is_requeued)
        async with (
            WireWorker(coordinator.url, "second") as second,
            WireWorker(coordinator.url, "first") as first,
        ):
            await second.register(["cancel"])
            await second.ask()
            await first.register()
            late = await first.submit("b-1", success("late, but done"))
            assert late["accepted"] is True
            assert (await second.hear("Cancel"))["block_id"] == "b-1"
            assert (await second.submit("b-1", success("too late")))["accepted"] is False


async def test_cancel_and_drain_reach_those_who_understand() -> None:
    async with (
        EmbeddedCoordinator(tasks(2)) as coordinator,
        WireWorker(coordinator.url) as worker,
        WireWorker(coordinator.url, "plain") as plain,
    ):
        await worker.register(["cancel", "drain"])
        await plain.register()
        await worker.ask()
        await plain.ask()
        assert coordinator.cancel("b-1", "requester left")
        assert not coordinator.cancel("b-1", "requester left")
        assert (await worker.hear("Cancel"))["reason"] == "requester left"
        coordinator.drain("maintenance")
        assert (await worker.hear("Drain"))["reason"] == "maintenance"
        assert (await plain.submit("b-2", success()))["type"] == "ResultAck"


async def test_decline_and_goodbye_hand_blocks_back() -> None:
    async with EmbeddedCoordinator(tasks(2)) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register(["decline", "goodbye"], max_concurrent_tasks=2)
            await worker.ask()
            await worker.ask()
            error = failure("model_not_found", retryable=False)["error"]
            await worker.say("Decline", block_id="b-1", error=error)
            await worker.say("Goodbye", reason="shutdown", abandoned=["b-2"])
        async with WireWorker(coordinator.url, "other") as other:
            await other.register()
            assert (await other.ask())["block_id"] == "b-2"
        assert kinds(coordinator, "b-1") == ["assigned", "failed"]


async def test_a_newer_connection_takes_over() -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as older,
    ):
        await older.register()
        await older.ask()
        async with WireWorker(coordinator.url) as newer:
            await newer.register()
            with pytest.raises(ConnectionClosed) as caught:
                await older.hear()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 4001
            assert (await newer.submit("b-1", success()))["accepted"] is True


async def test_a_suitable_block_is_preferred_to_the_first() -> None:
    specs = [
        TaskSpec(block_id="crawl", task_type=TaskType.WEB_CRAWL, input={}),
        TaskSpec(block_id="text", input={"prompt": "x"}),
    ]
    async with (
        EmbeddedCoordinator(specs) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        assert (await worker.ask())["block_id"] == "text"
        assert (await worker.ask())["block_id"] == "crawl", "so that somebody can say why not"


async def test_tasks_can_be_added() -> None:
    async with (
        EmbeddedCoordinator([]) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask("NoWork")
        block_id = coordinator.add(TaskSpec(input={"prompt": "late"}))
        assert (await worker.ask())["block_id"] == block_id
        assert coordinator.unfinished == 1
        with pytest.raises(ValueError, match="new block_id"):
            coordinator.add(TaskSpec(block_id=block_id, input={}))


@pytest.mark.parametrize(
    "frame",
    [
        "not json",
        "[]",
        "{}",
        '{"type": "Nonsense"}',
        '{"type": "RequestWork"}',
        '{"type": "RequestWork", "worker_id": "somebody-else"}',
        '{"type": "Decline", "worker_id": "w-1", "block_id": "b", "error": '
        '{"code": "bad_request", "message": "", "retryable": false}}',
        '{"type": "RequestWork", "worker_id": "w-1", "x": ' + "[" * 100 + "]" * 100 + "}",
        '{"type": "RequestWork", "worker_id": "w-1", "version": '
        '{"major": 2, "minor": 0, "patch": 0}}',
        b"\x00\x01",
    ],
)
async def test_a_bad_frame_costs_that_frame_and_is_recorded(frame: str | bytes) -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.socket.send(frame)
        await worker.hear("Error")
        assert (await worker.ask())["block_id"] == "b-1"
        assert len(coordinator.violations()) == 1


async def test_too_many_bad_frames_end_the_connection() -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        for _ in range(16):
            await worker.socket.send("{}")
            await worker.hear("Error")
        with pytest.raises(ConnectionClosed) as caught:
            await worker.hear()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008


async def test_an_oversized_frame_ends_the_connection_and_is_recorded() -> None:
    async with EmbeddedCoordinator(tasks(), max_message_bytes=4096) as coordinator:
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            await worker.socket.send("x" * 5000)
            with pytest.raises(ConnectionClosed) as caught:
                await worker.hear()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1009
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
            assert (await worker.ask())["block_id"] == "b-1"
        assert len(coordinator.violations()) == 1


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ('{"type": "RequestWork", "worker_id": "w-1"}', "not_registered"),
        ('{"type": "Register"}', "bad_frame"),
        (
            '{"type": "Register", "version": {"major": 9, "minor": 0, "patch": 0}}',
            "version_mismatch",
        ),
    ],
)
async def test_the_first_message_must_be_a_registration(frame: str, code: str) -> None:
    async with (
        EmbeddedCoordinator(tasks()) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.socket.send(frame)
        assert (await worker.hear("Error"))["code"] == code
        with pytest.raises(ConnectionClosed):
            await worker.hear()


async def test_a_token_is_asked_for_in_the_handshake() -> None:
    async with EmbeddedCoordinator(tasks(), token="s3cret") as coordinator:
        for token in (None, "", "wrong", "s3cret2"):
            with pytest.raises(InvalidStatus) as caught:
                await WireWorker(coordinator.url, token=token).__aenter__()
            assert caught.value.response.status_code == 401
        async with WireWorker(coordinator.url, token="s3cret") as worker:
            await worker.register()


async def test_a_page_in_a_browser_is_turned_away() -> None:
    async with EmbeddedCoordinator(tasks()) as coordinator:
        with pytest.raises(InvalidStatus) as caught:
            await connect(coordinator.url, origin="http://evil.example", proxy=None)  # type: ignore[arg-type]
        assert caught.value.response.status_code == 403


async def test_a_strict_seed_coordinator_speaks_the_first_protocol_to_the_letter() -> None:
    async with (
        EmbeddedCoordinator(tasks(2), strict_seed=True) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        registered = await worker.register(["cancel", "decline"])
        assert set(registered) == {"type", "session_id", "heartbeat_interval_ms"}
        assignment = await worker.ask()
        assert set(assignment) == {
            "type",
            "block_id",
            "task_type",
            "input",
            "deadline",
            "model_id",
        }
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", assignment["deadline"])
        ack = await worker.submit("b-1", success())
        assert ack == {"type": "ResultAck", "block_id": "b-1", "accepted": True, "error": None}
        assert coordinator.violations() == []
        error = failure("model_not_found", retryable=True)["error"]
        await worker.say("Decline", block_id="b-2", error=error)
        await worker.hear("Error")
        assert len(coordinator.violations()) == 1


async def test_a_busy_port_is_named() -> None:
    async with EmbeddedCoordinator(tasks()) as coordinator:
        port = int(coordinator.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"another program listens.*:{port}"):
            await EmbeddedCoordinator(tasks(), port=port).start()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_other_machines_reach_it_only_when_that_is_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match="host"):
        EmbeddedCoordinator(tasks(), host=host)
    EmbeddedCoordinator(tasks(), host=host, allow_remote=True)


async def test_stopped_and_started_it_goes_on_with_the_same_port_and_blocks() -> None:
    coordinator = EmbeddedCoordinator(tasks(2))
    async with coordinator:
        url = coordinator.url
        async with WireWorker(url) as worker:
            await worker.register()
            await worker.ask()
            await coordinator.stop()
            with pytest.raises(ConnectionClosed):
                await worker.hear()
        await coordinator.start()
        assert coordinator.url == url
        async with WireWorker(url) as worker:
            await worker.register()
            assert (await worker.submit("b-1", success()))["accepted"] is True
            assert (await worker.ask())["block_id"] == "b-2"


async def test_a_new_process_on_the_same_files_goes_on_where_the_old_one_was(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results.jsonl"
    async with (
        EmbeddedCoordinator(tasks(3), results) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register(max_concurrent_tasks=2)
        await worker.ask()
        await worker.ask()
        await worker.submit("b-1", success("one"))
    with results.open("a") as file:
        file.write('{"block_id": "b-2", "accep')  # A crash in the middle of a line.

    async with EmbeddedCoordinator(tasks(3), results) as coordinator:
        assert coordinator.unfinished == 2
        async with (
            WireWorker(coordinator.url) as worker,
            WireWorker(coordinator.url, "other") as other,
        ):
            await other.register()
            assert (await other.ask())["block_id"] == "b-3", "b-2 is still the first worker's"
            assert (await other.submit("b-2", success()))["accepted"] is False
            await worker.register()
            assert (await worker.submit("b-1", success("one")))["accepted"] is True
            assert (await worker.submit("b-2", success("two")))["accepted"] is True
            await other.submit("b-3", success("three"))
            await coordinator.finished()
    lines = [ujson.loads(x) for x in results.read_text().splitlines() if x.endswith("}")]
    assert [(r["block_id"], r["result"]["output"]["text"]) for r in lines] == [
        ("b-1", "one"),
        ("b-2", "two"),
        ("b-3", "three"),
    ]
    assert os.listdir(tmp_path) == [results.name], "the journal goes with the last block"


async def test_what_cannot_be_kept_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: object, outcome: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with (
        EmbeddedCoordinator(tasks(), tmp_path / "results.jsonl") as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register()
        await worker.ask()
        monkeypatch.setattr("ai4all.coordinator.results.ResultsFile.ended", no_space)
        with pytest.raises(ConnectionClosed):
            await worker.submit("b-1", success())
        with pytest.raises(OSError, match="No space left"):
            await coordinator.finished()


async def test_results_cannot_be_written_into_a_directory_that_is_not_there(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError):
        await EmbeddedCoordinator(tasks(), tmp_path / "absent" / "results.jsonl").start()


async def test_what_a_worker_says_about_itself_is_known() -> None:
    async with (
        EmbeddedCoordinator([]) as coordinator,
        WireWorker(coordinator.url) as worker,
    ):
        await worker.register(backend="cuda")
        link = coordinator.links["w-1"]
        assert link.capabilities.backend == "cuda"
        assert link.capabilities.memory_mb == CAPABILITIES["memory_mb"]


async def test_who_knocks_without_a_handshake_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with EmbeddedCoordinator(tasks()) as coordinator:
        port = int(coordinator.url.rpartition(":")[2])
        for knock in (b"", b"\x16\x03\x01\x00", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(knock)
            writer.write_eof()
            await reader.read()
            writer.close()
        async with WireWorker(coordinator.url) as worker:
            await worker.register()
    assert [record for record in caplog.records if record.exc_info] == []
