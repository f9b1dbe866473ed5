from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import Any

import pytest
from hostile_links import Link, raw_server
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode

from ai4all.protocol import guarded_socket
from ai4all.protocol.guarded_socket import MAX_FRAGMENTS, GuardedConnection
from ai4all.protocol.steady_socket import PIECE


def guarded(url: str, **options: Any) -> connect:
    factory: Any = functools.partial(GuardedConnection, max_message=1 << 20)
    return connect(
        url, create_connection=factory, compression=None, proxy=None, ping_interval=None, **options
    )


async def test_a_message_in_many_pieces_is_whole() -> None:
    async def greet(link: Link) -> None:
        await link.write(link.frame(Opcode.TEXT, b"a", fin=False))
        for _ in range(MAX_FRAGMENTS - 2):
            await link.write(link.frame(Opcode.CONT, b"b", fin=False))
        await link.write(link.frame(Opcode.PING, b"between"))
        await link.write(link.frame(Opcode.CONT, b"c"))
        # The count begins anew with each message.
        await link.write(link.frame(Opcode.TEXT, b"next", fin=False))
        await link.write(link.frame(Opcode.CONT, b"!"))
        await link.closed()

    async with raw_server(greet) as url, guarded(url, close_timeout=0.1) as socket:
        assert await socket.recv() == "a" + "b" * (MAX_FRAGMENTS - 2) + "c"
        assert await socket.recv() == "next!"


async def test_a_message_in_too_many_pieces_ends_the_link() -> None:
    codes: list[int | None] = []

    async def greet(link: Link) -> None:
        await link.write(link.frame(Opcode.TEXT, b"", fin=False))
        await link.write(link.frame(Opcode.CONT, b"", fin=False) * MAX_FRAGMENTS)
        codes.append(await link.closed())

    async with raw_server(greet) as url, guarded(url, close_timeout=0.1) as socket:
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    assert codes == [1009]


async def test_who_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_socket, "MAX_UNREAD_BYTES", 1 << 16)
    cut_off_after: list[int] = []
    done = asyncio.Event()

    async def greet(link: Link) -> None:
        flood = link.frame(Opcode.PING, b"p" * 125) * 1000
        with contextlib.suppress(OSError):
            while link.sent < 256 << 20:
                await link.write(flood)
        cut_off_after.append(link.sent)
        done.set()

    async with raw_server(greet) as url, guarded(url) as socket:
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        await done.wait()
    assert cut_off_after[0] < 256 << 20


async def test_a_link_that_was_ended_is_not_held_open_by_the_other_side() -> None:
    gone = asyncio.Event()

    async def greet(link: Link) -> None:
        await link.write(b"\xf3\x02{}")
        assert await link.closed() == 1002
        # Says nothing, closes nothing; and still the link goes.
        with contextlib.suppress(OSError):
            while await link.reader.read(1024):
                pass
        gone.set()

    async with raw_server(greet) as url:
        async with guarded(url, close_timeout=0.2) as socket:
            with pytest.raises(ConnectionClosed):
                await socket.recv()
        await gone.wait()


async def test_short_messages_go_out_at_once_and_long_ones_in_turn() -> None:
    got: list[object] = []

    async def take(peer: ServerConnection) -> None:
        got.extend([await peer.recv() for _ in range(5)])

    async with serve(take, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with guarded(f"ws://127.0.0.1:{port}") as socket:
            assert isinstance(socket, GuardedConnection)
            assert socket.send_now(["one", "two"])
            long = "x" * (PIECE + 1)
            assert not socket.send_now(["short", long])
            await socket.send_all(["short", long])
            assert socket.send_now(["three"])
            while len(got) < 5:
                await asyncio.sleep(0.001)
            assert got == ["one", "two", "short", long, "three"]


async def test_nothing_goes_out_at_once_where_something_waits() -> None:
    async def never_read(link: Link) -> None:
        await asyncio.sleep(30)

    async with raw_server(never_read) as url:
        socket = await guarded(url, close_timeout=0.1)
        assert isinstance(socket, GuardedConnection)
        filling = asyncio.ensure_future(socket.send_all(["f" * PIECE] * 2048))
        while socket.transport.get_write_buffer_size() == 0:
            await asyncio.sleep(0.001)
        assert not socket.send_now(["three"])
        socket.abort()
        with pytest.raises(ConnectionClosed):
            await filling
        assert not socket.send_now(["after the end"])
