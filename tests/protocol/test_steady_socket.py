from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from chaos_proxy import Blow, ChaosProxy, Side, Weather
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from ai4all.protocol.steady_socket import SteadyConnection

LONG = "".join(chr(0x20 + n % 0x5F) if n % 7 else "\U0001f41d" for n in range(60_000))


@dataclass
class Peer:
    """A server that writes down what it gets."""

    messages: list[str] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    port: int = 0

    async def handle(self, socket: ServerConnection) -> None:
        take = socket.protocol.recv_frame

        def recv_frame(frame: Frame) -> None:
            self.frames.append(frame)
            take(frame)

        socket.protocol.recv_frame = recv_frame  # type: ignore[method-assign]
        with contextlib.suppress(ConnectionClosed):
            async for message in socket:
                assert isinstance(message, str)
                self.messages.append(message)


@asynccontextmanager
async def connected(
    weather: Weather | None = None, *, server_pings: float | None = None, **options: Any
) -> AsyncIterator[tuple[SteadyConnection, Peer]]:
    peer = Peer()
    async with serve(
        peer.handle,
        "127.0.0.1",
        0,
        compression=None,
        max_size=None,
        ping_interval=server_pings,
        ping_timeout=server_pings,
        close_timeout=0.2,
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with ChaosProxy(port, lambda: weather or Weather()) as proxy:
            socket = await connect(
                proxy.url,
                compression=None,
                proxy=None,
                create_connection=SteadyConnection,
                close_timeout=0.2,
                **options,
            )
            assert isinstance(socket, SteadyConnection)
            try:
                yield socket, peer
            finally:
                await socket.close()


async def test_a_long_message_goes_out_in_pieces_and_arrives_whole() -> None:
    async with connected() as (socket, peer):
        await socket.send("short")
        await socket.send(LONG)
        await socket.send("short again")
        while len(peer.messages) < 3:
            await asyncio.sleep(0.005)
    assert peer.messages == ["short", LONG, "short again"]
    opcodes = [frame.opcode for frame in peer.frames if frame.opcode is not Opcode.CLOSE]
    assert opcodes[:2] == [Opcode.TEXT, Opcode.TEXT]
    assert opcodes[-1] is Opcode.TEXT
    assert opcodes.count(Opcode.CONT) >= 3
    assert max(len(frame.data) for frame in peer.frames) <= 4 * 16 * 1024


async def test_a_slow_line_is_not_a_dead_one() -> None:
    message = LONG * 8
    # Three times as long as either side waits for an answer.
    weather = Weather(bytes_per_second=len(message.encode()) / 3.0)
    async with connected(weather, server_pings=1.0, ping_interval=0.3, ping_timeout=0.6) as (
        socket,
        peer,
    ):
        await socket.send(message)
        await socket.send("and on it goes")
        while len(peer.messages) < 2:
            await asyncio.sleep(0.005)
    assert peer.messages[0] == message
    assert {Opcode.PING, Opcode.PONG} <= {frame.opcode for frame in peer.frames}


@pytest.mark.parametrize("blow", [Blow.BLACK_HOLE, Blow.STALL])
async def test_a_dead_line_is_noticed(blow: Blow) -> None:
    weather = Weather(blow=blow, side=Side.CLIENT, after=2000)
    async with connected(weather, ping_interval=0.1, ping_timeout=0.2) as (socket, peer):
        await socket.send("x" * 3000)
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    assert peer.messages == []


async def test_a_dead_line_is_noticed_while_every_buffer_is_full() -> None:
    weather = Weather(blow=Blow.STALL, side=Side.CLIENT, after=2000)
    async with connected(weather, ping_interval=0.1, ping_timeout=0.2) as (socket, _):
        # More than any of the buffers between here and there takes: this waits for the line.
        sending = asyncio.create_task(socket.send("x" * 30_000_000))
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        with pytest.raises(ConnectionClosed):
            await sending


async def test_a_line_that_ends_while_an_answer_is_awaited_ends_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weather = Weather(blow=Blow.RST, side=Side.SERVER, after=300)
    async with connected(weather, ping_interval=0.01, ping_timeout=5.0) as (socket, _):
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
