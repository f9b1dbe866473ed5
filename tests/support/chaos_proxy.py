"""A TCP proxy on loopback that does to a connection what networks do.

Between a client and one server, for each connection as its ``Weather`` says: delays that vary, a
narrow line, small pieces, and at a certain byte of one direction a blow: an end (FIN), a reset
(RST), half an end, or silence. Nothing is random in here: who draws the weather has the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

__all__ = ["Blow", "ChaosProxy", "Link", "Side", "Weather", "draw_weather"]

_CHUNK = 16 * 1024

# A line holds little: what it has not carried yet waits at its sender's.
_RECEIVE_BUFFER = 4096
_LINGER_ZERO = struct.pack("ii", 1, 0)


class Side(enum.Enum):
    """Who speaks: the bytes of a direction are named after their sender."""

    CLIENT = "client"
    SERVER = "server"


class Blow(enum.Enum):
    """What may befall a connection."""

    FIN = "fin"
    """Both ends are told that there is no more."""
    RST = "rst"
    """Both ends are told that the connection never was; what is under way is lost."""
    HALF_CLOSE = "half-close"
    """One direction ends, the other goes on."""
    BLACK_HOLE = "black hole"
    """Nothing passes any more, and nobody is told. The proxy takes bytes and drops them."""
    STALL = "stall"
    """As a black hole, but bytes are not even taken: the senders' buffers fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a connection goes through.

    Attributes:
        blow: What ends it, if anything does.
        side: Whose bytes are counted for that.
        after: How many of them pass before it. With 0 not one does.
        latency: Seconds that each piece is late, either way.
        jitter: Up to so many seconds more, drawn for each piece; order is kept.
        bytes_per_second: Width of the line, either way; None is as wide as it gets.
        piece: Most bytes that are passed on at once.
        seed: Of what is drawn for each piece.
    """

    blow: Blow | None = None
    side: Side = Side.CLIENT
    after: int = 0
    latency: float = 0.0
    jitter: float = 0.0
    bytes_per_second: float | None = None
    piece: int = _CHUNK
    seed: int = 0


CALM = Weather()


def draw_weather(
    rng: random.Random, blows: tuple[Blow, ...], *, client_bytes: int, server_bytes: int
) -> Weather:
    """Bad weather: a blow at any byte of either direction, on a line that may be slow or odd."""
    side = rng.choice(list(Side))
    odd = rng.random()
    return Weather(
        blow=rng.choice(blows),
        side=side,
        after=rng.randrange(client_bytes if side is Side.CLIENT else server_bytes),
        latency=0.002 if odd < 0.2 else 0.0,
        jitter=0.004 if odd < 0.1 else 0.0,
        bytes_per_second=200_000.0 if 0.2 <= odd < 0.3 else None,
        piece=rng.randint(1, 64) if 0.3 <= odd < 0.5 else _CHUNK,
        seed=rng.randrange(1 << 30),
    )


@dataclass(slots=True)
class Link:
    """One connection and what has become of it.

    Attributes:
        weather: What it goes through.
        passed: Bytes that were passed on, by their sender.
        struck_at: Loop time of the blow; None while it has not fallen.
        ordered: A blow that is to fall now, whatever the weather.
    """

    weather: Weather
    passed: Counter[Side] = field(default_factory=Counter)
    struck_at: float | None = None
    ordered: asyncio.Future[Blow] = field(default_factory=asyncio.Future)

    @property
    def was_struck(self) -> bool:
        """Whether the blow has fallen."""
        return self.struck_at is not None


class _Struck(Exception):
    """The blow falls now."""


class ChaosProxy:
    """Listens on loopback while the context is open.

    Args:
        port: The server's.
        weather: Gives each new connection its weather. May be set anew.

    Attributes:
        port: Ours.
        links: All connections there have been.
    """

    def __init__(self, port: int, weather: Callable[[], Weather] = lambda: CALM) -> None:
        self.weather = weather
        self.links: list[Link] = []
        self.port = 0
        self._target = port
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where a client connects."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def blows(self) -> Counter[Blow]:
        """The blows that have fallen, by kind."""
        return Counter(link.weather.blow for link in self.links if link.was_struck)

    def strike(self, blow: Blow) -> None:
        """Let a blow fall on every connection that is open."""
        for link in self.links:
            if not link.ordered.done():
                link.ordered.set_result(blow)

    async def __aenter__(self) -> Self:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=1024)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self.weather())
        self.links.append(link)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._target, limit=1024)
        except OSError:
            _reset(writer)
            return
        ends = {Side.CLIENT: (reader, writer), Side.SERVER: upstream}
        try:
            async with asyncio.TaskGroup() as group:
                order = group.create_task(_obey(link))
                pumps = []
                for sender, receiver in ((Side.CLIENT, Side.SERVER), (Side.SERVER, Side.CLIENT)):
                    pump = _pump(link, sender, ends[sender][0], ends[receiver][1])
                    pumps.append(group.create_task(pump))
                await asyncio.wait(pumps)
                order.cancel()
        except* _Struck:
            await _strike(link.weather.blow, ends)
        except* (OSError, EOFError):
            pass  # One of them has gone by itself.
        finally:
            for _, end in ends.values():
                _reset(end) if link.weather.blow is Blow.RST else end.close()


async def _obey(link: Link) -> None:
    blow = await asyncio.shield(link.ordered)
    link.weather = replace(link.weather, blow=blow)
    link.struck_at = asyncio.get_running_loop().time()
    raise _Struck


async def _pump(
    link: Link, sender: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Carry one direction to its end."""
    weather, rng = link.weather, random.Random(f"{link.weather.seed} {sender}")
    left = weather.after if weather.blow is not None and weather.side is sender else None
    loop, due = asyncio.get_running_loop(), 0.0
    while True:
        if left == 0:
            link.struck_at = loop.time()
            if weather.blow is not Blow.HALF_CLOSE:
                raise _Struck
            writer.write_eof()
            while await reader.read(_CHUNK):
                pass
            return
        chunk = await reader.read(min(weather.piece, left if left is not None else _CHUNK))
        if not chunk:
            writer.write_eof()
            return
        delay = weather.latency + rng.random() * weather.jitter
        if weather.bytes_per_second is not None:
            delay += len(chunk) / weather.bytes_per_second
        due = max(due, loop.time() + delay)
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        writer.write(chunk)
        await writer.drain()
        link.passed[sender] += len(chunk)
        if left is not None:
            left -= len(chunk)


async def _strike(
    blow: Blow | None, ends: dict[Side, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
) -> None:
    match blow:
        case Blow.RST:
            for _, writer in ends.values():
                _reset(writer)
        case Blow.BLACK_HOLE:
            # Until both have given up by themselves.
            await asyncio.gather(*(_swallow(reader) for reader, _ in ends.values()))
        case Blow.STALL:
            await asyncio.Event().wait()


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(_CHUNK):
            pass


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    writer.transport.abort()
