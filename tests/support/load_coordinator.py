"""The coordinator's side of the control plane's benches, in a process of its own.

It does as little as it can, so that it is not what is measured: frames are written beforehand, a
result is searched for two words and not parsed, and a worker that asks while nothing is queued gets
its answer when something is. Orders come as JSON lines on standard input, one at a time: so many
tasks of such an input. The answer to each goes to standard output once every task of it has been
acknowledged.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import Any

import ujson
from websockets.asyncio.server import ServerConnection, serve

MODEL_ID = "benchmark"

_BLOCK_ID = '"block_id":"'
_ENVELOPE = {
    "id": "00000000-0000-4000-8000-000000000000",
    "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    "version": {"major": 1, "minor": 0, "patch": 0},
}


def frame(kind: str, **fields: Any) -> str:
    return ujson.dumps({"type": kind, **fields, **_ENVELOPE}, escape_forward_slashes=False)


class StampedConnection(ServerConnection):
    """Knows when bytes last came out of its socket and last went into it."""

    received_at = 0.0
    sent_at = 0.0

    def data_received(self, data: bytes) -> None:
        self.received_at = time.perf_counter()
        super().data_received(data)

    def send_data(self) -> None:
        self.sent_at = time.perf_counter()
        super().send_data()


class LoadCoordinator:
    """Serves one worker."""

    def __init__(self) -> None:
        self.queued: deque[tuple[str, str]] = deque()
        self.requests = 0
        self.given: dict[str, float] = {}
        self.sent: dict[str, float] = {}
        self.acknowledgements: dict[str, str] = {}
        self.seconds: list[float] = []
        self.socket_seconds: list[float] = []
        self.failed = 0
        self.done = asyncio.Event()
        self.socket: StampedConnection | None = None

    async def handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, StampedConnection)
        socket = connection
        async for message in socket:
            assert isinstance(message, str)
            if message.startswith('{"type":"SubmitResult"'):
                await self.take(socket, message)
            elif message.startswith('{"type":"RequestWork"'):
                self.requests += 1
                await self.give(socket)
            elif message.startswith('{"type":"Register"'):
                offered = ujson.loads(message)["extensions"]
                await socket.send(
                    frame(
                        "Registered",
                        session_id="s",
                        heartbeat_interval_ms=10_000,
                        extensions=offered,
                    )
                )
                self.socket = socket

    async def give(self, socket: StampedConnection) -> None:
        while self.requests and self.queued:
            self.requests -= 1
            block_id, assignment = self.queued.popleft()
            self.given[block_id] = time.perf_counter()
            await socket.send(assignment)
            self.sent[block_id] = socket.sent_at

    async def take(self, socket: StampedConnection, message: str) -> None:
        now = time.perf_counter()
        start = message.index(_BLOCK_ID) + len(_BLOCK_ID)
        block_id = message[start : message.index('"', start)]
        given = self.given.pop(block_id)
        self.seconds.append(now - given)
        self.socket_seconds.append(socket.received_at - self.sent.pop(block_id, given))
        self.failed += '"success":true' not in message
        await socket.send(self.acknowledgements.pop(block_id))
        if not self.acknowledgements:
            self.done.set()

    async def work_off(self, count: int, task_input: dict[str, Any]) -> dict[str, Any]:
        """Have ``count`` tasks computed."""
        for _ in range(count):
            block_id = str(uuid.uuid4())
            assignment = frame(
                "Assignment",
                block_id=block_id,
                task_type="TEXT_COMPLETION",
                input=task_input,
                deadline="2100-01-01T00:00:00Z",
                model_id=MODEL_ID,
            )
            self.queued.append((block_id, assignment))
            self.acknowledgements[block_id] = frame("ResultAck", block_id=block_id, accepted=True)
        self.seconds, self.socket_seconds, self.failed = [], [], 0
        self.done.clear()
        began, busy = time.perf_counter(), time.process_time()
        assert self.socket is not None
        await self.give(self.socket)
        await self.done.wait()
        return {
            "wall_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - busy,
            "seconds": self.seconds,
            "socket_seconds": self.socket_seconds,
            "failed": self.failed,
        }


async def main() -> None:
    coordinator = LoadCoordinator()
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with serve(
        coordinator.handle,
        "127.0.0.1",
        0,
        compression=None,
        create_connection=StampedConnection,
    ) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        while line := await orders.readline():
            answer = await coordinator.work_off(**ujson.loads(line))
            print(ujson.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
