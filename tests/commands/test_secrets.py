"""A secret that a worker holds is nowhere but in its memory and in the handshake.

A real worker with a real engine process runs at the chattiest level there is, against a coordinator
that throws the worker's token back at it in every way it has. Then everything that is left is
searched: both streams, every file, the engine's environment, the command lines of both processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ujson
from command_line import Cli, fake_command
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ai4all.coordinator import EmbeddedCoordinator, TaskSpec

TOKEN = "planted-token-5e4d1c"
FILE_TOKEN = "planted-file-token-77aa02"
PROXY_PASSWORD = "planted-proxy-word-19b3"
OTHER_KEY = "planted-other-key-c0ffee"
PROMPT = "planted prompt of somebody"
PLANTED = (TOKEN, FILE_TOKEN, PROXY_PASSWORD, OTHER_KEY, PROMPT)

MAIN = "import sys; from ai4all.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Parrot:
    """A coordinator that repeats the token wherever it may say something.

    Attributes:
        refusals: Statuses of the handshakes that it refuses first.
        told: The ``Authorization`` headers it got.
        results: The results it got, by block.
    """

    refusals: list[int]
    told: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: list[str] = field(default_factory=list)
    url: str = ""
    engine: psutil.Process | None = None
    engine_environment: dict[str, str] = field(default_factory=dict)
    command_lines: list[str] = field(default_factory=list)
    worker: asyncio.subprocess.Process | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        echo = request.headers.get("Authorization", "nothing")
        self.told.append(echo)
        if not self.refusals:
            return None
        status = self.refusals.pop(0)
        headers = Headers(
            {
                "Retry-After": "0",
                "Location": f"{self.url}/?token={TOKEN}",
                "WWW-Authenticate": echo,
                "Set-Cookie": f"session={TOKEN}",
                "Content-Length": str(len(echo)),
            }
        )
        return Response(status, http.HTTPStatus(status).phrase, headers, echo.encode())

    async def on_link(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._converse(connection)

    async def _converse(self, connection: ServerConnection) -> None:
        async for frame in connection:
            self.frames.append(str(frame))
            message = ujson.loads(frame)
            match message["type"]:
                case "Register":
                    registered = {"session_id": TOKEN, "heartbeat_interval_ms": 200}
                    await self._say(connection, "Registered", **registered)
                    await self._say(connection, "Error", code=TOKEN, message=f"Bearer {TOKEN}")
                    await connection.send(f"no frame, but {TOKEN}")
                    await self._say(connection, TOKEN)
                case "RequestWork" if "dies" not in self.results:
                    # Its model is loaded by then; and stopped, it is not done before it is killed.
                    await asyncio.sleep(0.5)
                    os.kill(self._engine().pid, signal.SIGSTOP)
                    await self._assign(connection, "dies")
                case "RequestWork" if "lives" not in self.results:
                    await self._assign(connection, "lives")
                case "RequestWork":
                    await connection.close(1008, f"not with {TOKEN}")
                    self.done.set()
                    return
                case "Heartbeat" if message["status"] != "Idle" and not self.results:
                    self._look_around()
                    os.kill(self._engine().pid, signal.SIGKILL)
                case "SubmitResult":
                    block = message["block_id"]
                    self.results[block] = message["result"]
                    answer = {"block_id": block, "accepted": block == "lives", "error": TOKEN}
                    await self._say(connection, "ResultAck", **answer)

    async def _say(self, connection: ServerConnection, kind: str, **fields: Any) -> None:
        await connection.send(ujson.dumps({"type": kind, **fields}))

    async def _assign(self, connection: ServerConnection, block: str) -> None:
        await self._say(
            connection,
            "Assignment",
            block_id=block,
            task_type="TEXT_COMPLETION",
            input={
                "prompt": PROMPT,
                "max_tokens": 4,
                "temperature": 0.0,
                "ignore_eos": True,
            },
            deadline="2099-01-01T00:00:00Z",
            model_id="benchmark",
        )

    def _engine(self) -> psutil.Process:
        assert self.worker is not None
        (engine,) = psutil.Process(self.worker.pid).children()
        return engine

    def _look_around(self) -> None:
        engine = self._engine()
        assert self.worker is not None
        self.engine_environment = engine.environ()
        for process in (engine, psutil.Process(self.worker.pid)):
            self.command_lines.append("\0".join(process.cmdline()))


@contextlib.asynccontextmanager
async def speaking(parrot: Parrot) -> AsyncIterator[None]:
    async with serve(parrot.on_link, "127.0.0.1", 0, process_request=parrot.on_request) as server:
        parrot.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield


@pytest.fixture
def after_the_first_run(cli: Cli) -> None:
    """Over the scripted backend: the real one has more to do here than to measure."""
    assert cli("demo", "--tasks", "1").status == 0


@pytest.mark.usefixtures("after_the_first_run")
async def test_planted_secrets_are_nowhere(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "token").write_text(FILE_TOKEN)
    (tmp_path / "token").chmod(0o600)
    environment = {
        **os.environ,
        "AI4ALL_COORDINATOR_TOKEN": TOKEN,
        "AI4ALL_COORDINATOR_TOKEN_FILE": str(tmp_path / "token"),
        "AI4ALL_COORDINATOR_RECONNECT_INTERVAL_MS": "10",
        "AI4ALL_LOG_LEVEL": "debug",
        "PYTHONASYNCIODEBUG": "1",
        "PYTHONFAULTHANDLER": "1",
        "HTTPS_PROXY": f"http://me:{PROXY_PASSWORD}@127.0.0.1:9",
        "SOME_API_KEY": OTHER_KEY,
    }
    parrot = Parrot([401, 302, 503])
    async with speaking(parrot):
        parrot.worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", MAIN, "worker"),
            *("--coordinator", f"{parrot.url}/?token={TOKEN}"),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        streams = asyncio.ensure_future(parrot.worker.communicate())
        await asyncio.wait(
            {asyncio.ensure_future(parrot.done.wait()), streams},
            return_when=asyncio.FIRST_COMPLETED,
        )
        if parrot.worker.returncode is None:
            parrot.worker.terminate()
        out, err = await streams

    # It all happened: the token came where it belongs, and the engine died and came back.
    assert set(parrot.told) == {f"Bearer {TOKEN}"}, err.decode()
    assert parrot.results["dies"]["error"]["code"] == "engine_crashed"
    assert parrot.results["lives"]["success"]
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"ai4all-native.jsonl", "results.sqlite3"} <= names
    assert any(name.startswith("crash-") for name in names)
    assert b"[redacted]" in err
    assert b"bad_frame" in err
    assert parrot.engine_environment["PATH"]

    places = {"standard output": out, "standard error": err}
    places |= {str(path.relative_to(data_dir)): path.read_bytes() for path in files}
    places["the engine's environment"] = repr(parrot.engine_environment).encode()
    places["a frame"] = "\n".join(parrot.frames).encode()
    # The worker's own one has the address that this test gave it, on purpose.
    places["a command line"] = parrot.command_lines[0].encode()
    for place, content in places.items():
        for planted in PLANTED:
            assert planted.encode() not in content, f"{planted} is in {place}"
    assert TOKEN in parrot.command_lines[1]
    for planted in PLANTED[1:]:
        assert planted not in parrot.command_lines[1]


async def test_files_of_the_worker_are_its_owners_alone(data_dir: Path) -> None:
    """Whatever the umask: and whatever the modes were before, a start puts them right."""
    for run in range(2):
        async with EmbeddedCoordinator(
            [TaskSpec(block_id=f"b-{run}", input={"prompt": "x"})]
        ) as coordinator:
            worker = await asyncio.create_subprocess_exec(
                *fake_command("worker", "--coordinator", coordinator.url),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                umask=0,
            )
            await coordinator.finished()
            worker.terminate()
            await worker.wait()
        content = [data_dir, *data_dir.rglob("*")]
        assert len(content) > 8
        for path in content:
            mode = path.stat().st_mode & 0o777
            assert mode & 0o077 == 0, f"{path.relative_to(data_dir)} is {mode:o}, run {run}"
            path.chmod(0o777 if path.is_dir() else 0o666)
