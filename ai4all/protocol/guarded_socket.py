"""A client's WebSocket that a hostile server can neither fill nor keep.

The library bounds the size of a message. This bounds what is left: pieces of a message without
content, answers to pings that the other side never reads, and a link that was ended here but that
the other side does not let go. It says nothing to a server whose key is not one of those pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State

from ai4all.protocol.pins import check_pin
from ai4all.protocol.steady_socket import PIECE, SteadyConnection

__all__ = ["GuardedConnection"]

MAX_FRAGMENTS: Final = 4096
"""Pieces that a message may come in. A megabyte in Ethernet's frames takes seven hundred."""

MAX_UNREAD_BYTES: Final = 4 << 20
"""Bytes that may wait for the server to read them, beside one message of ours."""


class GuardedConnection(SteadyConnection):
    """A ``SteadyConnection`` with more limits.

    Args:
        max_message: Bytes of the longest message that we send.
        pins: The public keys that the server may have; empty: any.
        arguments: Those of ``ClientConnection``.
    """

    def __init__(
        self,
        *arguments: Any,
        max_message: int,
        pins: frozenset[bytes] = frozenset(),
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._pins = pins
        self._max_unread = max_message + MAX_UNREAD_BYTES
        self._fragments = 0
        self._is_ending = False

    async def handshake(self, *arguments: Any, **more: Any) -> None:
        """Look at the server's key, and only then send the request with the token in it.

        Raises:
            PinMismatch: It has another key.
        """
        if self._pins:
            check_pin(self.transport.get_extra_info("ssl_object"), self._pins)
        await super().handshake(*arguments, **more)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the server, and see that they ask for nothing without end."""
        super().data_received(data)
        # Whoever floods us with pings and reads no pong would have us keep them all.
        if self.transport.get_write_buffer_size() > self._max_unread:
            self.transport.abort()
        elif self.protocol.state is State.CLOSING and not self._is_ending:
            self._is_ending = True
            if self.close_timeout is not None:
                self.loop.call_later(self.close_timeout, self.transport.abort)

    def process_event(self, event: Request | Response | Frame) -> None:
        """Hand on a frame, unless its message has too many."""
        if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments = 0 if event.fin else self._fragments + 1
            if self._fragments == MAX_FRAGMENTS:
                self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
                self.send_data()
        super().process_event(event)

    def send_now(self, messages: Sequence[str]) -> bool:
        """Write messages in one piece; returns whether that could be done without waiting."""
        if (
            self.state is not State.OPEN
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size() > 0
            or any(len(message) > PIECE for message in messages)
        ):
            return False
        for message in messages:
            self.protocol.send_text(message.encode("utf-8"))
        # Frames of one moment together: a system call and a packet less for each.
        self.transport.write(b"".join(self.protocol.data_to_send()))
        return True

    async def send_all(self, messages: Sequence[str]) -> None:
        """Write messages one after the other; waits while the buffer is full."""
        for message in messages:
            await self.send(message)

    def abort(self) -> None:
        """Drop the connection at once, without a word."""
        self.transport.abort()
