"""The socket of the embedded coordinator: a thin shell around the ledger.

It never trusts a worker: a frame that breaks a rule is recorded as a violation and answered with
an ``Error``, and too many of them end the connection. With ``strict_seed`` it speaks the first
protocol to the letter: no envelope, no extensions, deadlines in nanoseconds as chrono writes
them, and a frame of any type that the first protocol does not name is a violation.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

import structlog
import ujson
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

from ai4all.coordinator.history import Event, EventKind
from ai4all.coordinator.ledger import LeaseRules, Ledger, Outcome
from ai4all.coordinator.links import Violation, WorkerLink, read_frame
from ai4all.coordinator.listening import asks_for, check_host, listen_problem, socket_log
from ai4all.coordinator.results import ResultsFile, digest_of
from ai4all.coordinator.tasks import TaskSpec, name, named, read_tasks
from ai4all.errors import ConfigError
from ai4all.protocol.codec import (
    Limits,
    encode,
)
from ai4all.protocol.messages import (
    EXTENSIONS,
    Assignment,
    Cancel,
    ClientMessage,
    Decline,
    Drain,
    Error,
    Goodbye,
    Heartbeat,
    Message,
    NoWork,
    Progress,
    Reconcile,
    Register,
    Registered,
    RequestWork,
    ResultAck,
    SubmitResult,
    envelope,
)

__all__ = ["EmbeddedCoordinator", "WorkerLink"]

_log = structlog.get_logger(__name__)
_level = logging.getLogger(__name__)

_CLOSE_POLICY: Final = 1008
_CLOSE_REPLACED: Final = 4001
_CLOSE_FOR_VIOLATION: Final = (1002, 1003, 1007, 1009)

_MAX_VIOLATIONS: Final = 16
_MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024
_SILENT_INTERVALS: Final = 3
_REGISTER_WITHIN_S: Final = 10.0
_CLOSE_WITHIN_S: Final = 2.0


class EmbeddedCoordinator:
    """Serves tasks to workers that connect, until all have ended.

    Args:
        tasks: The tasks, or a JSON Lines file of them.
        results: A JSON Lines file to add results to, or a function to call with each outcome, or
            None. With a file, blocks that ended in an earlier run are not given out again.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        allow_remote: Permit an address that other machines can reach.
        token: What workers must send as ``Authorization: Bearer``; None asks for nothing.
        heartbeat_interval_ms: Told to workers. One that is silent for three of them is dropped.
        no_work_retry_ms: Told to workers for whom there is nothing.
        extensions: What to speak of what workers offer.
        strict_seed: Speak the first protocol to the letter, and hold workers to it.
        rules: Leases and retries.
        max_message_bytes: Longest frame to accept.
        on_event: Called with every event, those included that ``history`` leaves out.

    Attributes:
        history: Every event but heartbeats, progress and requests in vain.
        links: Open connections of registered workers, by ``worker_id``.

    Raises:
        ConfigError: The tasks cannot be read, or the address is not allowed.
        ValueError: Two tasks have one ``block_id``.
    """

    def __init__(
        self,
        tasks: Iterable[TaskSpec] | Path,
        results: Path | Callable[[Outcome], None] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        allow_remote: bool = False,
        token: str | None = None,
        heartbeat_interval_ms: int = 10_000,
        no_work_retry_ms: int = 1_000,
        extensions: Iterable[str] = EXTENSIONS,
        strict_seed: bool = False,
        rules: LeaseRules | None = None,
        max_message_bytes: int = 1024 * 1024,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        check_host(host, allow_remote=allow_remote)
        self.history: list[Event] = []
        self.links: dict[str, WorkerLink] = {}
        self._tasks = read_tasks(tasks) if isinstance(tasks, Path) else named(tasks)
        self._results = results
        self._file: ResultsFile | None = None
        self._host, self._port = host, port
        self._token = token
        self._heartbeat_interval_ms = heartbeat_interval_ms
        self._no_work_retry_ms = no_work_retry_ms
        self._strict_seed = strict_seed
        self._extensions = frozenset() if strict_seed else frozenset(extensions)
        self._limits = Limits(max_bytes=max_message_bytes)
        self._on_event = on_event
        self._ledger = Ledger(rules)
        self._outcomes: dict[str, Outcome] = {}
        self._to_send: deque[tuple[ServerConnection, Message]] = deque()
        self._server: Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()
        self._failure: OSError | None = None
        now = time.monotonic()
        for task in self._tasks:
            self._add(task, now)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where workers connect."""
        if self._server is None:
            raise RuntimeError("the coordinator has not been started")
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"ws://{host}:{self._port}"

    @property
    def unfinished(self) -> int:
        """Blocks that have not ended."""
        return self._ledger.unfinished

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """How blocks ended, by ``block_id``, in the order in which they did."""
        return dict(self._outcomes)

    def violations(self) -> list[str]:
        """What workers sent that the protocol does not allow."""
        return [event.detail for event in self.history if event.kind is EventKind.VIOLATION]

    async def start(self) -> None:
        """Listen. After ``stop`` it may be called again, and goes on with the same blocks and port.

        Raises:
            ConfigError: The address is in use, or is not one of this machine.
            OSError: The results cannot be written.
        """
        if self._server is not None:
            return
        if isinstance(self._results, Path):
            self._file = ResultsFile(self._results)
            self._restore(self._file)
        try:
            self._server = await serve(
                self._serve,
                self._host,
                self._port,
                compression=None,
                max_size=self._limits.max_bytes,
                process_request=asks_for(self._token),
                # A page in somebody's browser has no business here.
                origins=[None],
                close_timeout=_CLOSE_WITHIN_S,
                logger=socket_log,
            )
        except OSError as exc:
            self._close_file()
            raise ConfigError("port", listen_problem(exc), f"{self._host}:{self._port}") from exc
        self._port = next(iter(self._server.sockets)).getsockname()[1]
        self._after()

    async def stop(self) -> None:
        """Close all connections and stop listening. Blocks that run keep their leases."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        server.close()
        await server.wait_closed()
        self.links.clear()
        self._close_file()

    async def finished(self) -> None:
        """Wait until every block has ended and its acknowledgement is on its way.

        Raises:
            OSError: The results could not be written.
        """
        await self._done.wait()
        if self._failure is not None:
            raise self._failure

    def add(self, task: TaskSpec) -> str:
        """Add a task at the end of the queue.

        Returns:
            Its ``block_id``.

        Raises:
            ValueError: The ``block_id`` is taken.
        """
        self._tasks.append(name(task, len(self._tasks) + 1))
        block_id = self._add(self._tasks[-1], time.monotonic())
        self._done.clear()
        self._after()
        return block_id

    def cancel(self, block_id: str, reason: str) -> bool:
        """Give a block up; who holds it is told if he understands. False when it is over.

        Raises:
            KeyError: There is no such block.
        """
        cancelled = self._ledger.cancel(block_id, reason, time.monotonic())
        self._after()
        return cancelled

    def drain(self, reason: str) -> None:
        """Ask all who understand to finish what runs and to ask for no more."""
        for link in self.links.values():
            if "drain" in link.extensions:
                self._queue(link.socket, Drain(reason=reason))
        self._after()

    async def drop_connections(self) -> None:
        """Cut all connections without a word, as a network does."""
        for link in list(self.links.values()):
            link.socket.transport.abort()
            await link.socket.wait_closed()

    # Start and end.

    def _add(self, task: TaskSpec, now: float) -> str:
        expires_at = None
        if task.deadline is not None:
            expires_at = now + (task.deadline - datetime.now(UTC)).total_seconds()
        return self._ledger.add(task, expires_at=expires_at)

    def _restore(self, file: ResultsFile) -> None:
        if self.history or self._outcomes:
            return  # Started again in one life: the ledger knows better.
        now = time.monotonic()
        for block_id, worker_id in file.given:
            self._ledger.restore_given(block_id, worker_id, now)
        mine = {task.block_id for task in self._tasks}
        for outcome in file.outcomes:
            if outcome.block_id in mine and outcome.block_id not in self._outcomes:
                self._outcomes[outcome.block_id] = outcome
                self._ledger.restore_outcome(outcome, digest_of(outcome.result))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close(finished=self._ledger.unfinished == 0)
            self._file = None

    def _arm(self) -> None:
        """See to it that ``_expire`` runs when the next thing is due."""
        times = [at for at in (self._ledger.next_deadline(), self._silent_at()) if at is not None]
        if self._server is None or not times:
            return
        due = min(times)
        if self._timer is not None:
            if self._timer.when() <= due:
                return  # Too early is harmless, and cheaper than arming anew for every frame.
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._drop_silent(now)
        self._ledger.expire(now)
        self._after()

    def _silent_at(self) -> float | None:
        return min((self._gives_up_at(link) for link in self.links.values()), default=None)

    def _gives_up_at(self, link: WorkerLink) -> float:
        return link.last_heard + _SILENT_INTERVALS * self._heartbeat_interval_ms / 1000.0

    def _drop_silent(self, now: float) -> None:
        for link in list(self.links.values()):
            if self._gives_up_at(link) <= now:
                self._unlink(link, now, "silent for three heartbeats", grace=0.0)
                # Not a polite close: who is silent does not answer one.
                link.socket.transport.abort()

    # A connection.

    async def _serve(self, socket: ServerConnection) -> None:
        link: WorkerLink | None = None
        reason = "the connection ended"
        try:
            link = await self._welcome(socket)
            if link is not None:
                await self._converse(link)
        except ConnectionClosed as exc:
            if exc.rcvd is not None and exc.rcvd.reason:
                reason = f"the worker closed the connection: {exc.rcvd.reason}"
            ours = exc.sent is not None and not exc.rcvd_then_sent
            if ours and exc.sent is not None and exc.sent.code in _CLOSE_FOR_VIOLATION:
                # Found by the library before the frame came to us.
                reason = f"closed with {exc.sent.code}: {exc.sent.reason}"
                self._violation(link.worker_id if link is not None else None, reason)
        finally:
            if link is not None:
                self._unlink(link, time.monotonic(), reason)
                self._after()

    async def _welcome(self, socket: ServerConnection) -> WorkerLink | None:
        """The first message must be ``Register``."""
        try:
            async with asyncio.timeout(_REGISTER_WITHIN_S):
                frame = await socket.recv()
        except TimeoutError:
            await socket.close(_CLOSE_POLICY, "no Register came")
            return None
        message = self._read(frame, None)
        if not isinstance(message, Register):
            assert isinstance(message, Error), "nothing else is allowed here"
            await socket.send(self._frame(message))
            await socket.close(_CLOSE_POLICY, message.code)
            return None
        now = time.monotonic()
        link = WorkerLink(
            socket=socket,
            worker_id=message.worker_id,
            session_id=str(uuid.uuid4()),
            capabilities=message.capabilities,
            benchmark_score=message.benchmark_score,
            extensions=self._extensions & frozenset(message.extensions or ()),
            last_heard=now,
        )
        self._replace(link.worker_id, now)
        self.links[link.worker_id] = link
        self._ledger.returned(link.worker_id)
        self._note(Event(EventKind.REGISTERED, now, link.worker_id, detail=link.session_id))
        self._queue(
            socket,
            Registered(
                session_id=link.session_id,
                heartbeat_interval_ms=self._heartbeat_interval_ms,
                extensions=None if self._strict_seed else sorted(link.extensions),
            ),
        )
        self._after()
        return link

    def _replace(self, worker_id: str, now: float) -> None:
        older = self.links.get(worker_id)
        if older is not None:
            self._unlink(older, now, "replaced by a newer connection")
            older.replaced = True
            # Not waited for: who is half dead answers a close late or never.
            closing = asyncio.create_task(
                older.socket.close(_CLOSE_REPLACED, "a newer connection took over")
            )
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _converse(self, link: WorkerLink) -> None:
        violations = 0
        async for frame in link.socket:
            if link.replaced:
                return
            message = self._read(frame, link)
            if isinstance(message, Error):
                violations += 1
                self._queue(link.socket, message)
            else:
                link.last_heard = time.monotonic()
                self._handle(link, message, link.last_heard)
            self._after()
            if violations >= _MAX_VIOLATIONS:
                await link.socket.close(_CLOSE_POLICY, "too many violations")

    def _unlink(
        self, link: WorkerLink, now: float, reason: str, *, grace: float | None = None
    ) -> None:
        if self.links.get(link.worker_id) is not link:
            return
        del self.links[link.worker_id]
        self._note(Event(EventKind.DISCONNECTED, now, link.worker_id, detail=reason))
        self._ledger.disconnected(link.worker_id, now, grace=grace)

    def _read(self, frame: str | bytes, link: WorkerLink | None) -> ClientMessage | Error:
        """A message that may be acted on, or the complaint."""
        try:
            return read_frame(frame, link, self._limits, strict_seed=self._strict_seed)
        except Violation as exc:
            self._violation(link.worker_id if link is not None else None, exc.problem)
            return Error(code=exc.code, message=exc.problem)

    def _violation(self, worker_id: str | None, problem: str) -> None:
        self._note(Event(EventKind.VIOLATION, time.monotonic(), worker_id, detail=problem))

    def _handle(self, link: WorkerLink, message: ClientMessage, now: float) -> None:
        worker_id, ledger = link.worker_id, self._ledger
        match message:
            case Heartbeat():
                link.status = message.status
                link.heartbeats += 1
                self._observe(Event(EventKind.HEARTBEAT, now, worker_id, data={"message": message}))
            case RequestWork():
                self._give(link, now)
            case SubmitResult():
                digest = digest_of(message.result)
                verdict = ledger.submit(worker_id, message.block_id, message.result, digest, now)
                self._queue(
                    link.socket,
                    ResultAck(
                        block_id=message.block_id, accepted=verdict.accepted, error=verdict.error
                    ),
                )
            case Decline():
                ledger.decline(worker_id, message.block_id, message.error, now)
            case Progress():
                block_id, data = message.block_id, {"message": message}
                self._observe(Event(EventKind.PROGRESS, now, worker_id, block_id, data=data))
            case Reconcile():
                ledger.reconcile(
                    worker_id, link.session_id, message.running, message.unacknowledged, now
                )
            case Goodbye():
                self._note(Event(EventKind.GOODBYE, now, worker_id, detail=message.reason))
                ledger.handed_back(worker_id, message.abandoned, now)
            case Register():
                raise AssertionError("refused when it was read")

    def _give(self, link: WorkerLink, now: float) -> None:
        assigned = self._ledger.assign(
            link.worker_id,
            link.session_id,
            now,
            offers=link.capabilities.supported_tasks,
            capacity=link.capabilities.max_concurrent_tasks or 1,
        )
        if assigned is None:
            self._observe(Event(EventKind.NO_WORK, now, link.worker_id))
            self._queue(link.socket, NoWork(retry_after_ms=self._no_work_retry_ms))
            return
        # Before the worker can have it, so that its result is known to be owed.
        self._keep(lambda file: file.assigned(assigned.block_id, link.worker_id))
        self._queue(
            link.socket,
            Assignment(
                block_id=assigned.block_id,
                task_type=assigned.task.task_type,
                input=assigned.task.input,
                deadline=datetime.now(UTC) + timedelta(seconds=assigned.seconds),
                model_id=assigned.task.model_id,
            ),
        )

    # Out.

    def _after(self) -> None:
        """Do what the ledger's events ask for. Results are kept before anything is answered."""
        for event in self._ledger.events():
            outcome = event.data.get("outcome")
            if event.kind in (EventKind.DELIVERED, EventKind.FAILED) and outcome is not None:
                self._ended(outcome)
            elif event.kind is EventKind.WITHDRAWN:
                self._tell_withdrawn(event)
            self._note(event)
        self._flush()
        self._arm()

    def _ended(self, outcome: Outcome) -> None:
        self._outcomes[outcome.block_id] = outcome
        if callable(self._results):
            self._results(outcome)
        else:
            self._keep(lambda file: file.ended(outcome))

    def _keep(self, write: Callable[[ResultsFile], None]) -> None:
        if self._file is None or self._failure is not None:
            return
        try:
            write(self._file)
        except OSError as exc:
            # Nothing that is not kept may be acknowledged: the workers keep it until we can.
            exc.filename = exc.filename or str(self._file.path)
            self._failure = exc

    def _tell_withdrawn(self, event: Event) -> None:
        link = self.links.get(event.worker_id or "")
        if link is not None and "cancel" in link.extensions and event.block_id is not None:
            self._queue(link.socket, Cancel(block_id=event.block_id, reason=event.detail))

    def _queue(self, socket: ServerConnection, message: Message) -> None:
        self._to_send.append((socket, message))

    def _flush(self) -> None:
        if self._failure is not None:
            self._to_send.clear()
            self._done.set()
            for link in list(self.links.values()):
                link.socket.transport.abort()
            return
        while self._to_send:
            socket, message = self._to_send.popleft()
            # A broadcast to one: it neither waits for a slow reader nor raises for one that left.
            broadcast([socket], self._frame(message))
            if socket.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
                socket.transport.abort()
        if self._ledger.unfinished == 0:
            self._done.set()

    def _frame(self, message: Message) -> str:
        if not self._strict_seed:
            return encode(message, envelope(uuid.uuid4(), datetime.now(UTC)))
        frame = encode(message)
        if isinstance(message, Assignment):
            # As chrono writes an instant that it has from the system's clock.
            body = ujson.loads(frame)
            body["deadline"] = body["deadline"].removesuffix("Z") + f"{time.time_ns() % 1000:03}Z"
            frame = ujson.dumps(body, ensure_ascii=False, escape_forward_slashes=False)
        return frame

    def _note(self, event: Event) -> None:
        self.history.append(event)
        self._observe(event)

    def _observe(self, event: Event) -> None:
        # A look at the level is cheaper than a line that nobody reads, and there are many.
        if _level.isEnabledFor(logging.DEBUG):
            _log.debug(
                "coordinator",
                kind=str(event.kind),
                worker_id=event.worker_id,
                block_id=event.block_id,
                detail=event.detail,
            )
        if self._on_event is not None:
            self._on_event(event)
