from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import ujson
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.errors import (
    ConfigError,
    MaxReconnectsExceeded,
    RegistrationFailed,
    VersionMismatch,
)
from ai4all.protocol.connection import Connection, LinkOptions, check_url, is_retryable
from ai4all.protocol.events import (
    HeartbeatDue,
    SessionEvent,
    SessionStarted,
    VersionRefused,
    WorkAssigned,
)
from ai4all.protocol.messages import EXTENSIONS, ResourceUsage
from ai4all.protocol.session import Session
from ai4all.types.task import BlockMetrics, TaskResult

MakeSession = Callable[..., Session]
USAGE = ResourceUsage(cpu_percent=1.0, memory_mb=2, active_threads=3)
RESULT = TaskResult(
    success=False,
    output=None,
    error=None,
    metrics=BlockMetrics(queue_time_ms=0.0, execution_time_ms=0.0, total_time_ms=0.0),
)
ASSIGNMENT = ujson.dumps(
    {
        "type": "Assignment",
        "block_id": "b-1",
        "task_type": "TEXT_COMPLETION",
        "input": {"prompt": "Hello"},
        "deadline": "2030-01-01T00:00:00Z",
        "model_id": "m",
    }
)


def registered(heartbeat_ms: int = 60_000, **extra: Any) -> str:
    return ujson.dumps(
        {"type": "Registered", "session_id": "s", "heartbeat_interval_ms": heartbeat_ms} | extra
    )


async def until(condition: Callable[[], bool]) -> None:
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0.002)


@dataclass
class Coordinator:
    """A scripted server: ``script`` has each connection from the frame after ``Register`` on."""

    script: Callable[[ServerConnection], Awaitable[None]]
    refusals: list[Response] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    registrations: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    def process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        return self.refusals.pop(0) if self.refusals else None

    async def handle(self, connection: ServerConnection) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionClosed):
            self.registrations.append(ujson.loads(await connection.recv()))
            await self.script(connection)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/worker"


@contextlib.asynccontextmanager
async def serving(coordinator: Coordinator, port: int = 0) -> AsyncIterator[Server]:
    async with serve(
        coordinator.handle, "127.0.0.1", port, process_request=coordinator.process_request
    ) as server:
        coordinator.port = next(iter(server.sockets)).getsockname()[1]
        yield server


def refusal(status: int, **headers: str) -> Response:
    return Response(
        status,
        http.HTTPStatus(status).phrase,
        Headers({"Content-Length": "0"} | {k.replace("_", "-"): v for k, v in headers.items()}),
        b"",
    )


def attempts(max_attempts: int = 0, *, min_session_s: float = 0.0) -> Attempts:
    backoff = Backoff(1, jitter=0.0, max_attempts=max_attempts)
    return Attempts(backoff, min_session_s=min_session_s)


@dataclass
class Link:
    """A connection, what it said, and its task."""

    connection: Connection
    events: list[SessionEvent]
    task: asyncio.Task[None]

    async def saw(self, kind: type[SessionEvent], count: int = 1) -> None:
        while sum(isinstance(event, kind) for event in self.events) < count:
            if self.task.done():
                self.task.result()
                raise AssertionError(f"ended without {count} {kind.__name__}: {self.events}")
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def connected(
    session: Session,
    url: str,
    policy: Attempts | None = None,
    react: Callable[[SessionEvent], None] | None = None,
    **options: Any,
) -> AsyncIterator[Link]:
    events: list[SessionEvent] = []

    def handler(event: SessionEvent) -> None:
        events.append(event)
        if react is not None:
            react(event)

    options.setdefault("refusal_delay", 0.0)
    connection = Connection(session, LinkOptions(url=url, **options), policy or attempts(), handler)
    link = Link(connection, events, asyncio.create_task(connection.run()))
    try:
        yield link
    finally:
        await connection.close()
        await asyncio.wait({link.task}, timeout=10)


async def hold(connection: ServerConnection) -> None:
    await connection.send(registered())
    await connection.wait_closed()


async def test_registers_and_is_registered(make_session: MakeSession) -> None:
    coordinator = Coordinator(hold)
    session = make_session()
    async with serving(coordinator), connected(session, coordinator.url, token="t0p") as link:
        await link.saw(SessionStarted)
        assert session.is_registered
        assert coordinator.registrations[0]["worker_id"] == "w-1"
        (request,) = coordinator.requests
        assert request.path == "/worker"
        assert request.headers["Authorization"] == "Bearer t0p"
        assert request.headers["User-Agent"].startswith("ai4all-native/")
        assert "Sec-WebSocket-Extensions" not in request.headers


async def test_no_token_no_header(make_session: MakeSession) -> None:
    coordinator = Coordinator(hold)
    async with serving(coordinator), connected(make_session(), coordinator.url) as link:
        await link.saw(SessionStarted)
        assert "Authorization" not in coordinator.requests[0].headers


async def test_the_token_is_in_no_log(
    make_session: MakeSession, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("ai4all.protocol.websocket").setLevel(logging.DEBUG)
    coordinator = Coordinator(hold, refusals=[refusal(500)])
    # The server of this test logs what it receives, too.
    logging.getLogger("websockets.server").setLevel(logging.INFO)
    async with (
        serving(coordinator),
        connected(make_session(), coordinator.url, token="hunter2-secret") as link,
    ):
        await link.saw(SessionStarted)
        assert "hunter2" not in repr(link.connection.__dict__)
    assert len(coordinator.requests) == 2
    assert "hunter2" not in caplog.text
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err


async def test_frames_both_ways_and_deadlines(make_session: MakeSession) -> None:
    received: list[str] = []

    async def script(connection: ServerConnection) -> None:
        await connection.send(registered(heartbeat_ms=100))
        async for frame in connection:
            received.append(ujson.loads(frame)["type"])
            if received[-1] == "RequestWork":
                await connection.send(ASSIGNMENT)

    session = make_session()

    def react(event: SessionEvent) -> None:
        match event:
            case SessionStarted():
                session.send_request_work(asyncio.get_running_loop().time())
            case HeartbeatDue():
                session.send_heartbeat("Idle", USAGE)

    coordinator = Coordinator(script)
    async with serving(coordinator), connected(session, coordinator.url, react=react) as link:
        await link.saw(WorkAssigned)
        await link.saw(HeartbeatDue, 3)
        session.send_result("b-1", session.result_frame("b-1", RESULT))
        link.connection.flush()
        await until(lambda: "SubmitResult" in received)
    assert received[0] == "RequestWork"
    assert received.count("Heartbeat") >= 2


async def test_connects_again_and_delivers_again(make_session: MakeSession) -> None:
    results: list[str] = []

    async def script(connection: ServerConnection) -> None:
        await connection.send(registered())
        results.append(str(await connection.recv()))
        if coordinator.connections < 4:
            connection.transport.abort()
            return
        await connection.send('{"type":"ResultAck","block_id":"b-0","accepted":true}')
        await connection.wait_closed()

    session = make_session()
    frame = session.result_frame("b-0", RESULT)
    session.restore_results([("b-0", frame)])
    coordinator = Coordinator(script)
    async with serving(coordinator), connected(session, coordinator.url):
        await until(lambda: not session.unacknowledged)
    assert results == [frame] * 4


async def test_comes_back_when_the_coordinator_does(make_session: MakeSession) -> None:
    coordinator = Coordinator(hold)
    session = make_session()
    async with serving(coordinator):
        port = coordinator.port
    async with connected(session, coordinator.url) as link:
        await asyncio.sleep(0.05)
        assert not session.is_registered
        async with serving(coordinator, port):
            await link.saw(SessionStarted)


@dataclass
class RecordingPolicy:
    """Gives no delays and remembers what it was told."""

    floors: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    limit: int = 1_000_000

    @property
    def count(self) -> int:
        return len(self.floors)

    @property
    def exhausted(self) -> bool:
        return self.count > self.limit

    def opened(self, now: float) -> None:
        self.calls.append("opened")

    def heard(self) -> None:
        self.calls.append("heard")

    def lost(self, now: float, *, floor: float = 0.0) -> float:
        self.calls.append("lost")
        self.floors.append(floor)
        return 0.0


async def run_to_end(session: Session, url: str, policy: Any, **options: Any) -> None:
    connection = Connection(session, LinkOptions(url=url, **options), policy, lambda event: None)
    await asyncio.wait_for(connection.run(), 20)


@pytest.mark.parametrize(
    ("response", "floor"),
    [
        (refusal(401), 60.0),
        (refusal(403), 60.0),
        (refusal(404), 60.0),
        (refusal(302, Location="ws://127.0.0.1:1/"), 60.0),
        (refusal(429), 60.0),
        (refusal(429, Retry_After="7"), 7.0),
        (refusal(503, Retry_After="11"), 11.0),
        (refusal(503, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"), 0.0),
        (refusal(429, Retry_After="soon"), 60.0),
        (refusal(502), 0.0),
    ],
)
async def test_refused_handshakes_meet_patience(
    make_session: MakeSession, response: Response, floor: float
) -> None:
    policy = RecordingPolicy(limit=0)
    coordinator = Coordinator(hold, refusals=[response])
    async with serving(coordinator):
        with pytest.raises(MaxReconnectsExceeded, match="HTTP"):
            await run_to_end(make_session(), coordinator.url, policy, token="secret")
    assert policy.floors == [floor]
    # A redirect is not followed, so nobody else is told the token.
    assert len(coordinator.requests) == 1


async def test_a_session_that_is_heard_says_so(make_session: MakeSession) -> None:
    async def script(connection: ServerConnection) -> None:
        if coordinator.connections > 1:
            await connection.send(registered())

    policy = RecordingPolicy(limit=1)
    coordinator = Coordinator(script)
    async with serving(coordinator):
        with pytest.raises(MaxReconnectsExceeded, match="closed with code 1000"):
            await run_to_end(make_session(), coordinator.url, policy)
    assert policy.calls == ["opened", "lost", "opened", "heard", "lost"]


async def test_gives_up_after_so_many_attempts(make_session: MakeSession) -> None:
    coordinator = Coordinator(hold)
    async with serving(coordinator):
        pass
    with pytest.raises(MaxReconnectsExceeded) as caught:
        await run_to_end(make_session(), coordinator.url, attempts(3))
    assert caught.value.attempts == 4


async def test_a_refused_registration_is_patient_and_names_itself(
    make_session: MakeSession,
) -> None:
    async def script(connection: ServerConnection) -> None:
        await connection.send('{"type":"Error","code":"banned","message":"go away"}')
        await connection.wait_closed()

    policy = RecordingPolicy(limit=2)
    coordinator = Coordinator(script)
    async with serving(coordinator):
        with pytest.raises(RegistrationFailed, match="banned: go away"):
            await run_to_end(make_session(), coordinator.url, policy)
    assert policy.floors == [60.0] * 3


async def test_another_version_meets_patience_until_it_is_put_right(
    make_session: MakeSession,
) -> None:
    other = {"major": 2, "minor": 0, "patch": 0}

    async def script(connection: ServerConnection) -> None:
        right = coordinator.connections > 2
        await connection.send(registered(**({} if right else {"version": other})))
        await connection.wait_closed()

    coordinator = Coordinator(script)
    policy = RecordingPolicy()
    async with serving(coordinator), connected(make_session(), coordinator.url, policy) as link:
        await link.saw(SessionStarted)
        assert [type(e) for e in link.events].count(VersionRefused) == 2
    assert coordinator.connections == 3
    assert policy.floors == [0.0, 0.0]  # The default of these tests.


async def test_attempts_that_all_meet_another_version_end_with_its_name(
    make_session: MakeSession,
) -> None:
    async def script(connection: ServerConnection) -> None:
        await connection.send(registered(version={"major": 2, "minor": 0, "patch": 0}))
        await connection.wait_closed()

    coordinator = Coordinator(script)
    policy = RecordingPolicy(limit=2)
    async with serving(coordinator):
        with pytest.raises(VersionMismatch, match=r"2\.0\.0"):
            await run_to_end(make_session(), coordinator.url, policy)
    assert policy.floors == [60.0] * 3
    assert coordinator.connections == 3


async def test_a_token_is_asked_for_before_each_connection(make_session: MakeSession) -> None:
    answers = ["first", ConfigError("coordinator.token_file", "cannot be read", ""), "second"]

    def token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    coordinator = Coordinator(hold, refusals=[refusal(401)])
    async with (
        serving(coordinator),
        connected(make_session(), coordinator.url, token=token) as link,
    ):
        await link.saw(SessionStarted)
    assert answers == []
    sent = [request.headers["Authorization"] for request in coordinator.requests]
    assert sent == ["Bearer first", "Bearer second"]


async def test_a_refusal_with_two_headers_of_a_name_is_one_refusal(
    make_session: MakeSession,
) -> None:
    response = refusal(429, Retry_After="7")
    response.headers["Retry-After"] = "8"
    policy = RecordingPolicy(limit=0)
    coordinator = Coordinator(hold, refusals=[response])
    async with serving(coordinator):
        with pytest.raises(MaxReconnectsExceeded, match="429"):
            await run_to_end(make_session(), coordinator.url, policy)
    assert policy.floors == [7.0]


async def test_silence_after_register_ends_in_another_attempt(make_session: MakeSession) -> None:
    async def script(connection: ServerConnection) -> None:
        if coordinator.connections > 1:
            await connection.send(registered())
        await connection.wait_closed()
        codes.append(connection.close_code)

    codes: list[int | None] = []
    coordinator = Coordinator(script)
    session = make_session(registration_timeout=0.05)
    async with serving(coordinator), connected(session, coordinator.url) as link:
        await link.saw(SessionStarted)
    assert codes[0] == 1008


async def test_an_oversized_message_costs_the_connection(make_session: MakeSession) -> None:
    async def script(connection: ServerConnection) -> None:
        await connection.send(registered())
        if coordinator.connections == 1:
            await connection.send("x" * 2000)
        await connection.wait_closed()
        codes.append(connection.close_code)

    codes: list[int | None] = []
    coordinator = Coordinator(script)
    async with (
        serving(coordinator),
        connected(make_session(), coordinator.url, max_size=1000) as link,
    ):
        await link.saw(SessionStarted, 2)
    assert codes[0] == 1009


async def test_garbage_costs_only_itself(make_session: MakeSession) -> None:
    async def script(connection: ServerConnection) -> None:
        await connection.send(registered())
        for frame in ("{", "[" * 9999, b"\x00\xff", '{"type":"New"}', '{"type":"NoWork"}'):
            await connection.send(frame)
        await connection.send(ASSIGNMENT)
        await connection.wait_closed()

    coordinator = Coordinator(script)
    async with serving(coordinator), connected(make_session(), coordinator.url) as link:
        await link.saw(WorkAssigned)
    assert coordinator.connections == 1


async def test_close_says_goodbye_and_writes_what_is_left(make_session: MakeSession) -> None:
    received: list[dict[str, Any]] = []

    async def script(connection: ServerConnection) -> None:
        await connection.send(registered(extensions=list(EXTENSIONS)))
        received.extend([ujson.loads(frame) async for frame in connection])
        codes.append(connection.close_code)

    codes: list[int | None] = []
    coordinator = Coordinator(script)
    session = make_session()
    async with serving(coordinator), connected(session, coordinator.url) as link:
        await link.saw(SessionStarted)
        for number in range(50):
            session.send_result(f"b-{number}", session.result_frame(f"b-{number}", RESULT))
        await link.connection.close("maintenance")
        await asyncio.wait_for(link.task, 5)
    assert [frame["type"] for frame in received[1:]] == ["SubmitResult"] * 50 + ["Goodbye"]
    assert received[-1]["reason"] == "maintenance"
    assert codes == [1000]


async def test_close_ends_a_wait_and_a_handshake(make_session: MakeSession) -> None:
    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    accepted = asyncio.Event()
    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with connected(make_session(), f"ws://127.0.0.1:{port}", open_timeout=60) as link:
            await accepted.wait()
            await link.connection.close()
            await asyncio.wait_for(link.task, 5)
    backoff = Attempts(Backoff(1_000_000, jitter=0.0))
    async with connected(make_session(), f"ws://127.0.0.1:{port}", backoff) as link:
        await until(lambda: backoff.count > 0)
        await link.connection.close()
        await asyncio.wait_for(link.task, 5)


async def test_a_fault_of_the_handler_is_not_hidden(make_session: MakeSession) -> None:
    def handler(event: SessionEvent) -> None:
        raise ZeroDivisionError

    coordinator = Coordinator(hold)
    async with serving(coordinator):
        connection = Connection(
            make_session(), LinkOptions(url=coordinator.url), attempts(), handler
        )
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(connection.run(), 10)


async def test_cancelling_run_leaves_nothing_open(make_session: MakeSession) -> None:
    coordinator = Coordinator(hold)
    async with serving(coordinator), connected(make_session(), coordinator.url) as link:
        await link.saw(SessionStarted)
        link.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await link.task
        assert not link.connection.session.is_registered


@pytest.mark.parametrize(
    "url",
    [
        "ws://localhost",
        "ws://127.0.0.1:80/x?y=1",
        "ws://[::1]:8080",
        "wss://coordinator.example",
        "WSS://coordinator.example/worker",
    ],
)
def test_addresses_that_can_be_used(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "wss://"),
        ("coordinator.example", "wss://"),
        ("http://coordinator.example", "wss://"),
        ("wss://", "wss://"),
        ("wss://host:notaport", "valid address"),
        ("wss://host:99999", "valid address"),
        ("wss://[::1", "valid address"),
        ("wss://ex..ample.invalid", "no such host name"),
        (f"wss://{'a' * 64}.invalid", "no such host name"),
        ("wss://me:hunter2@host", "token"),
        ("wss://me@host", "token"),
        ("wss://host/#x", "fragment"),
        ("ws://coordinator.example", "allow_insecure"),
        ("ws://10.0.0.1", "allow_insecure"),
        ("ws://127.0.0.1.example.com", "allow_insecure"),
        ("ws://localhost.example.com", "allow_insecure"),
    ],
)
def test_addresses_that_cannot(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check_url(url, origin="--coordinator")
    assert caught.value.key == "coordinator.url"
    assert caught.value.origin == "--coordinator"
    assert "hunter2" not in str(caught.value)


def test_insecure_where_it_is_allowed() -> None:
    check_url("ws://10.0.0.1", allow_insecure=True)


def test_what_is_worth_another_attempt() -> None:
    assert is_retryable(ConnectionRefusedError())
    assert is_retryable(TimeoutError())
    assert is_retryable(RegistrationFailed("x", "y"))
    assert is_retryable(VersionMismatch("2.0.0", "1.0.0"))
    assert not is_retryable(ConfigError("coordinator.url", "x", ""))
    assert not is_retryable(ZeroDivisionError())


def test_the_options_do_not_show_the_token() -> None:
    assert "hunter2" not in repr(LinkOptions(url="wss://host", token="hunter2"))
