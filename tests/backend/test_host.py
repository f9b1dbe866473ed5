"""The engine process on its own, spoken to in raw frames."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import scripted_host
import ujson

from ai4all.backend import host
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.channel import (
    FAILED,
    FINISHED,
    MAX_FRAME_BYTES,
    Channel,
    error_from_wire,
    error_to_wire,
    shallow_dict,
)
from ai4all.backend.completions import NATIVE_ERRORS
from ai4all.backend.engine_process import HOST_COMMAND, engine_environment
from ai4all.errors import (
    COMPUTE_ERRORS,
    BadRequest,
    ContextOverflow,
    EngineCrashed,
    ModelNotFound,
)

TICK_S = 0.05
OPTIONS = shallow_dict(EngineOptions(n_ctx=256, threads=1, device="cpu"))


class Talk:
    """The parent's side: frames in, messages out."""

    def __init__(self, sock: socket.socket, process: asyncio.subprocess.Process) -> None:
        self.sock = sock
        self.process = process
        self.frames: list[list[Any]] = []

    @classmethod
    async def start(cls, *command: str) -> Talk:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(theirs.fileno()),
                str(os.getpid()),
                str(TICK_S),
                "10",
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=engine_environment(os.environ),
            )
        return cls(ours, process)

    async def send(self, *contents: list[Any]) -> None:
        """Send frames, in one piece."""
        payloads = [ujson.dumps(content).encode() for content in contents]
        data = b"".join(struct.pack("!I", len(payload)) + payload for payload in payloads)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> list[Any]:
        (length,) = struct.unpack("!I", await self._exactly(4))
        frame: list[Any] = ujson.loads(await self._exactly(length))
        self.frames.append(frame)
        return frame

    async def until(self, number: int, *kinds: str) -> list[Any]:
        while True:
            for message in await self.receive():
                if message[0] == number and message[1] in kinds:
                    return message  # type: ignore[no-any-return]

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def end(self) -> None:
        self.sock.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    """A real engine process."""
    talk = await Talk.start(*HOST_COMMAND)
    yield talk
    await talk.end()


@pytest.fixture
async def scripted() -> AsyncIterator[Talk]:
    """A process with a scripted engine."""
    talk = await Talk.start(*scripted_host.command(generation={"hang_at": 3}))
    yield talk
    await talk.end()


def model(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"model_id": "m", "path": str(path), "sha256": digest, "size_bytes": 1}


def request(**more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": "Hello", "temperature": 0.0, "ignore_eos": True} | more
    return shallow_dict(GenerateRequest(**fields))


class TestConversation:
    async def test_a_whole_one(self, talk: Talk, tiny_model: Path) -> None:
        ((hello, capabilities),) = await talk.receive()
        assert hello == "hello"
        assert capabilities["engine_build"].startswith("llama.cpp ")
        await talk.send(["load", 1, model(tiny_model), OPTIONS])
        loaded = await talk.until(1, "loaded", "error")
        assert loaded[1] == "loaded"
        assert loaded[2]["n_ctx"] == 256
        assert "file" not in loaded[2]
        await talk.send(["generate", 2, request(max_tokens=40)])
        finished = await talk.until(2, "finished", "failed", "done", "error")
        assert finished[1] == "finished"
        assert FINISHED.validate_python(finished[2]).n_tokens == 40
        await talk.send(["unload", 3])
        assert await talk.until(3, "unloaded", "error") == [3, "unloaded", None]
        await talk.send(["close"])
        assert await talk.process.wait() == 0

    async def test_tokens_share_messages(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS])
        await talk.until(1, "loaded")
        talk.frames.clear()
        await talk.send(["generate", 2, request(max_tokens=200)])
        await talk.until(2, "finished")
        messages = [message for frame in talk.frames for message in frame]
        tokens = [message[2] for message in messages if message[1] == "token"]
        counted = 0
        for token in tokens:
            counted += len(token["token_ids"])
            assert token["completion_tokens"] == counted
        assert counted == 200
        assert 1 < len(tokens) < 200

    async def test_an_unknown_request_field_is_our_bug_and_no_end(
        self, talk: Talk, tiny_model: Path
    ) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS])
        await talk.until(1, "loaded")
        await talk.send(["generate", 2, {"prompt": "SECRET", "max_tokens": "many"}])
        failed = await talk.until(2, "failed")
        assert isinstance(FAILED.validate_python(failed[2]).error(), EngineCrashed)
        await talk.send(["generate", 3, request(top_k=1 << 40)])
        failed = await talk.until(3, "failed")
        assert failed[2][:2] == ["bad_request", "top_k: out of range"]
        await talk.send(["score", 4, {"prompt": "SECRET", "continuations": "many"}])
        error = await talk.until(4, "error")
        assert error[2] == "EngineCrashed"
        assert "ValidationError" in error[3]
        assert "SECRET" not in ujson.dumps(talk.frames)
        await talk.send(["generate", 5, request(max_tokens=1)])
        assert (await talk.until(5, "finished", "failed"))[1] == "finished"


class TestNativeChannel:
    """Generations that never reach Python."""

    async def test_one_does_not_overtake_the_load_before_it(
        self, talk: Talk, tiny_model: Path
    ) -> None:
        await talk.receive()
        await talk.send(
            ["load", 1, model(tiny_model), OPTIONS], ["generate", 2, request(max_tokens=3)]
        )
        assert (await talk.until(2, "done", "error", "finished", "failed"))[1] == "done"
        # Whoever has read the answer is served in native code.
        for number in range(3, 30):
            await talk.send(["generate", number, request(max_tokens=1)])
            last = await talk.until(number, "done", "error", "finished", "failed")
            assert last[1] == "finished"
        # What Python does meanwhile is no load.
        await talk.send(
            ["score", 40, {"prompt": "a", "continuations": ["b"]}],
            ["generate", 41, request(max_tokens=3)],
        )
        assert (await talk.until(41, "done", "finished"))[1] == "finished"

    async def test_one_is_cancelled(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS | {"n_ctx": 200_000}])
        await talk.until(1, "loaded")
        await talk.send(["generate", 2, request(max_tokens=150_000)])
        await talk.until(2, "token")
        await talk.send(["cancel", 2])
        failed = FAILED.validate_python((await talk.until(2, "failed"))[2])
        assert failed.code == "cancelled"
        assert 0 < failed.n_tokens < 150_000
        # Nobody's: of no consequence.
        await talk.send(["cancel", 2])
        await talk.send(["cancel", 77])
        await talk.send(["generate", 3, request(max_tokens=1)])
        await talk.until(3, "finished", "done")

    async def test_closing_ends_one(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS | {"n_ctx": 200_000}])
        await talk.until(1, "loaded")
        await talk.send(["generate", 2, request(max_tokens=150_000)])
        await talk.until(2, "token")
        await talk.send(["close"])
        assert (await talk.until(2, "failed"))[2][0] == "closed"
        assert await talk.process.wait() == 0

    async def test_without_a_parent_it_goes_at_once(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS | {"n_ctx": 200_000}])
        await talk.until(1, "loaded")
        await talk.send(["generate", 2, request(max_tokens=150_000)])
        await talk.until(2, "token")
        talk.sock.close()
        assert await talk.process.wait() == 0

    @pytest.mark.parametrize("content", [b'["generate",1,', b'["generate",0,{}]', b'["cancel",[]]'])
    async def test_what_is_no_command_ends_it(self, talk: Talk, content: bytes) -> None:
        await talk.receive()
        talk.sock.send(struct.pack("!I", len(content)) + content)
        assert await talk.process.wait() == 0

    async def test_lines_of_the_log_come_along(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        options = OPTIONS | {"n_ctx": 200_000, "n_batch": 2048, "n_ubatch": 2048}
        await talk.send(["load", 1, model(tiny_model), options])
        await talk.until(1, "loaded")
        talk.frames.clear()
        # A decode that is broken off is told of to whoever debugs, as this parent does. The end
        # may come between two of them.
        lines: list[list[Any]] = []
        number = 1
        while not lines:
            number += 1
            prompt = f"{number} " + "the sea " * 5_000
            await talk.send(["generate", number, request(prompt=prompt, max_tokens=1)])
            assert (await talk.until(number, "prompt", "failed"))[1] == "prompt"
            await talk.send(["cancel", number])
            assert (await talk.until(number, "failed"))[2][0] == "cancelled"
            lines = [m for frame in talk.frames for m in frame if m[0] == "log"]
        assert all(level == 10 and text for _, level, text in lines)


class TestCancel:
    """A command of Python's that is cancelled in the very moment in which it comes."""

    async def test_each_ends_once_and_leaves_nothing(self, talk: Talk, tiny_model: Path) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS])
        await talk.until(1, "loaded")
        commands: dict[int, list[Any]] = {
            2: ["embed", 2, {"texts": ["a"], "normalize": True, "deadline": None}],
            3: ["score", 3, {"prompt": "a", "continuations": ["b"]}],
            4: ["devices", 4],
            5: ["unload", 5],
            6: ["load", 6, model(tiny_model), OPTIONS],
        }
        for number, command in commands.items():
            await talk.send(command, ["cancel", number])
            assert (await talk.until(number, "error"))[2] == "Cancelled"
        # No load is under way any more, and no command.
        await talk.send(["load", 7, model(tiny_model), OPTIONS])
        await talk.until(7, "loaded", "error")
        await talk.send(["generate", 8, request(max_tokens=1)])
        await talk.until(8, "finished")
        await asyncio.sleep(4 * TICK_S)
        await talk.send(["generate", 9, request(max_tokens=1)])
        talk.frames.clear()
        await talk.until(9, "finished")
        messages = [message for frame in talk.frames for message in frame]
        assert sum(message[0] == "tick" for message in messages) <= 1
        assert talk.process.returncode is None


class TestCompany:
    """Which messages share a frame."""

    async def test_what_can_wait_goes_with_what_cannot(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(host, "_TOKENS_WAIT_S", 3600.0)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        engine_host = host.EngineHost(1.0)
        frames: list[list[Any]] = []
        other_end = Channel(frames.append, lambda problem: None)
        await other_end.open(theirs)
        engine_host._channel = await engine_host._open_channel(ours, None)

        async def come(count: int) -> None:
            while len(frames) < count:
                await asyncio.sleep(0.001)

        engine_host.say(["first"], can_wait=False)
        engine_host.say(["of the same turn"], can_wait=True)
        await come(1)
        engine_host.say(["token"], can_wait=True)
        await asyncio.sleep(0.02)
        engine_host.say(["another"], can_wait=True)
        await asyncio.sleep(0.02)
        assert len(frames) == 1
        engine_host.say(["done"])
        await come(2)
        assert frames == [[["first"], ["of the same turn"]], [["token"], ["another"], ["done"]]]
        other_end.close()
        engine_host._closing.set()  # Else the end of its parent would be its own.
        engine_host._channel.close()
        await asyncio.sleep(0.01)

    async def test_tokens_do_not_wait_for_the_end(self, scripted: Talk) -> None:
        await scripted.receive()
        await scripted.send(["load", 1, model(Path(__file__)), OPTIONS])
        await scripted.until(1, "loaded")
        # It hangs after the third: what it said before comes nevertheless.
        await scripted.send(["generate", 2, request()])
        tokens = 0
        while tokens < 3:
            tokens += sum(message[1] == "token" for message in await scripted.receive())


class TestLiveliness:
    async def test_it_ticks_while_it_works_and_only_then(self, scripted: Talk) -> None:
        await scripted.receive()
        await scripted.send(["load", 1, model(Path(__file__)), OPTIONS])
        await scripted.until(1, "loaded")
        await scripted.send(["generate", 2, request()])
        ticks = 0
        while ticks < 4:
            ticks += sum(message[0] == "tick" for message in await scripted.receive())
        await scripted.send(["cancel", 2])
        assert (await scripted.until(2, "error"))[2] == "Cancelled"
        scripted.frames.clear()
        listening = asyncio.create_task(scripted.until(2, "nothing"))
        await asyncio.wait({listening}, timeout=6 * TICK_S)
        assert listening.cancel()
        assert sum(len(frame) for frame in scripted.frames) <= 1

    async def test_the_pulse_of_the_real_engine_moves_with_the_work(
        self, talk: Talk, tiny_model: Path
    ) -> None:
        await talk.receive()
        await talk.send(["load", 1, model(tiny_model), OPTIONS])
        await talk.until(1, "loaded")
        # Ticks come by the clock: work until there are a few, however fast the machine is.
        pulses: list[int] = []
        for number in range(2, 2000):
            await talk.send(["generate", number, request(max_tokens=200)])
            await talk.until(number, "finished")
            pulses = [m[1] for frame in talk.frames for m in frame if m[0] == "tick"]
            if len(pulses) >= 3:
                break
        assert pulses == sorted(pulses)
        # Each evaluates hundreds of nodes.
        assert pulses[-1] > pulses[0] + 100


class TestEnd:
    async def test_without_a_parent_it_goes_at_once(self, scripted: Talk) -> None:
        await scripted.receive()
        await scripted.send(["load", 1, model(Path(__file__)), OPTIONS])
        await scripted.send(["generate", 2, request()])
        await scripted.until(2, "token")
        scripted.sock.close()
        assert await scripted.process.wait() == 0

    async def test_close_ends_what_runs(self, scripted: Talk) -> None:
        await scripted.receive()
        await scripted.send(["load", 1, model(Path(__file__)), OPTIONS])
        await scripted.send(["generate", 2, request()])
        await scripted.until(2, "token")
        await scripted.send(["close"])
        assert await scripted.process.wait() == 0

    async def test_an_orphan_does_not_start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # As if whoever started it had died before it could ask to die with him.
            process = await asyncio.create_subprocess_exec(
                *HOST_COMMAND,
                *(str(theirs.fileno()), "1", "1", "10"),
                pass_fds=(theirs.fileno(),),
                env=engine_environment(os.environ),
            )
            assert await process.wait() == 0
            theirs.close()
            assert ours.recv(1) == b""

    async def test_a_fault_is_named_on_standard_error(self, scripted: Talk) -> None:
        await scripted.receive()
        scripted.process.send_signal(signal.SIGSEGV)
        assert scripted.process.stderr is not None
        assert b"Fatal Python error: Segmentation fault" in await scripted.process.stderr.read()
        assert await scripted.process.wait() == -signal.SIGSEGV


class TestErrors:
    def test_every_error_of_the_engine_crosses(self) -> None:
        kinds = {*COMPUTE_ERRORS.values(), *NATIVE_ERRORS.values()} - {ModelNotFound}
        for kind in kinds:
            crossed = error_from_wire(*error_to_wire(kind("why")))
            assert type(crossed) is kind
            assert str(crossed) == "why"

    def test_details_cross(self) -> None:
        error = error_from_wire(*error_to_wire(ContextOverflow("why", {"n": 3})))
        assert isinstance(error, ContextOverflow)
        assert error.details == {"n": 3}

    def test_what_nobody_foresaw_crosses_without_its_text(self) -> None:
        error = error_from_wire(*error_to_wire(KeyError("SECRET PROMPT")))
        assert isinstance(error, EngineCrashed)
        assert "KeyError" in str(error)
        assert "SECRET" not in str(error)

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(LookupError):
            error_from_wire("SystemExit", "", None)


class TestChannel:
    @pytest.fixture
    async def ends(self) -> AsyncIterator[tuple[Channel, list[Any], asyncio.Future[Any], Any]]:
        frames: list[Any] = []
        lost: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = Channel(frames.append, lost.set_result)
        await channel.open(ours)
        yield channel, frames, lost, theirs
        channel.close()
        theirs.close()
        await lost

    async def test_frames_in_pieces_and_together(self, ends: Any) -> None:
        _, frames, lost, theirs = ends
        contents = [["x" * n] for n in (0, 1, 5000)]
        texts = [ujson.dumps(content).encode() for content in contents]
        data = b"".join(struct.pack("!I", len(text)) + text for text in texts)
        for at in range(0, len(data), 7):
            theirs.send(data[at : at + 7])
            await asyncio.sleep(0)
        theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)
        assert await asyncio.shield(lost) is None
        assert frames == contents + contents

    async def test_a_frame_too_long_ends_it(self, ends: Any) -> None:
        _, frames, lost, theirs = ends
        theirs.send(struct.pack("!I", MAX_FRAME_BYTES + 1))
        assert "bytes" in await asyncio.shield(lost)
        assert frames == []

    async def test_sending_on_a_lost_channel_is_nothing(self, ends: Any) -> None:
        channel, _, lost, theirs = ends
        theirs.close()
        await asyncio.shield(lost)
        channel.send(["cancel", 1])

    def test_halves_of_surrogate_pairs_become_what_the_engine_makes_of_them(self) -> None:
        fields = shallow_dict(GenerateRequest(prompt="a\ud800b", stop=("\udfff",)))
        assert fields["prompt"] == "a?b"
        assert fields["stop"] == ["?"]

    def test_bad_requests_are_told_apart(self) -> None:
        assert type(error_from_wire("BadRequest", "x", None)) is BadRequest
