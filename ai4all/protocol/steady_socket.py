"""The WebSocket of a worker, on lines as people have them.

Two things are done otherwise than by the library. A long message goes out in pieces, between which
pings and their answers pass, and little of it waits in the system's buffers; so a slow line is not
taken for a dead one, by either side. And a line is dead when neither the answer to a ping came nor
a piece left for as long as the answer may take, also when every buffer is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

__all__ = ["PIECE", "SteadyConnection"]

PIECE: Final = 16 * 1024
"""Characters. What is shorter goes out whole; a ping waits behind this and the next at most."""

# Bytes that the system may hold without having sent them.
_UNSENT_BYTES: Final = 32 * 1024


class SteadyConnection(ClientConnection):
    """A client's connection; made by ``websockets.connect(create_connection=SteadyConnection)``."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the system's buffer short, where it lets us."""
        super().connection_made(transport)
        self._moved_at = self.loop.time()
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        wire = transport.get_extra_info("socket")
        if option is not None and wire is not None:
            with contextlib.suppress(OSError):
                wire.setsockopt(socket.IPPROTO_TCP, option, _UNSENT_BYTES)

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send a message, a long text in pieces.

        Raises:
            ConnectionClosed: It cannot be sent any more.
        """
        if isinstance(message, str) and len(message) > PIECE:
            message = self._pieces(message)
        await super().send(message, text=text)

    def _pieces(self, message: str) -> Iterator[str]:
        for start in range(0, len(message), PIECE):
            yield message[start : start + PIECE]
            # The library asks for the next when this one has left.
            self._moved_at = self.loop.time()

    async def keepalive(self) -> None:
        """Ping at intervals; cut a line that is dead. The library runs this as a task."""
        assert self.ping_interval is not None
        assert self.ping_timeout is not None
        while True:
            await asyncio.sleep(self.ping_interval)
            answer = asyncio.ensure_future(self._answered())
            try:
                if not await self._comes(answer, self.ping_timeout):
                    # Nobody is there for a closing handshake.
                    self.transport.abort()
                    return
            finally:
                answer.cancel()

    async def _answered(self) -> None:
        # A line that is lost meanwhile is the reader's news.
        with contextlib.suppress(ConnectionClosed):
            await (await self.ping())

    async def _comes(self, answer: asyncio.Future[None], patience: float) -> bool:
        """Whether the answer comes in time, counted anew from each piece that leaves."""
        asked_at = self.loop.time()
        while not answer.done():
            left = max(asked_at, self._moved_at) + patience - self.loop.time()
            if left <= 0.0:
                return False
            await asyncio.wait({answer}, timeout=left)
        return True
