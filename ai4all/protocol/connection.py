"""The one place where the protocol meets a socket: an asyncio shell around ``Session``.

Whatever happens (a message, a deadline, a call of the worker), one turn follows: take the
session's events, write its frames, look at its deadline, hand the events to the worker. The shell
knows when to connect again, and ``dialing`` how; everything else is the session's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
)

from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.errors import (
    ConfigError,
    LinkError,
    MaxReconnectsExceeded,
    RegistrationFailed,
    VersionMismatch,
)
from ai4all.protocol.dialing import (
    URL_KEY,
    Dial,
    LinkOptions,
    Socket,
    check_url,
    dial_websocket,
)
from ai4all.protocol.events import (
    CloseLink,
    RegistrationRefused,
    SessionEvent,
    SessionStarted,
    VersionRefused,
)
from ai4all.protocol.pins import PinMismatch
from ai4all.protocol.refusals import retry_after
from ai4all.protocol.session import Session

__all__ = [
    "Connection",
    "Dial",
    "LinkOptions",
    "ReconnectPolicy",
    "Socket",
    "check_url",
    "dial_websocket",
    "is_retryable",
]

_log = structlog.get_logger(__name__)

_CLOSE_NORMAL: Final = 1000
_SLEPT: Final = "the machine slept"

# What is written at once. A ping waits behind no more than this and one long frame.
_BATCH_CHARACTERS: Final = 32 * 1024

# Two clocks may differ by their last digits about whether it is over.
_SHORTEST_WAIT_S: Final = 0.001


class ReconnectPolicy(Protocol):
    """When to connect again; ``ai4all.delivery.backoff.Attempts`` is the one in use.

    Times are seconds of the connection's clock.
    """

    @property
    def count(self) -> int:
        """Failed attempts in a row."""

    @property
    def exhausted(self) -> bool:
        """Whether the last one was one too many."""

    def opened(self, now: float) -> None:
        """The handshake is done."""

    def heard(self) -> None:
        """A valid message came in."""

    def lost(self, now: float, *, floor: float = 0.0) -> float:
        """The connection failed or ended; returns the delay before the next attempt."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """Why a connection is gone, and the least time to wait before the next."""

    reason: str
    floor: float = 0.0
    error: LinkError | None = None


def is_retryable(exc: BaseException) -> bool:
    """Whether connecting again could end better, perhaps after patience.

    An address that is no address stays what it is. A coordinator that speaks another version may
    have been put right by the time that it is asked again.
    """
    if isinstance(exc, (InvalidURI, ConfigError, MaxReconnectsExceeded)):
        return False
    return isinstance(exc, (OSError, TimeoutError, InvalidHandshake, ConnectionClosed))


class Connection:
    """Keeps one session connected until it is closed."""

    def __init__(
        self,
        session: Session,
        options: LinkOptions,
        policy: ReconnectPolicy,
        handler: Callable[[SessionEvent], None],
        *,
        clock: Clock = SYSTEM_CLOCK,
        dial: Dial | None = None,
    ) -> None:
        """Prepare; nothing is opened before ``run``.

        Args:
            session: The session to serve. Its ``now`` is the event loop's ``time()``.
            options: Where and how.
            policy: When to connect again.
            handler: Called with each event, on the loop. May call the session's ``send_...``.
            clock: What tells the time of day.
            dial: What opens a connection; by default ``dial_websocket``.

        Raises:
            ConfigError: The address cannot or should not be used.
        """
        check_url(options.url, allow_insecure=options.allow_insecure)
        self.session = session
        self._options = options
        self._policy = policy
        self._handler = handler
        self._clock = clock
        self._dial = dial or dial_websocket
        self._socket: Socket | None = None
        self._outbox: deque[str] = deque()
        self._outbox_filled = asyncio.Event()
        self._writing: asyncio.Handle | None = None
        self._is_writer_busy = False
        self._outbox_empty = asyncio.Event()
        self._outbox_empty.set()
        self._deadline_moved = asyncio.Event()
        self._armed: float | None = None
        self._closing = asyncio.Event()
        # A wait for the next attempt looks at the clock again when this is set.
        self._roused = asyncio.Event()
        self._dialling: asyncio.Task[Socket] | None = None
        self._slept = False
        self._close_task: asyncio.Task[None] | None = None
        self._in_turn = False
        self._refusal: LinkError | None = None

    @property
    def is_closing(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing.is_set()

    def reconfigure(self, options: LinkOptions) -> None:
        """Make the next connection with other options; the one that is open stays as it is.

        Raises:
            ConfigError: The address cannot or should not be used.
        """
        check_url(options.url, allow_insecure=options.allow_insecure)
        self._options = options

    def now(self) -> float:
        """The session's clock."""
        return asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Connect, serve, and connect again, until ``close``.

        Raises:
            ConfigError: The address or proxy cannot be used.
            VersionMismatch: As many attempts as there may be met another major version.
            RegistrationFailed: As many registrations as there may be attempts were refused.
            MaxReconnectsExceeded: As many attempts as there may be failed in a row.
        """
        while not self.is_closing:
            lost = await self._connect_and_serve()
            if self.is_closing:
                return
            if lost.error is not None and not is_retryable(lost.error):
                raise lost.error
            delay = self._policy.lost(self.now(), floor=lost.floor)
            attempt = self._policy.count
            if self._policy.exhausted:
                raise lost.error or MaxReconnectsExceeded(attempt, lost.reason)
            _log.warning(
                "link_lost", reason=lost.reason, attempt=attempt, retry_in_s=round(delay, 3)
            )
            await self._wait(delay)

    def flush(self) -> None:
        """Take a turn: write what the session has to say, deliver what it has to tell.

        Call it after any ``send_...`` from outside the handler. Calls from within the handler are
        not needed and do nothing.
        """
        if self._in_turn:
            return
        self._in_turn = True
        try:
            while self._turn():
                pass
        finally:
            self._in_turn = False

    async def close(self, reason: str = "shutdown") -> None:
        """Say goodbye where that is spoken, write what is left, close, and end ``run``."""
        if self.session.send_goodbye(reason):
            self.flush()
        self._closing.set()
        self._roused.set()
        if self._socket is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.close_timeout):
                await self._outbox_empty.wait()
        if self._socket is not None:
            await self._socket.close(_CLOSE_NORMAL, reason)

    def machine_slept(self) -> None:
        """Take what was under way for dead, and count what was slept as waited for.

        Both ends of a link forget each other in a sleep that is long enough, and a keepalive would
        take its whole time to find out.
        """
        self._roused.set()
        if self._socket is not None:
            self._slept = True
            self._socket.abort()
        elif self._dialling is not None:
            self._slept = True
            self._dialling.cancel()

    async def _wait(self, delay: float) -> None:
        """Wait for the next attempt: ``delay`` seconds of the world's time, asleep or awake."""
        due = self._clock.boottime() + delay
        while (
            not self.is_closing and (remaining := due - self._clock.boottime()) > _SHORTEST_WAIT_S
        ):
            self._roused.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(remaining):
                    await self._roused.wait()

    # One connection.

    async def _connect_and_serve(self) -> _Lost:
        self.session.connecting()
        try:
            socket = await self._unless_closing(self._dial(self._options))
        except InvalidURI as exc:
            raise ConfigError(URL_KEY, "the URL cannot be used", "") from exc
        except ConfigError as exc:
            # The file of the token, perhaps just being written anew.
            lost = _Lost(str(exc))
        except (OSError, TimeoutError, InvalidHandshake) as exc:
            lost = self._explain(exc)
        except (InvalidProxy, ImportError, ValueError) as exc:
            # The text of a bad proxy may hold its password.
            problem = "the proxy of this environment cannot be used"
            raise ConfigError(URL_KEY, problem, "") from exc
        else:
            lost = await self._serve(socket) if socket is not None else _Lost("closing")
        finally:
            self.session.receive_closed()
        self.flush()
        return lost

    async def _unless_closing(self, dialling: Coroutine[Any, Any, Socket]) -> Socket | None:
        """The connection; None when ``close`` came first."""
        self._slept = False
        task = self._dialling = asyncio.ensure_future(dialling)
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({task, closing}, return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled() and self._slept:
                raise ConnectionAbortedError(_SLEPT)
            if task.done():
                return task.result()
            return None
        finally:
            self._dialling = None
            closing.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _serve(self, socket: Socket) -> _Lost:
        self._socket = socket
        self._slept = False
        self._refusal = None
        self._close_task = None
        self._outbox.clear()
        self._is_writer_busy = False
        self._policy.opened(self.now())
        self.session.connected(self.now())
        self.flush()
        tasks = [
            asyncio.ensure_future(part)
            for part in (self._read(socket), self._write(socket), self._keep_deadlines())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            if self._close_task is not None:
                await self._close_task
            # Ours to end, whoever began: a fault in a task must not leave it open.
            await socket.close()
            self._socket = None
            self._outbox.clear()
            self._outbox_empty.set()
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, ConnectionClosed):
                raise outcome
        code, reason = socket.close_code, socket.close_reason
        self.session.receive_closed(code, reason or "")
        if self._refusal is not None:
            return _Lost(str(self._refusal), self._options.refusal_delay, self._refusal)
        if self._slept:
            return _Lost(_SLEPT)
        return _Lost(f"closed with code {code}" + (f": {reason}" if reason else ""))

    async def _read(self, socket: Socket) -> None:
        while True:
            message = await socket.recv()
            self.session.receive(message, self.now())
            self.flush()

    def _write_out(self) -> None:
        """Write the outbox, or have the writer do it where that takes long."""
        self._writing = None
        if self._socket is None or not self._outbox:
            return
        is_short = sum(map(len, self._outbox)) <= _BATCH_CHARACTERS
        if not self._is_writer_busy and is_short and self._socket.send_now(self._outbox):
            self._outbox.clear()
            self._outbox_empty.set()
        else:
            self._is_writer_busy = True
            self._outbox_filled.set()

    async def _write(self, socket: Socket) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                batch = self._next_batch()
                if socket.send_now(batch):
                    # What follows, a ping perhaps, need not wait for all that is in the outbox.
                    await asyncio.sleep(0)
                else:
                    await socket.send_all(batch)
            self._is_writer_busy = False
            self._outbox_empty.set()

    def _next_batch(self) -> list[str]:
        """Take the first frame of the outbox, and short ones after it."""
        batch = [self._outbox.popleft()]
        room = _BATCH_CHARACTERS - len(batch[0])
        while self._outbox and len(self._outbox[0]) <= room:
            room -= len(self._outbox[0])
            batch.append(self._outbox.popleft())
        return batch

    async def _keep_deadlines(self) -> None:
        while True:
            self._armed = self.session.next_deadline()
            self._deadline_moved.clear()
            try:
                async with asyncio.timeout_at(self._armed):
                    await self._deadline_moved.wait()
            except TimeoutError:
                self.session.receive_timeout(self.now())
                self.flush()

    def _turn(self) -> bool:
        """One turn; returns whether it handed on events, which may have led to more."""
        events = self.session.events()
        frames = self.session.frames_to_send()
        if frames and self._socket is not None:
            self._outbox.extend(frames)
            self._outbox_empty.clear()
            if self._writing is None:
                # What is said until this turn of the loop ends goes out together.
                self._writing = asyncio.get_running_loop().call_soon(self._write_out)
        due = self.session.next_deadline()
        # A deadline that moved back costs one early wake-up instead of one for each frame.
        if due is not None and (self._armed is None or due < self._armed):
            self._deadline_moved.set()
        for event in events:
            self._note(event)
            self._handler(event)
        return bool(events)

    def _note(self, event: SessionEvent) -> None:
        """See to what concerns the connection itself."""
        match event:
            case SessionStarted():
                self._policy.heard()
            case RegistrationRefused(code=code, message=message):
                self._refusal = RegistrationFailed(code, message)
            case VersionRefused(theirs=theirs, ours=ours):
                self._refusal = VersionMismatch(theirs, ours)
            case CloseLink(code=status, reason=reason) if self._socket is not None:
                self._close_task = asyncio.ensure_future(self._socket.close(status, reason))

    def _explain(self, exc: Exception) -> _Lost:
        patience = self._options.refusal_delay
        if isinstance(exc, InvalidStatus):
            status = exc.response.status_code
            reason = f"the coordinator answered the handshake with HTTP {status}"
            # A header that comes twice is taken at its first.
            asked, date = (
                next(iter(exc.response.headers.get_all(name)), None)
                for name in ("Retry-After", "Date")
            )
            wait = retry_after(asked, date, self._clock.utc())
            if wait is not None:
                return _Lost(reason, wait)
            # Only a person can cure these; asking again at once never does.
            return _Lost(reason, patience if 300 <= status < 500 else 0.0)
        if isinstance(exc, ssl.SSLCertVerificationError):
            return _Lost(f"its certificate was refused: {exc.verify_message}", patience)
        if isinstance(exc, PinMismatch):
            return _Lost(str(exc), patience)
        if isinstance(exc, TimeoutError):
            return _Lost(f"no connection within {self._options.open_timeout:g} s")
        return _Lost(f"{exc}" or type(exc).__name__)
