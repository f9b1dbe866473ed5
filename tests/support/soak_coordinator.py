"""A coordinator for hours: mixed tasks at a steady rate, faults now and then, a strict account.

It keeps nothing of a block that has ended, so that its own memory does not grow with the hours, and
counts what must not happen: a block that ends twice, a result for none, other bytes for the same
block, another answer to the same greedy question.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import ujson
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

EXTENSIONS = ["cancel", "progress", "reconcile", "decline", "goodbye", "drain"]

# A block that is older is taken for lost with whoever had it, and given again.
_LEASE_S = 60.0

# Ended blocks whose bytes are remembered, to recognize a result that comes again.
_REMEMBERED = 4096

_GREEDY = {"temperature": 0.0, "ignore_eos": True}
_TEXT = "the river and the sea and the harbour "


def _inputs(number: int) -> list[tuple[str, str, dict[str, Any]]]:
    """One of each kind: task type, model, input. The last ones are wrong on purpose."""
    return [
        ("TEXT_COMPLETION", "", {"prompt": _TEXT, "max_tokens": 8, **_GREEDY}),
        ("TEXT_COMPLETION", "", {"prompt": _TEXT * 4, "max_tokens": 200, **_GREEDY}),
        ("TEXT_COMPLETION", "", {"prompt": f"{_TEXT}{number}", "max_tokens": 32}),
        ("EMBEDDINGS", "", {"texts": [_TEXT, f"{number}"]}),
        ("CLASSIFICATION", "", {"text": _TEXT, "labels": ["water", "fire"]}),
        ("SUMMARIZATION", "", {"text": _TEXT * 3, "target_length": 10, **_GREEDY}),
        ("QUESTION_ANSWERING", "", {"question": "where?", "context": _TEXT, "max_tokens": 8}),
        ("TEXT_COMPLETION", "absent", {"prompt": _TEXT}),
        ("TEXT_COMPLETION", "", {"prompt": 1}),
        ("TEXT_COMPLETION", "", {"prompt": _TEXT * 4000, "max_tokens": 8}),
    ]


class SoakCoordinator:
    """Serves one worker.

    Args:
        model_id: What it has.
        rate: Tasks a second.
        seed: Of the order of tasks and faults.

    Attributes:
        counts: What happened, by name.
        faults: What must not happen, in words; the first hundred.
    """

    def __init__(self, model_id: str, rate: float, seed: int = 1) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.port = 0
        self._model_id = model_id
        self._interval = 1.0 / rate
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._running: dict[str, tuple[dict[str, Any], float]] = {}
        self._again: list[dict[str, Any]] = []
        self._ended: dict[str, bytes] = {}
        self._answers: dict[str, str] = {}
        self._socket: ServerConnection | None = None
        self._refusals = 0
        self._forget_next_acknowledgement = False
        self._next_at = 0.0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Listen; gives the address."""
        async with serve(
            self._handle,
            "127.0.0.1",
            0,
            compression=None,
            ping_interval=10,
            process_request=self._admit,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            yield f"ws://127.0.0.1:{self.port}"

    @property
    def unfinished(self) -> int:
        """Blocks that were given and have not ended."""
        return len(self._running) + len(self._again)

    def pause(self) -> None:
        """Give out no new blocks from now on."""
        self._next_at = float("inf")

    # Faults.

    def faults_by_name(self) -> dict[str, Callable[[], None]]:
        """What can be done to the link from this side."""
        return {
            "cut": self._cut,
            "close": self._close,
            "lost acknowledgement": self._lose_acknowledgement,
            "refusals": self._refuse,
            "repeated assignment": self._repeat,
            "cancel": self._cancel,
            "garbage": self._send_garbage,
        }

    def _cut(self) -> None:
        if self._socket is not None:
            self._socket.transport.abort()

    def _close(self) -> None:
        self._soon(lambda socket: socket.close(1001, "going away"))

    def _lose_acknowledgement(self) -> None:
        self._forget_next_acknowledgement = True

    def _refuse(self) -> None:
        self._refusals = 2
        self._cut()

    def _repeat(self) -> None:
        if self._running:
            assignment, _ = self._running[next(iter(self._running))]
            self._soon(lambda socket: self._say(socket, assignment))

    def _cancel(self) -> None:
        if self._running:
            block_id = next(iter(self._running))
            message = {"type": "Cancel", "block_id": block_id, "reason": "no longer wanted"}
            self._soon(lambda socket: self._say(socket, message))

    def _send_garbage(self) -> None:
        self._soon(lambda socket: socket.send('{"type":"Assignment","block_id":'))

    def _soon(self, work: Callable[[ServerConnection], Any]) -> None:
        async def do(socket: ServerConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                await work(socket)

        if self._socket is not None:
            task = asyncio.ensure_future(do(self._socket))
            task.add_done_callback(lambda _: None)

    def _admit(self, _connection: ServerConnection, _request: Request) -> Response | None:
        self.counts["handshakes"] += 1
        if self._refusals == 0:
            return None
        self._refusals -= 1
        status = http.HTTPStatus.TOO_MANY_REQUESTS
        headers = Headers({"Content-Length": "0", "Retry-After": "1"})
        return Response(status.value, status.phrase, headers, b"")

    # The conversation.

    async def _handle(self, socket: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for frame in socket:
                await self._take(socket, ujson.loads(frame))

    async def _say(self, socket: ServerConnection, message: dict[str, Any]) -> None:
        await socket.send(ujson.dumps(message))

    async def _take(self, socket: ServerConnection, message: dict[str, Any]) -> None:
        self.counts[message["type"]] += 1
        match message["type"]:
            case "Register":
                self._socket = socket
                answer = {"type": "Registered", "session_id": "soak", "extensions": EXTENSIONS}
                await self._say(socket, answer | {"heartbeat_interval_ms": 1000})
            case "RequestWork":
                await self._say(socket, self._next())
            case "SubmitResult":
                await self._end(socket, message)
            case "Decline":
                self._running.pop(message["block_id"], None)
            case "Reconcile":
                self._reconcile({*message["running"], *message["unacknowledged"]})

    def _reconcile(self, held: set[str]) -> None:
        """What the worker does not hold any more is given again."""
        for block_id in [b for b in self._running if b not in held]:
            self._again.append(self._running.pop(block_id)[0])

    def _next(self) -> dict[str, Any]:
        now = time.monotonic()
        for block_id, (assignment, given_at) in list(self._running.items()):
            if now - given_at > _LEASE_S:
                self.counts["leases that expired"] += 1
                del self._running[block_id]
                self._again.append(assignment)
        if self._again:
            assignment = self._again.pop()
        elif now < self._next_at:
            wait_ms = 1000 if self._next_at == float("inf") else (self._next_at - now) * 1000
            return {"type": "NoWork", "retry_after_ms": max(1, int(wait_ms))}
        else:
            self._next_at = max(self._next_at, now - 1.0) + self._interval
            assignment = self._assignment(next(self._numbers))
        self._running[assignment["block_id"]] = (assignment, now)
        return assignment

    def _assignment(self, number: int) -> dict[str, Any]:
        kinds = _inputs(number)
        # Mostly good ones.
        index = number % 7 if self._rng.random() < 0.95 else self._rng.randrange(7, len(kinds))
        kind, model_id, task_input = kinds[index]
        return {
            "type": "Assignment",
            "block_id": f"b-{number}-{index}",
            "task_type": kind,
            "input": task_input,
            "deadline": "2100-01-01T00:00:00Z",
            "model_id": model_id or self._model_id,
        }

    async def _end(self, socket: ServerConnection, message: dict[str, Any]) -> None:
        block_id, result = message["block_id"], message["result"]
        digest = hashlib.sha256(ujson.dumps(message).encode()).digest()
        if block_id in self._ended:
            self.counts["results that came again"] += 1
            if self._ended[block_id] != digest:
                self._fault(f"{block_id} came again with other bytes")
        elif self._running.pop(block_id, None) is None:
            # A lease that expired here, and was held there all the same.
            waiting = [a for a in self._again if a["block_id"] == block_id]
            if not waiting:
                self._fault(f"a result of {block_id}, which was not given")
            self._again = [a for a in self._again if a["block_id"] != block_id]
            self._note(block_id, result, digest)
        else:
            self._note(block_id, result, digest)
        if self._forget_next_acknowledgement:
            self._forget_next_acknowledgement = False
            self._cut()
            return
        await self._say(socket, {"type": "ResultAck", "block_id": block_id, "accepted": True})

    def _note(self, block_id: str, result: dict[str, Any], digest: bytes) -> None:
        self._ended[block_id] = digest
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        index = block_id.rpartition("-")[2]
        if not result["success"]:
            self.counts[f"failed: {result['error']['code']}"] += 1
            return
        self.counts["succeeded"] += 1
        if index in ("0", "1", "5"):
            tokens = result["fingerprint"]["output_tokens_sha256"]
            if self._answers.setdefault(index, tokens) != tokens:
                self.counts["other answers"] += 1

    def _fault(self, text: str) -> None:
        self.counts["faults"] += 1
        if len(self.faults) < 100:
            self.faults.append(text)
