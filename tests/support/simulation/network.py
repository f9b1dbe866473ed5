"""Connections between workers and the coordinator, with what networks do to them.

A connection carries messages in order and without loss until it ends, as TCP does. What can go
wrong: it is cut, and what is under way is lost from some message on, in each direction for itself;
it goes deaf, and whatever is sent vanishes until a side loses patience; it is slow. What was sent
on an old connection may arrive after the new one was opened.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.http11 import Response

from ai4all.protocol.dialing import LinkOptions
from simulation.history import Kind, Record

if TYPE_CHECKING:
    from simulation.machine import Life
    from simulation.world import Plan, World

_GONE: Final = 1006
_NO_PONG: Final = 1011

# What the kernel's buffers hold of a connection that is stuck, in messages.
_BUFFER: Final = 64


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a handshake ends that does not succeed: an HTTP status, or none for a bare refusal."""

    status: int | None = None
    retry_after: int | None = None


class Listener(Protocol):
    """What the coordinator does about connections."""

    def refusal(self) -> Refusal | None:
        """How a handshake is refused now; None when it succeeds."""

    def opened(self, link: Link) -> None:
        """A connection was made."""

    def heard(self, link: Link, frame: str) -> None:
        """A message came."""

    def ended(self, link: Link, reason: str) -> None:
        """A connection is gone."""


class Network:
    """All connections.

    Attributes:
        slowness: Factor on the time that a message takes.
        is_lost: Nothing gets through to the coordinator; handshakes time out.
        links: Connections that are open on either side.
        heartbeat_s: What the coordinator asks for.
    """

    def __init__(
        self,
        world: World,
        listener: Listener,
        history: Callable[[Record], None],
        heartbeat_s: float,
    ) -> None:
        self.slowness = 1.0
        self.heartbeat_s = heartbeat_s
        self.is_lost = False
        self.links: list[Link] = []
        self.world = world
        self.listener = listener
        self.history = history
        self._rng = world.chance("network")
        self._number = 0

    def latency(self) -> float:
        """How long the next message takes."""
        return self._rng.uniform(0.001, 0.06) * self.slowness

    def survivors(self, count: int) -> int:
        """How many of the messages under way still arrive when a connection is cut."""
        return self._rng.randint(0, count)

    async def dial(self, life: Life, options: LinkOptions) -> Link:
        """Connect a worker; ``functools.partial`` of it is the worker's ``dial``."""
        await asyncio.sleep(self.latency())
        if self.is_lost:
            life.note("dials into the void")
            await asyncio.sleep(options.open_timeout)
            raise TimeoutError
        refusal = self.listener.refusal()
        if refusal is not None:
            life.note(f"is refused with {refusal.status or 'a reset'}")
            if refusal.status is None:
                raise ConnectionRefusedError(111, "Connection refused")
            headers = Headers()
            if refusal.retry_after is not None:
                headers["Retry-After"] = str(refusal.retry_after)
            raise InvalidStatus(Response(refusal.status, "", headers))
        self._number += 1
        link = Link(self, life, options, self._number)
        self.links.append(link)
        life.note(f"connects as {link.name}")
        link.to_coordinator.carry(lambda: self.listener.opened(link))
        return link


class Direction:
    """One direction of a connection: what is sent comes out in order, or not at all."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._under_way: deque[Plan] = deque()
        self._last = 0.0
        self.is_dead = False

    @property
    def is_stuck(self) -> bool:
        """Whether the buffers are full."""
        self._tidy()
        return len(self._under_way) >= _BUFFER

    def carry(self, arrive: Callable[[], None]) -> None:
        """Let a message arrive, unless it gets lost."""
        if self.is_dead:
            return
        world = self._network.world
        self._last = max(world.now + self._network.latency(), self._last)
        self._tidy()
        self._under_way.append(world.at(self._last, arrive))

    def cut(self) -> float:
        """Lose what is under way from some message on.

        Returns:
            When the last of what is left arrives.
        """
        self.is_dead = True
        self._tidy()
        keep = self._network.survivors(len(self._under_way))
        for plan in list(self._under_way)[keep:]:
            plan.call_off()
        if keep < len(self._under_way):
            self._last = 0.0 if keep == 0 else self._last
        return max(self._last, self._network.world.now)

    def _tidy(self) -> None:
        while self._under_way and self._under_way[0].is_over:
            self._under_way.popleft()


class Link:
    """One connection. The worker holds it as its socket, the coordinator by ``say``."""

    def __init__(self, network: Network, life: Life, options: LinkOptions, number: int) -> None:
        self.life = life
        self.name = f"link {number}"
        self.to_worker = Direction(network)
        self.to_coordinator = Direction(network)
        self.is_open_at_coordinator = True
        self._network = network
        self._options = options
        self._opened_at = life.loop.time()
        self._inbox: deque[tuple[str, str | None]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._end: tuple[int, str] | None = None
        self._is_closing = False
        self._closed: asyncio.Future[None] = life.loop.create_future()

    # The worker's side: ``ai4all.protocol.connection.Socket``.

    @property
    def close_code(self) -> int | None:
        return None if self._end is None else self._end[0]

    @property
    def close_reason(self) -> str | None:
        return None if self._end is None else self._end[1]

    async def recv(self) -> str | bytes:
        while not self._inbox:
            if self._end is not None:
                raise self._closed_error()
            self._reader = self.life.loop.create_future()
            await self._reader
        frame, acknowledged = self._inbox.popleft()
        if acknowledged is not None:
            self._network.history(
                Record(self._network.world.now, Kind.ACKNOWLEDGED, self.life.name, acknowledged)
            )
        return frame

    def send_now(self, messages: Sequence[str]) -> bool:
        if self._end is not None or self._is_closing or self.to_coordinator.is_stuck:
            return False
        self._send(messages)
        return True

    async def send_all(self, messages: Sequence[str]) -> None:
        while self._end is None and not self._is_closing and self.to_coordinator.is_stuck:
            await asyncio.sleep(0.05)
        if self._end is not None or self._is_closing:
            raise self._closed_error()
        self._send(messages)

    def _send(self, messages: Sequence[str]) -> None:
        for message in messages:
            self.life.sent(self, message)
            self.to_coordinator.carry(functools.partial(self._arrived, message))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if self._end is not None:
            return
        if not self._is_closing:
            self._is_closing = True
            self.to_coordinator.carry(lambda: self._closed_by_worker(code, reason))
        try:
            async with asyncio.timeout(self._options.close_timeout):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self._ended(_GONE, "")

    def abort(self) -> None:
        self._ended(_GONE, "")

    # The coordinator's side.

    def say(self, frame: str, acknowledged: str | None = None) -> None:
        """Send a message; ``acknowledged`` names the block that it acknowledges."""
        if self.is_open_at_coordinator:
            self.to_worker.carry(lambda: self._delivered(frame, acknowledged))

    def close_by_coordinator(self, code: int, reason: str) -> None:
        """Close politely."""
        if not self.is_open_at_coordinator:
            return
        self.to_worker.carry(lambda: self._ended(code, reason))
        self._gone_at_coordinator(f"closed with {code}")

    # What the network does.

    def cut(self) -> None:
        """End, with a loss of what is under way; both sides notice."""
        world = self._network.world
        world.at(self.to_worker.cut(), lambda: self._ended(_GONE, ""))
        world.at(self.to_coordinator.cut(), lambda: self._gone_at_coordinator("cut"))

    def go_deaf(self, to_worker: bool, to_coordinator: bool) -> None:
        """Let everything vanish from now on in one direction or both; nobody is told.

        The worker's keepalive finds out: neither a ping nor its answer comes through.
        """
        self.to_worker.is_dead |= to_worker
        self.to_coordinator.is_dead |= to_coordinator
        now = self.life.loop.time()
        interval = self._options.ping_interval
        pings = math.floor((now - self._opened_at) / interval) + 1
        next_ping = self._opened_at + pings * interval
        self.life.loop.call_at(next_ping + self._options.ping_timeout, self._no_pong)

    def die_with_worker(self, power: bool) -> None:
        """The worker's process is gone; without power nobody says so."""
        self._end = (_GONE, "")
        if power:
            self.to_coordinator.is_dead = self.to_worker.is_dead = True
            self._network.links.remove(self)
            return
        self.to_worker.is_dead = True
        self.to_coordinator.carry(lambda: self._gone_at_coordinator("the worker is gone"))
        self._drop()

    def _no_pong(self) -> None:
        self._ended(_NO_PONG, "keepalive ping timeout")

    def _arrived(self, frame: str) -> None:
        if self.is_open_at_coordinator:
            self._network.listener.heard(self, frame)

    def _closed_by_worker(self, code: int, reason: str) -> None:
        self.to_worker.carry(lambda: self._ended(code, reason))
        self._gone_at_coordinator(reason)

    def _delivered(self, frame: str, acknowledged: str | None) -> None:
        if self._end is None and not self.life.is_dead:
            self._inbox.append((frame, acknowledged))
            self._wake()

    def _ended(self, code: int, reason: str) -> None:
        """The worker's side has ended."""
        if self._end is not None or self.life.is_dead:
            return
        self._end = (code, reason)
        self.life.note(f"loses {self.name} with {code}")
        if not self._closed.done():
            self._closed.set_result(None)
        self._wake()
        # A side that gave up sends nothing any more, and hears nothing.
        self.to_worker.is_dead = True
        self.to_coordinator.carry(lambda: self._gone_at_coordinator("the worker closed"))
        self._drop()

    def _gone_at_coordinator(self, reason: str) -> None:
        if self.is_open_at_coordinator:
            self.is_open_at_coordinator = False
            self._network.listener.ended(self, reason)
            self._drop()

    def _drop(self) -> None:
        is_over = self._end is not None and not self.is_open_at_coordinator
        if is_over and self in self._network.links:
            self._network.links.remove(self)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _closed_error(self) -> ConnectionClosedOK | ConnectionClosedError:
        if self._end is not None and self._end[0] in (1000, 1001):
            return ConnectionClosedOK(None, None)
        return ConnectionClosedError(None, None)
