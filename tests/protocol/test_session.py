from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ujson
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ai4all.errors import BadRequest, LocalProtocolError
from ai4all.protocol.codec import decode_client_message
from ai4all.protocol.events import (
    AssignmentUnfit,
    BadFrame,
    BlockCancelled,
    CloseLink,
    CoordinatorError,
    Drained,
    DuplicateAssignment,
    HeartbeatDue,
    RegistrationRefused,
    ResultAcknowledged,
    SessionEnded,
    SessionStarted,
    UnknownFrame,
    VersionRefused,
    WorkAssigned,
    WorkDue,
)
from ai4all.protocol.messages import EXTENSIONS, Message, ResourceUsage, working
from ai4all.protocol.session import Session
from ai4all.protocol.states import State
from ai4all.types.task import BlockMetrics, ErrorCode, ErrorInfo, TaskResult

from .conftest import counting_envelopes

MakeSession = Callable[..., Session]
REGISTERED = '{"type":"Registered","session_id":"s-1","heartbeat_interval_ms":1000}'
NO_WORK = '{"type":"NoWork","retry_after_ms":5000}'
SEED_TYPES = {"Register", "Heartbeat", "RequestWork", "SubmitResult"}
USAGE = ResourceUsage(cpu_percent=1.0, memory_mb=2, active_threads=3)
FAILURE = ErrorInfo(code=ErrorCode.MODEL_NOT_FOUND, message="none", retryable=True)
RESULT = TaskResult(
    success=False,
    output=None,
    error=FAILURE,
    metrics=BlockMetrics(queue_time_ms=0.0, execution_time_ms=0.0, total_time_ms=0.0),
)


def extended(*extensions: str) -> str:
    return ujson.dumps(ujson.loads(REGISTERED) | {"extensions": list(extensions)})


def assignment(block_id: str = "b-1", **changes: Any) -> str:
    return ujson.dumps(
        {
            "type": "Assignment",
            "block_id": block_id,
            "task_type": "TEXT_COMPLETION",
            "input": {"prompt": "Hello"},
            "deadline": "2030-01-01T00:00:00.123456789Z",
            "model_id": "m",
        }
        | changes
    )


def ack(block_id: str = "b-1", accepted: bool = True, error: str | None = None) -> str:
    return ujson.dumps(
        {"type": "ResultAck", "block_id": block_id, "accepted": accepted, "error": error}
    )


def sent(session: Session) -> list[dict[str, Any]]:
    return [ujson.loads(frame) for frame in session.frames_to_send()]


def kinds(session: Session) -> list[str]:
    return [frame["type"] for frame in sent(session)]


def start(session: Session, frame: str = REGISTERED, now: float = 0.0) -> Session:
    """Connect and register, and take what that gave."""
    session.connecting()
    session.connected(now)
    session.receive(frame, now)
    session.events()
    session.frames_to_send()
    return session


def submit(session: Session, block_id: str = "b-1") -> str:
    frame = session.result_frame(block_id, RESULT)
    session.send_result(block_id, frame)
    return frame


class TestRegistration:
    def test_register_goes_out_by_itself(self, make_session: MakeSession) -> None:
        session = make_session()
        session.connecting()
        assert session.state is State.CONNECTING
        session.connected(10.0)
        assert session.state is State.CONNECTED
        (frame,) = sent(session)
        assert frame == {
            "type": "Register",
            "worker_id": "w-1",
            "capabilities": {
                "backend": "cpu",
                "supported_tasks": ["TEXT_COMPLETION"],
                "supports_training": False,
                "vram_mb": None,
                "memory_mb": 8192,
                "compute_score": 0.5,
            },
            "benchmark_score": 0.5,
            "extensions": list(EXTENSIONS),
            "id": "e-1",
            "timestamp": "2026-01-01T00:00:01.000000Z",
            "version": {"major": 1, "minor": 0, "patch": 0},
        }

    def test_registered_starts_the_session(self, make_session: MakeSession) -> None:
        session = make_session()
        session.connecting()
        session.connected(10.0)
        session.receive(extended("progress", "telepathy"), 11.0)
        assert session.events() == [SessionStarted("s-1", frozenset({"progress"}), 1.0)]
        assert session.state is State.REGISTERED
        assert session.session_id == "s-1"
        assert session.next_deadline() == 12.0

    def test_no_answer_ends_the_connection(self, make_session: MakeSession) -> None:
        session = make_session(registration_timeout=30.0)
        session.connecting()
        session.connected(10.0)
        assert session.next_deadline() == 40.0
        session.receive_timeout(39.9)
        assert session.events() == []
        session.receive_timeout(40.0)
        assert session.events() == [
            CloseLink(1008, "no answer to Register"),
            SessionEnded(1008, "no answer to Register"),
        ]
        assert session.state is State.DISCONNECTED
        assert session.next_deadline() is None

    def test_a_refusal_ends_the_connection(self, make_session: MakeSession) -> None:
        session = make_session()
        session.connecting()
        session.connected(0.0)
        session.receive('{"type":"Error","code":"banned","message":"go away"}', 1.0)
        assert session.events()[0] == RegistrationRefused("banned", "go away")
        assert session.state is State.DISCONNECTED
        # What comes after it is not heeded, and the shell's news of the end neither.
        session.receive(REGISTERED, 1.1)
        session.receive_closed(1000)
        assert session.events() == []

    @pytest.mark.parametrize("stage", ["connected", "registered"])
    def test_another_major_version_ends_it(self, make_session: MakeSession, stage: str) -> None:
        session = make_session()
        session.connecting()
        session.connected(0.0)
        if stage == "registered":
            session.receive(REGISTERED, 0.0)
        session.events()
        session.receive('{"type":"X","version":{"major":2,"minor":0,"patch":0}}', 1.0)
        refused, close, _ = session.events()
        assert refused == VersionRefused("2.0.0", "1.0.0")
        assert isinstance(close, CloseLink)
        assert session.state is State.DISCONNECTED

    def test_nothing_before_registered(self, make_session: MakeSession) -> None:
        session = make_session()
        session.connecting()
        session.connected(0.0)
        session.events()
        for frame in (assignment(), NO_WORK, ack()):
            session.receive(frame, 1.0)
            (event,) = session.events()
            assert isinstance(event, BadFrame)
        assert session.state is State.CONNECTED
        assert session.running == ()
        with pytest.raises(LocalProtocolError):
            session.send_request_work(1.0)
        with pytest.raises(LocalProtocolError):
            session.send_heartbeat("Idle", USAGE)

    def test_registered_twice_is_a_bad_frame(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(extended("goodbye"), 1.0)
        assert session.events() == [BadFrame("Registered while Registered")]
        assert not session.speaks("goodbye")

    def test_connecting_twice_is_our_fault(self, make_session: MakeSession) -> None:
        session = start(make_session())
        with pytest.raises(LocalProtocolError):
            session.connecting()
        with pytest.raises(LocalProtocolError):
            session.connected(1.0)
        assert session.is_registered


class TestHeartbeat:
    def test_beats_keep_their_cadence(self, make_session: MakeSession) -> None:
        session = start(make_session(), now=10.0)
        beats = []
        # Whatever else happens, and however late the shell comes.
        for now in (10.4, 11.0, 11.3, 12.05, 13.01, 13.9, 14.0):
            session.receive(NO_WORK, now)
            session.receive_timeout(now)
            beats += [now for event in session.events() if event == HeartbeatDue()]
        assert beats == [11.0, 12.05, 13.01, 14.0]

    def test_missed_beats_are_not_made_up_for(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive_timeout(100.5)
        assert session.events() == [HeartbeatDue()]
        assert session.next_deadline() == 101.5

    @pytest.mark.parametrize(
        ("said_ms", "kept_s"), [(0, 30.0), (1, 0.1), (250, 0.25), (2**64 - 1, 3600.0)]
    )
    def test_absurd_intervals_are_held_in(
        self, make_session: MakeSession, said_ms: int, kept_s: float
    ) -> None:
        session = make_session()
        session.connecting()
        session.connected(0.0)
        session.receive(REGISTERED.replace("1000", str(said_ms)), 0.0)
        assert session.events() == [SessionStarted("s-1", frozenset(), kept_s)]
        assert session.next_deadline() == kept_s

    def test_the_frame_lists_all_blocks(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment("b-1"), 0.0)
        session.receive(assignment("b-2"), 0.0)
        session.send_heartbeat(working("b-1", 0.5), USAGE)
        (frame,) = sent(session)
        assert frame["status"] == {"Working": {"block_id": "b-1", "progress": 0.5}}
        assert frame["active_blocks"] == ["b-1", "b-2"]
        assert frame["resource_usage"]["gpu_percent"] is None


class TestWork:
    def test_one_block_start_to_end(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.send_request_work(0.0)
        assert kinds(session) == ["RequestWork"]
        assert session.outstanding_requests == 1
        session.receive(assignment(), 1.0)
        (event,) = session.events()
        assert isinstance(event, WorkAssigned)
        assert event.assignment.block_id == "b-1"
        assert session.state is State.WORKING
        assert session.outstanding_requests == 0
        frame = submit(session)
        assert session.frames_to_send() == [frame]
        assert session.state is State.REGISTERED
        assert session.unacknowledged == ("b-1",)
        session.receive(ack(), 2.0)
        assert session.events() == [ResultAcknowledged("b-1", True, None)]
        assert session.unacknowledged == ()

    def test_several_blocks_at_once(self, make_session: MakeSession) -> None:
        session = start(make_session())
        for block_id in ("b-1", "b-2"):
            session.send_request_work(0.0)
            session.receive(assignment(block_id), 0.0)
        submit(session, "b-1")
        assert session.state is State.WORKING
        submit(session, "b-2")
        assert session.state is State.REGISTERED

    def test_no_work_is_waited_out(self, make_session: MakeSession) -> None:
        session = start(make_session(min_retry=0.5, max_retry=60.0))
        session.send_request_work(0.0)
        session.receive('{"type":"NoWork","retry_after_ms":250}', 0.0)
        assert not session.may_request_work
        with pytest.raises(LocalProtocolError):
            session.send_request_work(0.1)
        assert session.next_deadline() == 0.5
        session.receive_timeout(0.5)
        assert session.events() == [WorkDue()]
        assert session.may_request_work
        session.receive('{"type":"NoWork","retry_after_ms":999999999}', 0.5)
        session.receive_timeout(60.5)
        assert WorkDue() in session.events()

    def test_a_request_without_answer_is_repeated(self, make_session: MakeSession) -> None:
        session = start(make_session(answer_timeout=5.0), REGISTERED.replace("1000", "60000"))
        session.send_request_work(1.0)
        assert session.next_deadline() == 6.0
        session.receive_timeout(6.0)
        assert session.events() == [WorkDue()]
        assert session.outstanding_requests == 0
        assert session.next_deadline() == 60.0

    def test_a_refused_result_is_over_too(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        submit(session)
        session.events()
        session.receive(ack(accepted=False, error="too late"), 1.0)
        assert session.events() == [ResultAcknowledged("b-1", False, "too late")]
        assert session.unacknowledged == ()

    def test_an_acknowledgement_twice_or_of_a_stranger_is_nothing(
        self, make_session: MakeSession
    ) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        submit(session)
        session.receive(ack(), 1.0)
        session.events()
        session.receive(ack(), 1.0)
        session.receive(ack("b-99"), 1.0)
        assert session.events() == []

    def test_an_unreadable_assignment_asks_for_its_answer(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment(deadline="tomorrow"), 0.0)
        (event,) = session.events()
        assert isinstance(event, AssignmentUnfit)
        assert isinstance(event.error, BadRequest)
        assert session.running == ("b-1",)
        submit(session)
        assert session.state is State.REGISTERED

    def test_a_running_block_is_not_taken_twice(self, make_session: MakeSession) -> None:
        session = start(make_session(duplicate_wait=1.0))
        session.receive(assignment(), 0.0)
        session.events()
        session.receive(assignment(), 0.5)
        assert session.events() == [DuplicateAssignment("b-1", resent=False)]
        assert session.running == ("b-1",)
        assert session.state is State.WORKING
        assert not session.may_request_work
        session.receive_timeout(1.5)
        assert session.may_request_work

    def test_a_flood_of_blocks_that_nobody_asked_for_ends_the_connection(
        self, make_session: MakeSession
    ) -> None:
        session = start(make_session(max_unacknowledged=10_000))

        def flood(name: str) -> int:
            for number in range(10_000):
                session.receive(assignment(f"{name}-{number}"), 0.0)
                if not session.is_registered:
                    return number
                submit(session, f"{name}-{number}")
                session.events()
            return 10_000

        assert flood("first") == 4096
        assert CloseLink(1008, "more blocks than were asked for") in session.events()
        session.receive_closed()
        start(session)
        assert flood("second") == 256
        session.receive_closed()
        # What was asked for is taken, however much waits.
        start(session)
        for number in range(300):
            session.send_request_work(1.0)
            session.receive(assignment(f"asked-{number}"), 1.0)
            session.events()
        assert session.is_registered
        assert len(session.running) == 300

    def test_a_finished_block_is_answered_with_what_there_is(
        self, make_session: MakeSession
    ) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        frame = submit(session)
        session.events()
        session.frames_to_send()
        session.receive(assignment(), 0.5)
        assert session.events() == [DuplicateAssignment("b-1", resent=True)]
        assert session.frames_to_send() == [frame]
        assert session.state is State.REGISTERED

    def test_too_many_unacknowledged_results_stop_the_asking(
        self, make_session: MakeSession
    ) -> None:
        session = start(make_session(max_unacknowledged=2))
        for block_id in ("b-1", "b-2"):
            session.receive(assignment(block_id), 0.0)
            submit(session, block_id)
        assert not session.may_request_work
        session.events()
        session.receive(ack("b-1"), 0.0)
        assert session.events() == [ResultAcknowledged("b-1", True, None), WorkDue()]
        assert session.may_request_work


class TestReconnect:
    def test_results_go_out_again_byte_for_byte(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment("b-1"), 0.0)
        session.receive(assignment("b-2"), 0.0)
        first, second = submit(session, "b-1"), submit(session, "b-2")
        assert session.frames_to_send() == [first, second]
        session.receive_closed(1006, "")
        session.connecting()
        session.connected(10.0)
        session.frames_to_send()
        session.receive(REGISTERED, 10.0)
        assert session.frames_to_send() == [first, second]
        session.receive(ack("b-1"), 10.0)
        session.receive_closed(1006, "")
        session.connecting()
        session.connected(20.0)
        session.frames_to_send()
        session.receive(REGISTERED, 20.0)
        assert session.frames_to_send() == [second]

    def test_a_result_finished_while_away_is_kept(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        session.receive_closed(None, "")
        assert session.running == ("b-1",)
        frame = submit(session)
        assert session.frames_to_send() == []
        assert session.running == ()
        session.connecting()
        session.connected(1.0)
        session.receive(REGISTERED, 1.0)
        assert session.frames_to_send()[1:] == [frame]
        assert session.state is State.REGISTERED

    def test_running_blocks_survive(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        session.receive_closed(None, "")
        start(session)
        assert session.state is State.WORKING
        session.receive(assignment(), 1.0)
        assert session.events() == [DuplicateAssignment("b-1", resent=False)]

    def test_what_belongs_to_a_connection_is_forgotten(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended(*EXTENSIONS))
        session.send_request_work(0.0)
        session.receive(NO_WORK, 0.0)
        session.receive('{"type":"Drain"}', 0.0)
        session.receive_closed(1001, "restart")
        assert SessionEnded(1001, "restart") in session.events()
        assert session.next_deadline() is None
        start(session)
        assert not session.speaks("goodbye")
        assert session.outstanding_requests == 0
        assert session.may_request_work

    def test_results_of_an_earlier_process(self, make_session: MakeSession) -> None:
        session = make_session()
        old = session.result_frame("b-0", RESULT)
        session.restore_results([("b-0", old)])
        session.connecting()
        session.connected(0.0)
        session.receive(REGISTERED, 0.0)
        assert session.frames_to_send()[1:] == [old]
        with pytest.raises(LocalProtocolError):
            session.restore_results([("b-1", old)])

    def test_reconcile_where_it_is_spoken(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(assignment("b-1"), 0.0)
        session.receive(assignment("b-2"), 0.0)
        submit(session, "b-1")
        session.receive_closed(None, "")
        session.connecting()
        session.connected(1.0)
        session.frames_to_send()
        session.receive(extended("reconcile"), 1.0)
        reconcile, result = sent(session)
        assert (reconcile["type"], reconcile["running"], reconcile["unacknowledged"]) == (
            "Reconcile",
            ["b-2"],
            ["b-1"],
        )
        assert result["block_id"] == "b-1"


class TestExtensions:
    def test_a_seed_coordinator_gets_seed_frames_only(self, make_session: MakeSession) -> None:
        session = make_session()
        session.connecting()
        session.connected(0.0)
        session.receive(REGISTERED, 0.0)
        session.send_request_work(0.0)
        session.receive(assignment(), 0.0)
        session.send_heartbeat(working("b-1", 0.1), USAGE)
        assert not session.send_progress("b-1", "text", 1)
        assert not session.send_decline("b-1", FAILURE)
        assert session.running == ("b-1",)
        submit(session)
        assert not session.send_goodbye("shutdown")
        assert set(kinds(session)) == SEED_TYPES

    def test_what_we_did_not_offer_is_not_spoken(self, make_session: MakeSession) -> None:
        session = start(make_session(extensions=("goodbye",)), extended(*EXTENSIONS))
        assert session.speaks("goodbye")
        assert not session.speaks("progress")

    def test_decline_takes_the_block_back(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended("decline"))
        session.receive(assignment(), 0.0)
        assert session.send_decline("b-1", FAILURE)
        (frame,) = sent(session)
        assert (frame["type"], frame["error"]["code"]) == ("Decline", "model_not_found")
        assert session.state is State.REGISTERED
        assert session.unacknowledged == ()
        with pytest.raises(LocalProtocolError):
            session.send_decline("b-1", FAILURE)

    def test_progress_counts_within_a_block(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended("progress"))
        session.receive(assignment("b-1"), 0.0)
        session.receive(assignment("b-2"), 0.0)
        for block_id in ("b-1", "b-1", "b-2", "b-1"):
            assert session.send_progress(block_id, "x", 1)
        assert not session.send_progress("b-9", "x", 1)
        numbers = [(frame["block_id"], frame["sequence"]) for frame in sent(session)]
        assert numbers == [("b-1", 0), ("b-1", 1), ("b-2", 0), ("b-1", 2)]
        # A reconnect does not start the count over: the coordinator can see what it missed.
        session.receive_closed(None, "")
        start(session, extended("progress"))
        session.send_progress("b-1", "x", 1)
        assert sent(session)[0]["sequence"] == 3

    def test_goodbye_names_what_is_left(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended("goodbye"))
        session.receive(assignment(), 0.0)
        assert session.send_goodbye("shutdown")
        (frame,) = sent(session)
        assert (frame["reason"], frame["abandoned"]) == ("shutdown", ["b-1"])

    def test_cancel_is_for_blocks_that_run(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended("cancel"))
        session.receive(assignment(), 0.0)
        session.events()
        session.receive('{"type":"Cancel","block_id":"b-9"}', 0.0)
        assert session.events() == []
        session.receive('{"type":"Cancel","block_id":"b-1","reason":"gone"}', 0.0)
        assert session.events() == [BlockCancelled("b-1", "gone")]

    def test_drain_stops_the_asking(self, make_session: MakeSession) -> None:
        session = start(make_session(), extended("drain"))
        session.receive('{"type":"Drain","reason":"maintenance"}', 0.0)
        assert session.events() == [Drained("maintenance")]
        assert not session.may_request_work

    @pytest.mark.parametrize("frame", ['{"type":"Cancel","block_id":"b-1"}', '{"type":"Drain"}'])
    def test_an_extension_that_was_not_agreed_is_a_bad_frame(
        self, make_session: MakeSession, frame: str
    ) -> None:
        session = start(make_session())
        session.receive(assignment(), 0.0)
        session.events()
        session.receive(frame, 0.0)
        (event,) = session.events()
        assert isinstance(event, BadFrame)
        session.receive_timeout(0.0)
        assert session.may_request_work


class TestFaults:
    def test_bad_frames_cost_themselves(self, make_session: MakeSession) -> None:
        session = start(make_session())
        for bad in ("{", "[" * 10_000, "x" * 2_000_000, b"{}", '{"type":"NoWork"}'):
            session.receive(bad, 0.0)
            (event,) = session.events()
            assert isinstance(event, BadFrame)
        session.receive(assignment(), 0.0)
        assert isinstance(session.events()[0], WorkAssigned)

    def test_too_many_in_a_row_end_the_connection(self, make_session: MakeSession) -> None:
        session = start(make_session(max_bad_frames=3))
        for _ in range(3):
            session.receive("{", 0.0)
        session.receive(NO_WORK, 0.0)
        for _ in range(3):
            session.receive("{", 0.0)
        assert session.is_registered
        session.receive("{", 0.0)
        assert CloseLink(1002, "too many bad frames") in session.events()
        assert session.state is State.DISCONNECTED

    def test_unknown_types_are_reported_once_each(self, make_session: MakeSession) -> None:
        session = start(make_session())
        for kind in ("Lease", "Lease", "Gift", "Lease"):
            session.receive(f'{{"type":"{kind}"}}', 0.0)
        assert session.events() == [UnknownFrame("Lease"), UnknownFrame("Gift")]
        for number in range(1000):
            session.receive(f'{{"type":"T{number}"}}', 0.0)
        assert len(session.events()) == 254

    def test_a_complaint_changes_nothing(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive('{"type":"Error","code":"x","message":"y"}', 0.0)
        assert session.events() == [CoordinatorError("x", "y")]
        assert session.is_registered

    def test_asking_too_early_changes_nothing(self, make_session: MakeSession) -> None:
        session = start(make_session())
        session.receive(NO_WORK, 0.0)
        before = (session.state, session.outstanding_requests, session.next_deadline())
        with pytest.raises(LocalProtocolError):
            session.send_request_work(0.0)
        assert (session.state, session.outstanding_requests, session.next_deadline()) == before
        assert session.frames_to_send() == []


class CoordinatorAtWill(RuleBasedStateMachine):
    """A coordinator and a network that do anything, in any order."""

    def __init__(self) -> None:
        super().__init__()
        from ai4all.protocol.messages import WorkerCapabilities

        self.session = Session(
            "w-1",
            WorkerCapabilities(
                backend="cpu",
                supported_tasks=[],
                supports_training=False,
                memory_mb=1,
                compute_score=0.0,
            ),
            None,
            envelope=counting_envelopes(),
        )
        self.now = 0.0
        self.results: dict[str, str] = {}
        self.spoken: set[str] = set()

    @rule(step=st.floats(0.0, 100.0))
    def time_passes(self, step: float) -> None:
        self.now += step
        self.session.receive_timeout(self.now)
        due = self.session.next_deadline()
        assert due is None or due > self.now

    @precondition(lambda self: self.session.state is State.DISCONNECTED)
    @rule()
    def connect(self) -> None:
        self.session.connecting()
        self.session.connected(self.now)
        self.spoken = set()

    @rule(extensions=st.sets(st.sampled_from(EXTENSIONS)))
    def register(self, extensions: set[str]) -> None:
        waiting = self.session.state is State.CONNECTED
        unacknowledged = self.session.unacknowledged
        self.session.frames_to_send()
        self.session.receive(extended(*extensions), self.now)
        if waiting:
            self.spoken = extensions
            resent = [frame for frame in sent(self.session) if frame["type"] == "SubmitResult"]
            assert tuple(frame["block_id"] for frame in resent) == unacknowledged

    @rule(code=st.none() | st.integers(1000, 1015))
    def close(self, code: int | None) -> None:
        self.session.receive_closed(code, "")

    @rule(block=st.sampled_from("abc"), bad=st.booleans())
    def assign(self, block: str, bad: bool) -> None:
        held = {*self.session.running, *self.session.unacknowledged}
        self.session.events()
        self.session.receive(assignment(block, **({"deadline": 7} if bad else {})), self.now)
        taken = [
            event
            for event in self.session.events()
            if isinstance(event, (WorkAssigned, AssignmentUnfit))
        ]
        assert len(taken) == (self.session.is_registered and block not in held)

    @rule(block=st.sampled_from("abc"), accepted=st.booleans())
    def acknowledge(self, block: str, accepted: bool) -> None:
        was_registered = self.session.is_registered
        self.session.receive(ack(block, accepted), self.now)
        if was_registered:
            assert block not in self.session.unacknowledged

    @rule(
        frame=st.sampled_from(
            [
                NO_WORK,
                '{"type":"Error","code":"x","message":"y"}',
                '{"type":"Cancel","block_id":"a"}',
                '{"type":"Drain"}',
                '{"type":"New"}',
            ]
        )
        | st.text(max_size=20)
        | st.binary(max_size=20)
    )
    def say(self, frame: str | bytes) -> None:
        self.session.receive(frame, self.now)

    @precondition(lambda self: self.session.running)
    @rule(decline=st.booleans())
    def finish(self, decline: bool) -> None:
        block = self.session.running[0]
        if decline and self.session.send_decline(block, FAILURE):
            return
        frame = submit(self.session, block)
        self.results[block] = frame

    @precondition(lambda self: self.session.may_request_work)
    @rule()
    def ask(self) -> None:
        self.session.send_request_work(self.now)

    @rule()
    def stream(self) -> None:
        for block in self.session.running:
            self.session.send_progress(block, "x", 1)

    @invariant()
    def every_frame_is_well_formed_and_agreed(self) -> None:
        for frame in self.session.frames_to_send():
            message = decode_client_message(frame)
            assert isinstance(message, Message)
            kind = ujson.loads(frame)["type"]
            assert kind in SEED_TYPES or kind.lower() in self.spoken
            if kind == "SubmitResult":
                assert frame == self.results[ujson.loads(frame)["block_id"]]

    @invariant()
    def the_state_is_true(self) -> None:
        state = self.session.state
        if self.session.is_registered:
            assert (state is State.WORKING) == bool(self.session.running)
        assert not set(self.session.running) & set(self.session.unacknowledged)


TestCoordinatorAtWill = CoordinatorAtWill.TestCase
TestCoordinatorAtWill.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
