"""One block through the session: request, assignment, result, acknowledgement, no sockets."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import ujson
from pytest_benchmark.fixture import BenchmarkFixture

from ai4all.protocol.codec import decode_client_message
from ai4all.protocol.events import ResultAcknowledged, WorkAssigned
from ai4all.protocol.messages import Register, SubmitResult, envelope
from ai4all.protocol.session import Session

GOLDEN = Path(__file__).parents[1] / "fixtures" / "wire"
ENVELOPE = envelope("e", datetime(2030, 1, 1, tzinfo=UTC))


def registered_session() -> Session:
    register = decode_client_message((GOLDEN / "client-register.json").read_bytes())
    assert isinstance(register, Register)
    session = Session("w-1", register.capabilities, 0.5, envelope=lambda: ENVELOPE)
    session.connecting()
    session.connected(0.0)
    session.receive((GOLDEN / "server-registered.json").read_text(), 0.0)
    session.events()
    session.frames_to_send()
    return session


def test_one_block(benchmark: BenchmarkFixture) -> None:
    session = registered_session()
    submit = decode_client_message((GOLDEN / "client-submit-result.json").read_bytes())
    assert isinstance(submit, SubmitResult)
    assignment = ujson.dumps(ujson.loads((GOLDEN / "server-assignment.json").read_text()))
    ack = ujson.dumps(ujson.loads((GOLDEN / "server-result-ack.json").read_text()))

    def block() -> int:
        session.send_request_work(0.0)
        session.receive(assignment, 0.0)
        (assigned,) = session.events()
        assert isinstance(assigned, WorkAssigned)
        session.send_result("b-1", session.result_frame("b-1", submit.result))
        session.receive(ack, 0.0)
        (acknowledged,) = session.events()
        assert isinstance(acknowledged, ResultAcknowledged)
        session.next_deadline()
        return len(session.frames_to_send())

    assert benchmark(block) == 2


def test_next_deadline(benchmark: BenchmarkFixture) -> None:
    session = registered_session()
    assert benchmark(session.next_deadline) == 1.0
