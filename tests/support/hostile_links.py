"""Coordinators that attack the socket itself, and what a real worker process makes of them.

Each attack is a coordinator of its own: it greets a worker as a good one does, measures it,
attacks, and waits for the link to end. Then it greets the worker once more: one that comes back
has lived.
The worker is ``ai4all-native worker`` over a scripted engine, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
import time
import zlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from command_line import fake_command
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

__all__ = ["ATTACKS", "Link", "MAX_GROWTH_MIB", "Survival", "attack_all", "raw_server", "survive"]

MAX_GROWTH_MIB: Final = 32
"""Most that a worker may grow under attack."""

_MIB: Final = 1024 * 1024
_PATIENCE_S: Final = 60.0
_SAMPLE_S: Final = 0.01

_WELCOME = (
    '{"type":"Registered","session_id":"s","heartbeat_interval_ms":60000}',
    '{"type":"NoWork","retry_after_ms":3600000}',
)


@dataclass(frozen=True, slots=True)
class Survival:
    """What an attack did to a worker.

    Attributes:
        attack: Its name.
        sent_mib: What was sent, in MiB.
        closed: Whether the worker ended the link, where the attack calls for that.
        close_code: With which code, or None when it just cut it.
        growth_mib: How much its resident memory grew at most, in MiB.
        lives: Whether it came back afterwards, the same process.
        seconds: How long it took until the link was at an end.
    """

    attack: str
    sent_mib: float
    closed: bool
    close_code: int | None
    growth_mib: float
    lives: bool
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether the goal is met."""
        return self.closed and self.lives and self.growth_mib <= MAX_GROWTH_MIB

    def __str__(self) -> str:
        ended = f"closed with {self.close_code}" if self.close_code else "cut"
        return (
            f"{self.attack}: {self.sent_mib:.1f} MiB sent, "
            f"{ended if self.closed else 'NOT closed'} after {self.seconds:.2f} s, "
            f"grew by {self.growth_mib:.1f} MiB, {'lives' if self.lives else 'DEAD'}"
        )


@dataclass
class Link:
    """One connection of the worker, as raw as it gets."""

    protocol: ServerProtocol
    reader: StreamReader
    writer: StreamWriter
    sent: int = 0

    async def closed(self) -> int | None:
        """Read until the worker ends the link: the code of its close frame, if it sent one."""
        with contextlib.suppress(OSError):
            while self.protocol.close_rcvd is None and (data := await self.reader.read(65_536)):
                self.protocol.receive_data(data)
                self.protocol.events_received()
                self.protocol.data_to_send()
        return self.protocol.close_rcvd.code if self.protocol.close_rcvd is not None else None

    def frame(self, opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
        """A frame as the wire has it."""
        return Frame(opcode, data, fin=fin).serialize(mask=False)

    async def write(self, data: bytes) -> None:
        """Write, and wait for the worker to take it.

        Raises:
            OSError: The worker has closed the link.
        """
        self.writer.write(data)
        self.sent += len(data)
        await self.writer.drain()

    async def text(self, *messages: str) -> None:
        """Send text messages."""
        await self.write(b"".join(self.frame(Opcode.TEXT, m.encode()) for m in messages))


Attack = Callable[[Link], Awaitable[None]]


@functools.cache
def _packed() -> bytes:
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = b"\0" * _MIB
    packed = b"".join(deflate.compress(block) for _ in range(256))
    return packed + deflate.flush(zlib.Z_SYNC_FLUSH).removesuffix(b"\0\0\xff\xff")


async def deflate_bomb(link: Link) -> None:
    """256 MiB of zeros that nobody agreed to have compressed, a thousand to one."""
    frame = bytearray(link.frame(Opcode.TEXT, _packed()))
    frame[0] |= 0x40  # "compressed"
    await link.write(bytes(frame))


async def nesting_bombs(link: Link) -> None:
    """Messages of the largest size, all brackets."""
    bombs = ("[" * _MIB, '{"a":' * (_MIB // 5), '[{"":' * (_MIB // 5))
    for number in range(300):
        await link.text(bombs[number % len(bombs)])


async def endless_fragments(link: Link) -> None:
    """One message that never ends, in large pieces."""
    await link.write(link.frame(Opcode.TEXT, b'"', fin=False))
    piece = link.frame(Opcode.CONT, b"y" * 65_536, fin=False)
    while link.sent < 1024 * _MIB:
        await link.write(piece)


async def empty_fragments(link: Link) -> None:
    """One message that never ends and never grows."""
    await link.write(link.frame(Opcode.TEXT, b"", fin=False))
    pieces = link.frame(Opcode.CONT, b"", fin=False) * 10_000
    for _ in range(1000):
        await link.write(pieces)


async def tiny_frames(link: Link) -> None:
    """Ten thousand messages that say nothing."""
    await link.write(link.frame(Opcode.TEXT, b"{}") * 10_000)


async def wrong_utf8(link: Link) -> None:
    """Text that is no text."""
    await link.write(link.frame(Opcode.TEXT, b'{"type":"\xff\xfe"}'))


async def huge_length(link: Link) -> None:
    """A message that says to have more bytes than there are."""
    await link.write(b"\x81\x7f" + (1 << 62).to_bytes(8, "big"))


async def reserved_bits(link: Link) -> None:
    """Opcodes and bits that nobody has defined."""
    await link.write(b"\xf3\x02{}")


async def ping_flood(link: Link) -> None:
    """Pings without end from somebody who never reads a pong."""
    flood = link.frame(Opcode.PING, b"p" * 125) * 1000
    while link.sent < 256 * _MIB:
        await link.write(flood)


ATTACKS: Final[dict[str, Attack]] = {
    "deflate bomb": deflate_bomb,
    "nesting bombs": nesting_bombs,
    "endless fragments": endless_fragments,
    "empty fragments": empty_fragments,
    "10k tiny frames": tiny_frames,
    "ping flood": ping_flood,
    "wrong UTF-8": wrong_utf8,
    "huge length": huge_length,
    "reserved bits": reserved_bits,
}


@contextlib.asynccontextmanager
async def raw_server(
    greet: Callable[[Link], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that does the handshake and then leaves the link to ``greet``."""
    tasks: set[asyncio.Task[None]] = set()

    async def on_connection(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            protocol = ServerProtocol()
            while not (events := protocol.events_received()):
                protocol.receive_data(await reader.read(65_536))
            request = events[0]
            assert isinstance(request, Request)
            protocol.send_response(protocol.accept(request))
            writer.write(b"".join(protocol.data_to_send()))
            await greet(Link(protocol, reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0, limit=1 << 16)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def survive(name: str, folder: Path, tiny_model: Path, *, lets_go: bool = False) -> Survival:
    """Let a worker meet one attack.

    Args:
        name: One of ``ATTACKS``.
        folder: An empty one, for the worker.
        tiny_model: A model that it can claim to have.
        lets_go: Whether this side closes a link that the worker has ended. If not, the worker
            has to get rid of it alone, which takes it its patience.

    Raises:
        TimeoutError: The worker did not come.
    """
    attack = ATTACKS[name]
    if attack is deflate_bomb:
        _packed()  # Takes a while, and not of the worker's time.
    links = 0
    attacked: asyncio.Future[tuple[float, int | None, float]]
    attacked = asyncio.get_running_loop().create_future()
    back = asyncio.Event()
    grown = 0.0
    sent = 0

    async def greet(link: Link) -> None:
        nonlocal links, sent, grown
        links += 1
        if links > 1:
            await link.text(*_WELCOME)
            back.set()
            await link.reader.read()
            return
        await link.text(*_WELCOME)
        # It has settled when nothing more comes.
        with contextlib.suppress(TimeoutError):
            while True:
                link.protocol.receive_data(await asyncio.wait_for(link.reader.read(65_536), 0.3))
        peak = _Peak(process.pid)
        started = time.monotonic()
        # Who floods does not read: what the worker wants to say stays with it.
        reads = attack is not ping_flood
        closed = asyncio.ensure_future(link.closed()) if reads else None
        with contextlib.suppress(OSError):
            await attack(link)
        code = await (closed or link.closed())
        attacked.set_result((time.monotonic() - started, code, peak.growth()))
        sent = link.sent
        if not lets_go:
            await back.wait()

    async with raw_server(greet) as url:
        process = await _start_worker(folder, tiny_model, url)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                closed, code, seconds = True, None, _PATIENCE_S
                try:
                    seconds, code, grown = await asyncio.wait_for(
                        asyncio.shield(attacked), _PATIENCE_S / 2
                    )
                except TimeoutError:
                    closed = False
                if closed:
                    await back.wait()
            lives = process.returncode is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return Survival(name, sent / _MIB, closed, code, grown, lives, seconds)


class _Peak:
    """How much the resident memory of a process grows, at most."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._most = self._process.memory_info().rss
        self._status = Path(f"/proc/{pid}/status")
        # Where the system keeps a peak, none is missed between two looks: it begins here.
        self._has_peak = _reset_peak(pid)
        self._sampling = asyncio.ensure_future(self._sample())

    async def _sample(self) -> None:
        with contextlib.suppress(psutil.Error):
            while True:
                self._most = max(self._most, self._process.memory_info().rss)
                await asyncio.sleep(_SAMPLE_S)

    def growth(self) -> float:
        """MiB since the beginning."""
        self._sampling.cancel()
        if self._has_peak:
            with contextlib.suppress(OSError):
                for line in self._status.read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self._most = max(self._most, int(line.split()[1]) * 1024)
        return (self._most - self._before) / _MIB


def _reset_peak(pid: int) -> bool:
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


async def _start_worker(folder: Path, tiny_model: Path, url: str) -> asyncio.subprocess.Process:
    """A worker, with settings of its own only."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AI4ALL_")}
    environment |= {
        "AI4ALL_DATA_DIR": str(folder),
        "AI4ALL_COORDINATOR_RECONNECT_INTERVAL_MS": "100",
        "AI4ALL_MODELS_BENCHMARK_SOURCE": f"file:{tiny_model}",
        "AI4ALL_MODELS_DISK_RESERVE_MB": "0",
    }
    return await asyncio.create_subprocess_exec(
        *fake_command("worker", "--coordinator", url),
        cwd=folder.parent,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


def attack_all(
    advance: Callable[[], None], names: Sequence[str] = tuple(ATTACKS)
) -> list[Survival]:
    """Run every attack, one after the other."""
    from tiny_gguf import write_tiny_gguf

    survivals = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            tiny = write_tiny_gguf(Path(folder) / "tiny.gguf")
            data = Path(folder) / "data"
            survivals.append(asyncio.run(survive(name, data, tiny)))
        advance()
    return survivals
