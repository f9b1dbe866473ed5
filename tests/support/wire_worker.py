"""A worker made of frames, for tests of a coordinator."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import ujson
from websockets.asyncio.client import ClientConnection, connect

CAPABILITIES: dict[str, Any] = {
    "backend": "cpu",
    "supported_tasks": ["TEXT_COMPLETION"],
    "supports_training": False,
    "vram_mb": None,
    "memory_mb": 8192,
    "compute_score": 0.5,
}
METRICS = {"queue_time_ms": 0.1, "execution_time_ms": 2.5, "total_time_ms": 2.6}
USAGE = {
    "cpu_percent": 1.0,
    "memory_mb": 10,
    "gpu_percent": None,
    "gpu_memory_mb": None,
    "active_threads": 1,
}


def success(text: str = "an answer") -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return {
        "success": True,
        "output": {
            "task_type": "TEXT_COMPLETION",
            "text": text,
            "finish_reason": "stop",
            "usage": usage,
            "generation_time_ms": 2,
        },
        "error": None,
        "metrics": METRICS,
    }


def failure(code: str, *, retryable: bool) -> dict[str, Any]:
    error = {"code": code, "message": "it failed", "retryable": retryable, "details": None}
    return {"success": False, "output": None, "error": error, "metrics": METRICS}


class WireWorker:
    """One connection. Speaks the first protocol, and extensions on request."""

    def __init__(self, url: str, worker_id: str = "w-1", *, token: str | None = None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._connecting = connect(url, compression=None, proxy=None, additional_headers=headers)
        self.worker_id = worker_id
        self.socket: ClientConnection

    async def __aenter__(self) -> Self:
        self.socket = await self._connecting
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.socket.close()

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(ujson.dumps({"type": kind, "worker_id": self.worker_id, **fields}))

    async def hear(self, kind: str | None = None) -> dict[str, Any]:
        message = ujson.loads(await self.socket.recv())
        assert kind is None or message["type"] == kind, message
        return dict(message)

    async def register(
        self, extensions: Iterable[str] | None = None, **capabilities: Any
    ) -> dict[str, Any]:
        more = {} if extensions is None else {"extensions": list(extensions)}
        await self.say(
            "Register", capabilities=CAPABILITIES | capabilities, benchmark_score=None, **more
        )
        return await self.hear("Registered")

    async def ask(self, kind: str | None = "Assignment") -> dict[str, Any]:
        await self.say("RequestWork")
        return await self.hear(kind)

    async def submit(self, block_id: str, result: dict[str, Any]) -> dict[str, Any]:
        await self.say("SubmitResult", block_id=block_id, result=result)
        return await self.hear("ResultAck")

    async def beat(self, status: Any = "Idle") -> None:
        await self.say("Heartbeat", status=status, resource_usage=USAGE)
