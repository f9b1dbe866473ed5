"""One worker's session with a coordinator, without sockets, clocks or logs.

Frames and the time go in; events, frames and the next deadline come out:

    session.receive(frame, now)      session.events()
    session.receive_closed(now)      session.frames_to_send()
    session.receive_timeout(now)     session.next_deadline()
    session.send_...(..., now)

``now`` is any clock in seconds that never goes back. A session outlives its connections: it knows
which blocks run and which results wait for their ``ResultAck``, and takes both over to the next
connection. Nothing that a coordinator does makes ``receive`` raise; a frame that breaks a rule
becomes a ``BadFrame`` event, and too many in a row end the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from ai4all.errors import LocalProtocolError, RemoteProtocolError
from ai4all.protocol.codec import (
    DEFAULT_LIMITS,
    ForeignVersion,
    Limits,
    UnfitAssignment,
    UnknownMessage,
    decode_server_message,
    encode,
    put_under,
)
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
    SessionEvent,
    SessionStarted,
    UnknownFrame,
    VersionRefused,
    WorkAssigned,
    WorkDue,
)
from ai4all.protocol.messages import (
    EXTENSIONS,
    PROTOCOL_VERSION,
    Assignment,
    Cancel,
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
    ResourceUsage,
    ResultAck,
    ServerMessage,
    SubmitResult,
    WorkerCapabilities,
    WorkerStatus,
)
from ai4all.protocol.states import Event, State, advance
from ai4all.types.task import ErrorInfo, TaskResult

__all__ = ["Session", "SessionOptions"]

# Close codes of RFC 6455, section 7.4.1.
CLOSE_NORMAL: Final = 1000
CLOSE_PROTOCOL_ERROR: Final = 1002
CLOSE_POLICY_VIOLATION: Final = 1008

_MAX_UNKNOWN_TYPES: Final = 256

# Blocks that nobody asked for are refused, each in a message that is kept until it has arrived.
# When so many are held, a connection may bring so many more.
_MAX_BLOCKS_HELD: Final = 4096
_MAX_UNASKED: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How patient a session is. Times are in seconds.

    Attributes:
        extensions: Names offered in ``Register``.
        registration_timeout: How long ``Registered`` may take.
        answer_timeout: How long the answer to ``RequestWork`` may take before it is asked again.
        default_heartbeat: Cadence for a coordinator that says 0.
        min_heartbeat: Shortest cadence taken from a coordinator.
        max_heartbeat: Longest cadence taken from a coordinator.
        min_retry: Shortest wait after ``NoWork``.
        max_retry: Longest wait after ``NoWork``.
        duplicate_wait: Wait after a block that was given a second time.
        max_unacknowledged: Results without ``ResultAck`` above which no work is asked for.
        max_bad_frames: Bad frames in a row that end the connection.
        limits: What a frame may be before it is parsed.
    """

    extensions: tuple[str, ...] = EXTENSIONS
    registration_timeout: float = 30.0
    answer_timeout: float = 30.0
    default_heartbeat: float = 30.0
    min_heartbeat: float = 0.1
    max_heartbeat: float = 3600.0
    min_retry: float = 0.1
    max_retry: float = 3600.0
    duplicate_wait: float = 1.0
    max_unacknowledged: int = 64
    max_bad_frames: int = 100
    limits: Limits = field(default=DEFAULT_LIMITS)


class Session:
    """The worker's side of the protocol. See the module for how it is driven."""

    def __init__(
        self,
        worker_id: str,
        capabilities: WorkerCapabilities,
        benchmark_score: float | None,
        *,
        envelope: Callable[[], str],
        options: SessionOptions | None = None,
    ) -> None:
        """Prepare a session; nothing happens before ``connecting``.

        Args:
            worker_id: The worker's persistent name.
            capabilities: What ``Register`` says. May be set anew between connections.
            benchmark_score: The benchmark's composite score. May be set anew, too.
            envelope: Makes the envelope of one frame, as ``messages.envelope`` does.
            options: Patience and limits.
        """
        self.worker_id = worker_id
        self.capabilities = capabilities
        self.benchmark_score = benchmark_score
        # Why the worker is not what it was promised to be. May be set at any time.
        self.degraded: str | None = None
        self.options = options or SessionOptions()
        self._envelope = envelope
        # Said once a block, and always the same.
        self._request_work = encode(RequestWork(worker_id=worker_id))
        self._state = State.DISCONNECTED
        self._events: deque[SessionEvent] = deque()
        self._outgoing: deque[str] = deque()
        self._running: dict[str, None] = {}
        self._unacknowledged: dict[str, str] = {}
        self._unknown_types: set[str] = set()
        self._progress_sequence: dict[str, int] = {}
        self._reset_connection()

    def _reset_connection(self) -> None:
        """Forget what belongs to one connection."""
        self._session_id: str | None = None
        self._extensions: frozenset[str] = frozenset()
        self._registration_due: float | None = None
        self._heartbeat_interval = self.options.default_heartbeat
        self._heartbeat_due: float | None = None
        self._answer_due: float | None = None
        self._retry_at: float | None = None
        self._outstanding_requests = 0
        self._unasked = 0
        self._draining = False
        self._bad_frames = 0
        self._outgoing.clear()

    # What can be asked at any time.

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def session_id(self) -> str | None:
        """The coordinator's name for this connection, once registered."""
        return self._session_id

    @property
    def is_registered(self) -> bool:
        """Whether frames other than ``Register`` may go out."""
        return self._state in (State.REGISTERED, State.WORKING)

    @property
    def running(self) -> tuple[str, ...]:
        """Blocks assigned and not yet answered, oldest first."""
        return tuple(self._running)

    @property
    def unacknowledged(self) -> tuple[str, ...]:
        """Blocks whose result waits for its ``ResultAck``, oldest first."""
        return tuple(self._unacknowledged)

    @property
    def outstanding_requests(self) -> int:
        """``RequestWork`` frames that have no answer yet."""
        return self._outstanding_requests

    @property
    def may_request_work(self) -> bool:
        """Whether ``send_request_work`` is legal and polite now."""
        return (
            self.is_registered
            and self._retry_at is None
            and not self._draining
            and len(self._unacknowledged) < self.options.max_unacknowledged
        )

    def speaks(self, extension: str) -> bool:
        """Whether the coordinator listed ``extension`` back."""
        return extension in self._extensions

    # What comes out.

    def events(self) -> list[SessionEvent]:
        """Take the events since the last call."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def frames_to_send(self) -> list[str]:
        """Take the frames since the last call, in the order to write them."""
        taken = list(self._outgoing)
        self._outgoing.clear()
        return taken

    def next_deadline(self) -> float | None:
        """When ``receive_timeout`` wants to be called, on the clock of ``now``."""
        first: float | None = None
        for due in (
            self._registration_due,
            self._heartbeat_due,
            self._answer_due,
            self._retry_at,
        ):
            if due is not None and (first is None or due < first):
                first = due
        return first

    # The shell's news.

    def connecting(self) -> None:
        """A handshake begins.

        Raises:
            LocalProtocolError: There is a connection already.
        """
        self._state = advance(self._state, Event.CONNECT)
        self._reset_connection()

    def connected(self, now: float) -> None:
        """The handshake succeeded: ``Register`` goes out.

        Raises:
            LocalProtocolError: No handshake was begun.
        """
        self._state = advance(self._state, Event.OPENED)
        self._registration_due = now + self.options.registration_timeout
        self._send(
            Register(
                worker_id=self.worker_id,
                capabilities=self.capabilities,
                benchmark_score=self.benchmark_score,
                extensions=list(self.options.extensions),
                degraded=self.degraded,
            )
        )

    def receive_closed(self, code: int | None = None, reason: str = "") -> None:
        """The connection is gone, or was never made. Without one, does nothing."""
        if self._state is State.DISCONNECTED:
            return
        self._state = advance(self._state, Event.CLOSED)
        self._reset_connection()
        self._events.append(SessionEnded(code, reason))

    def receive_timeout(self, now: float) -> None:
        """Act on every deadline that has passed by ``now``."""
        if self._registration_due is not None and now >= self._registration_due:
            self._end(Event.CLOSED, CLOSE_POLICY_VIOLATION, "no answer to Register")
            return
        if self._heartbeat_due is not None and now >= self._heartbeat_due:
            self._events.append(HeartbeatDue())
            self._heartbeat_due += self._heartbeat_interval
            if self._heartbeat_due <= now:
                # Beats that were missed (a suspended machine) are not made up for.
                self._heartbeat_due = now + self._heartbeat_interval
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._events.append(WorkDue())
        if self._answer_due is not None and now >= self._answer_due:
            self._answer_due = None
            self._outstanding_requests = 0
            self._events.append(WorkDue())

    def receive(self, frame: str | bytes, now: float) -> None:
        """Take one message from the coordinator.

        Args:
            frame: ``str`` for a text message, ``bytes`` for a binary one, which is a fault.
            now: The time.
        """
        if self._state is State.DISCONNECTED:
            # What was still in the pipe when this side ended the connection.
            return
        try:
            if isinstance(frame, bytes):
                raise RemoteProtocolError("a binary message")
            message = decode_server_message(frame, self.options.limits)
            match message:
                case ForeignVersion(theirs):
                    self._refuse_version(theirs)
                    return
                case UnknownMessage(kind):
                    self._report_unknown(kind)
                case UnfitAssignment(block_id, error):
                    self._receive_block(block_id, AssignmentUnfit(block_id, error), now)
                case _:
                    self._receive_message(message, now)
        except RemoteProtocolError as exc:
            self._bad_frames += 1
            self._events.append(BadFrame(exc.problem))
            if self._bad_frames > self.options.max_bad_frames:
                self._end(Event.CLOSED, CLOSE_PROTOCOL_ERROR, "too many bad frames")
            return
        self._bad_frames = 0

    def _receive_message(self, message: ServerMessage, now: float) -> None:
        match message:
            case Registered():
                self._receive_registered(message, now)
            case Assignment(block_id=block_id):
                self._receive_block(block_id, WorkAssigned(message), now)
            case NoWork(retry_after_ms=retry_after_ms):
                self._state = advance(self._state, Event.NO_WORK)
                self._answered()
                options = self.options
                wait = min(max(retry_after_ms / 1000, options.min_retry), options.max_retry)
                self._retry_at = max(self._retry_at or now, now + wait)
            case ResultAck(block_id=block_id, accepted=accepted, error=error):
                self._state = advance(self._state, Event.ACKNOWLEDGED)
                # A second one, after a result went out twice, is nothing new.
                if self._unacknowledged.pop(block_id, None) is not None:
                    self._events.append(ResultAcknowledged(block_id, accepted, error))
                    if len(self._unacknowledged) == self.options.max_unacknowledged - 1:
                        self._events.append(WorkDue())
            case Error(code=code, message=text):
                self._receive_error(code, text)
            case Cancel(block_id=block_id, reason=reason):
                self._require_spoken("cancel")
                self._state = advance(self._state, Event.CANCELLED)
                if block_id in self._running:
                    self._events.append(BlockCancelled(block_id, reason or ""))
            case Drain(reason=reason):
                self._require_spoken("drain")
                self._state = advance(self._state, Event.DRAINED)
                self._draining = True
                self._events.append(Drained(reason or ""))

    def _receive_registered(self, message: Registered, now: float) -> None:
        self._state = advance(self._state, Event.REGISTERED)
        options = self.options
        interval = message.heartbeat_interval_ms / 1000 or options.default_heartbeat
        self._heartbeat_interval = min(max(interval, options.min_heartbeat), options.max_heartbeat)
        self._heartbeat_due = now + self._heartbeat_interval
        self._registration_due = None
        self._session_id = message.session_id
        self._extensions = frozenset(options.extensions) & frozenset(message.extensions or ())
        if self._running:
            self._state = advance(self._state, Event.RESUMED)
        if self.speaks("reconcile"):
            self._send(
                Reconcile(
                    worker_id=self.worker_id,
                    running=list(self._running),
                    unacknowledged=list(self._unacknowledged),
                )
            )
        self._outgoing.extend(self._unacknowledged.values())
        self._events.append(
            SessionStarted(message.session_id, self._extensions, self._heartbeat_interval)
        )

    def _receive_block(
        self, block_id: str, event: WorkAssigned | AssignmentUnfit, now: float
    ) -> None:
        assigned = advance(self._state, Event.ASSIGNED)
        if self._outstanding_requests == 0:
            self._unasked += 1
            held = len(self._running) + len(self._unacknowledged)
            if self._unasked > _MAX_UNASKED and held >= _MAX_BLOCKS_HELD:
                self._end(Event.CLOSED, CLOSE_POLICY_VIOLATION, "more blocks than were asked for")
                return
        self._answered()
        self._retry_at = None
        frame = self._unacknowledged.get(block_id)
        if frame is None and block_id not in self._running:
            self._state = assigned
            self._running[block_id] = None
            self._events.append(event)
            return
        if frame is not None:
            self._outgoing.append(frame)
        # Without a wait, a coordinator that gives the same block for ever would get a hot loop.
        self._retry_at = now + self.options.duplicate_wait
        self._events.append(DuplicateAssignment(block_id, resent=frame is not None))

    def _receive_error(self, code: str, text: str) -> None:
        if self._state is State.CONNECTED:
            self._events.append(RegistrationRefused(code, text))
            self._end(Event.REFUSED, CLOSE_NORMAL, "registration refused")
            return
        self._state = advance(self._state, Event.COMPLAINED)
        self._events.append(CoordinatorError(code, text))

    def _answered(self) -> None:
        self._outstanding_requests = max(0, self._outstanding_requests - 1)
        if self._outstanding_requests == 0:
            self._answer_due = None

    def _require_spoken(self, extension: str) -> None:
        if self.is_registered and not self.speaks(extension):
            raise RemoteProtocolError(
                f"a frame of the extension {extension!r}, which was not agreed"
            )

    def _report_unknown(self, kind: str) -> None:
        # The bound keeps a coordinator that invents names from filling memory and log.
        if kind not in self._unknown_types and len(self._unknown_types) < _MAX_UNKNOWN_TYPES:
            self._unknown_types.add(kind)
            self._events.append(UnknownFrame(kind))

    def _refuse_version(self, theirs: str) -> None:
        self._events.append(VersionRefused(theirs, str(PROTOCOL_VERSION)))
        self._end(Event.CLOSED, CLOSE_PROTOCOL_ERROR, f"protocol {PROTOCOL_VERSION} is spoken here")

    def _end(self, event: Event, code: int, reason: str) -> None:
        self._state = advance(self._state, event)
        self._reset_connection()
        self._events.append(CloseLink(code, reason))
        self._events.append(SessionEnded(code, reason))

    # What the worker says.

    def send_request_work(self, now: float) -> None:
        """Ask for one block.

        Raises:
            LocalProtocolError: Not registered, told to wait or to drain, or too many results are
                unacknowledged (see ``may_request_work``).
        """
        state = advance(self._state, Event.REQUEST_WORK)
        if not self.may_request_work:
            raise LocalProtocolError("RequestWork before it is due")
        self._state = state
        self._outgoing.append(put_under(self._request_work, self._envelope()))
        self._outstanding_requests += 1
        self._answer_due = now + self.options.answer_timeout

    def pause_requests(self, until: float) -> None:
        """Ask for no work before ``until``; ``WorkDue`` tells when it may be asked for again."""
        if self.is_registered:
            self._retry_at = max(self._retry_at or until, until)

    def send_heartbeat(self, status: WorkerStatus, usage: ResourceUsage) -> None:
        """Say that the worker lives, and how it is. Lists the active blocks beside the status.

        Raises:
            LocalProtocolError: Not registered.
        """
        self._state = advance(self._state, Event.HEARTBEAT)
        self._send(
            Heartbeat(
                worker_id=self.worker_id,
                status=status,
                resource_usage=usage,
                active_blocks=list(self._running),
                degraded=self.degraded,
            )
        )

    def result_frame(self, block_id: str, result: TaskResult) -> str:
        """Write the frame that delivers a result. Keep these very bytes: they are sent each time.

        Raises:
            LocalProtocolError: The result holds something that JSON cannot.
        """
        message = SubmitResult(worker_id=self.worker_id, block_id=block_id, result=result)
        return encode(message, self._envelope())

    def send_result(self, block_id: str, frame: str) -> None:
        """Deliver a result: now if registered, and after every registration until acknowledged.

        Args:
            block_id: The block; no longer active after this.
            frame: What ``result_frame`` wrote, safe in the spool by now.
        """
        self._unacknowledged[block_id] = frame
        if self.is_registered:
            self._state = advance(self._state, Event.SUBMIT_RESULT)
            self._outgoing.append(frame)
        self._block_done(block_id)

    def restore_results(self, frames: Iterable[tuple[str, str]]) -> None:
        """Take over results that an earlier process left in its spool, oldest first.

        Raises:
            LocalProtocolError: The session is registered already, so they would not be sent.
        """
        if self.is_registered:
            raise LocalProtocolError("results restored in a running session")
        self._unacknowledged.update(frames)

    def send_decline(self, block_id: str, error: ErrorInfo) -> bool:
        """Hand an active block back that was not begun.

        Returns:
            Whether it was said. Without a registered connection that speaks ``decline`` it was
            not, and the block is still active: send a failed result instead.

        Raises:
            LocalProtocolError: The block is not active.
        """
        if block_id not in self._running:
            raise LocalProtocolError("Decline for a block that is not active")
        if not (self.is_registered and self.speaks("decline")):
            return False
        self._send(Decline(worker_id=self.worker_id, block_id=block_id, error=error))
        self._block_done(block_id)
        return True

    def takes_progress(self, block_id: str) -> bool:
        """Whether the coordinator speaks ``progress`` and the block is active."""
        return self.is_registered and self.speaks("progress") and block_id in self._running

    def send_progress(self, block_id: str, text: str, completion_tokens: int) -> bool:
        """Stream text of an active block, where the coordinator takes it.

        Returns:
            Whether it was said.
        """
        if not self.takes_progress(block_id):
            return False
        sequence = self._progress_sequence.get(block_id, 0)
        self._progress_sequence[block_id] = sequence + 1
        self._send(
            Progress(
                worker_id=self.worker_id,
                block_id=block_id,
                sequence=sequence,
                text=text,
                completion_tokens=completion_tokens,
            )
        )
        return True

    def send_goodbye(self, reason: str) -> bool:
        """Say that the worker leaves, and which blocks it abandons, where that is spoken.

        Returns:
            Whether it was said.
        """
        if not (self.is_registered and self.speaks("goodbye")):
            return False
        self._send(Goodbye(worker_id=self.worker_id, reason=reason, abandoned=list(self._running)))
        return True

    def _block_done(self, block_id: str) -> None:
        self._running.pop(block_id, None)
        self._progress_sequence.pop(block_id, None)
        if not self._running and self._state is State.WORKING:
            self._state = advance(self._state, Event.ALL_DONE)

    def _send(self, message: Message) -> None:
        self._outgoing.append(encode(message, self._envelope()))
