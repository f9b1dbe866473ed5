"""The engine process: serves one backend over an inherited socket until the other end goes.

Generations of the native engine do not come here: it reads them from the socket itself and answers
there (``NativeChannel``), but for those that come while a model is loaded or dropped.

Started by ``ai4all.backend.isolated``; of no use by hand. It computes and nothing else: it opens
no connection, has no settings and no secrets, writes no file, and does not outlive its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil

from ai4all.backend.base import (
    Completion,
    GenerationEvent,
    InferenceBackend,
    PromptProgress,
    TokenEvent,
)
from ai4all.backend.channel import (
    CAPABILITIES,
    COMPLETION,
    DEVICES,
    EMBED_REQUEST,
    ENGINE_OPTIONS,
    GENERATE_REQUEST,
    LABEL_SCORES,
    LOADED_MODEL,
    MODEL_FILE,
    PROMPT_PROGRESS,
    SCORE_REQUEST,
    TOKEN_EVENT,
    Channel,
    embeddings_to_wire,
    error_to_wire,
)
from ai4all.backend.registry import open_backend
from ai4all.errors import Ai4allError, Cancelled

__all__ = ["EngineHost", "main"]

log = logging.getLogger("ai4all.engine")

_PR_SET_PDEATHSIG = 1

# The system, out of memory, takes this process before the worker that would report it.
_OOM_SCORE = "500"

# Of what is free at a load, this share may be allocated; and this much in any case.
_SHARE_OF_MEMORY = 0.9
_LEAST_MEMORY = 1 << 30

# Tokens after the first wait so long for company.
_TOKENS_WAIT_S = 0.005


class _Channel(Protocol):
    """What is said and heard over: a ``Channel``, or one that serves generations by itself."""

    def send(self, content: list[Any], served: int = 0) -> None: ...

    def served(self) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class _OpensChannel(Protocol):
    """A backend that brings a channel of its own."""

    def open_channel(
        self,
        sock: socket.socket,
        on_frame: Callable[[Any], None],
        on_lost: Callable[[str | None], None],
        *,
        tick: float,
    ) -> _Channel: ...


class EngineHost:
    """Serves a backend: each command in a task, every event back.

    Args:
        tick: Seconds between two looks at the engine's pulse while there is work.
    """

    def __init__(self, tick: float) -> None:
        self._tick = tick
        self._channel: _Channel
        self._backend: InferenceBackend | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unsent: list[list[Any]] = []
        # What will send it: at the end of this turn of the loop, or when tokens have waited.
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._ticking: asyncio.TimerHandle | None = None
        self._closing = asyncio.Event()

    async def serve(self, sock: socket.socket, opener: Callable[[], InferenceBackend]) -> None:
        """Serve until told to close."""
        try:
            backend = opener()
        except Ai4allError as error:
            self._channel = await self._open_channel(sock, None)
            self.say(["unavailable", *error_to_wire(error)])
            await self._leave()
            return
        self._backend = backend
        self._channel = await self._open_channel(sock, backend)
        self.say(["hello", CAPABILITIES.dump_python(backend.capabilities(), mode="json")])
        await self._closing.wait()
        for task in self._tasks.values():
            task.cancel()
        await backend.close()
        await self._leave()

    async def _open_channel(
        self, sock: socket.socket, backend: InferenceBackend | None
    ) -> _Channel:
        if isinstance(backend, _OpensChannel):
            return backend.open_channel(sock, self._on_frame, self._on_lost, tick=self._tick)
        channel = Channel(self._on_frame, self._on_lost)
        await channel.open(sock)
        return channel

    def say(self, message: list[Any], *, can_wait: bool = False) -> None:
        """Send ``message``, with whatever else is said in this turn of the loop.

        Args:
            message: What to say.
            can_wait: It may share a frame with what is said in the next milliseconds. A model that
                is faster than that would keep both processes busy with its tokens.
        """
        self._unsent.append(message)
        if self._soon is not None:
            return
        loop = asyncio.get_running_loop()
        due = self._sent_at + _TOKENS_WAIT_S
        if not can_wait or loop.time() >= due:
            self._soon = loop.call_soon(self._flush)
        elif self._later is None:
            self._later = loop.call_at(due, self._flush)

    def _flush(self, served: int = 0) -> None:
        for handle in (self._soon, self._later):
            if handle is not None:
                handle.cancel()
        self._soon = self._later = None
        if self._unsent:
            self._channel.send(self._unsent, served)
            self._unsent = []
            self._sent_at = asyncio.get_running_loop().time()
        elif served:
            self._channel.served()

    async def _leave(self) -> None:
        self._flush()
        self._channel.close()

    # Commands.

    def _on_frame(self, content: list[Any]) -> None:
        match content:
            case ["generate", int(number), request]:
                self._begin(number, self._generate(number, request))
            case ["cancel", int(number)]:
                if number in self._tasks:
                    self._tasks[number].cancel()
            case ["load", int(number), model, options]:
                self._begin(number, self._load(number, model, options), changes_model=True)
            case ["unload", int(number)]:
                self._begin(number, self._unload(number), changes_model=True)
            case ["embed", int(number), request]:
                self._begin(number, self._embed(number, request))
            case ["score", int(number), request]:
                self._begin(number, self._score(number, request))
            case ["devices", int(number)]:
                self._begin(number, self._devices(number))
            case ["close"]:
                self._closing.set()
            case _:
                raise AssertionError(f"no such command: {content[:1]}")

    def _on_lost(self, _problem: str | None) -> None:
        if not self._closing.is_set():
            # Nobody is there to compute for, and what hangs could not be closed anyway.
            os._exit(0)

    def _begin(
        self, number: int, work: Coroutine[Any, Any, None], *, changes_model: bool = False
    ) -> None:
        running = self._run(number, work, changes_model=changes_model)
        task = self._tasks[number] = asyncio.ensure_future(running)

        def end(_: asyncio.Task[None]) -> None:
            # One that is cancelled before its first step never takes one.
            if number in self._tasks:
                work.close()
                self._end(number, Cancelled("cancelled on request"), changes_model=changes_model)

        task.add_done_callback(end)
        if self._ticking is None:
            loop = asyncio.get_running_loop()
            self._ticking = loop.call_later(self._tick, self._look_at_pulse)

    async def _run(
        self, number: int, work: Coroutine[Any, Any, None], *, changes_model: bool
    ) -> None:
        failure: Exception | None = None
        try:
            await work
        except asyncio.CancelledError:
            failure = Cancelled("cancelled on request")
        except Exception as error:  # noqa: BLE001 - a fault of one command is told, not the end.
            if not isinstance(error, Ai4allError):
                _log_places(error)
            failure = error
        self._end(number, failure, changes_model=changes_model)

    def _end(self, number: int, failure: Exception | None, *, changes_model: bool) -> None:
        del self._tasks[number]
        if failure is not None:
            self.say([number, "error", *error_to_wire(failure)])
        # Somebody waits for the end, which was said just now: not another turn of the loop.
        self._flush(served=int(changes_model))

    async def _load(self, number: int, model: Any, options: Any) -> None:
        if self._serving.capabilities().backend == "cpu":
            # A driver of a GPU takes address space that it never fills.
            _limit_memory()
        loaded = await self._serving.load(
            MODEL_FILE.validate_python(model),
            ENGINE_OPTIONS.validate_python(options),
            lambda share: self.say([number, "share", share]),
        )
        fields = LOADED_MODEL.dump_python(loaded, mode="json", exclude={"file", "draft"})
        self.say([number, "loaded", fields])

    async def _unload(self, number: int) -> None:
        await self._serving.unload()
        self.say([number, "unloaded", None])

    async def _devices(self, number: int) -> None:
        devices = await self._serving.devices()
        self.say([number, "devices", DEVICES.dump_python(devices, mode="json")])

    async def _generate(self, number: int, request: Any) -> None:
        stream = self._serving.generate(GENERATE_REQUEST.validate_python(request))
        try:
            has_tokens = False
            async for event in stream:
                is_token = isinstance(event, TokenEvent)
                self.say([number, *_event_to_wire(event)], can_wait=is_token and has_tokens)
                has_tokens |= is_token
        finally:
            await stream.aclose()

    async def _embed(self, number: int, request: Any) -> None:
        embeddings = await self._serving.embed(EMBED_REQUEST.validate_python(request))
        self.say([number, "done", embeddings_to_wire(embeddings)])

    async def _score(self, number: int, request: Any) -> None:
        scores = await self._serving.score_labels(SCORE_REQUEST.validate_python(request))
        self.say([number, "done", LABEL_SCORES.dump_python(scores, mode="json")])

    @property
    def _serving(self) -> InferenceBackend:
        assert self._backend is not None, "a command before the hello"
        return self._backend

    def _look_at_pulse(self) -> None:
        """While there is work, tell that this process lives, and how far the engine's pulse is.

        The pulse is counted by native code. This timer only carries it, so an engine that hangs
        shows although the loop here turns.
        """
        self._ticking = None
        if self._tasks:
            self.say(["tick", self._serving.pulse()])
            loop = asyncio.get_running_loop()
            self._ticking = loop.call_later(self._tick, self._look_at_pulse)


class _LogToChannel(logging.Handler):
    """Passes the engine's log lines on."""

    def __init__(self, host: EngineHost) -> None:
        super().__init__()
        self._host = host

    def emit(self, record: logging.LogRecord) -> None:
        self._host.say(["log", record.levelno, record.getMessage()])


def _event_to_wire(event: GenerationEvent) -> list[Any]:
    match event:
        case TokenEvent():
            # Without the log probabilities that nobody asked for.
            return ["token", TOKEN_EVENT.dump_python(event, mode="json", exclude_defaults=True)]
        case PromptProgress():
            return ["prompt", PROMPT_PROGRESS.dump_python(event, mode="json")]
        case Completion():
            return ["done", COMPLETION.dump_python(event, mode="json")]


def _log_places(error: Exception) -> None:
    # The places, never the values: a value may be a prompt.
    places = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    log.error("unexpected %s in the engine process: %s", type(error).__name__, ", ".join(places))


def _limit_memory() -> None:
    """Have allocations fail before the machine is out of memory: a file may ask for all of it.

    Weights that are mapped from their file do not count, what is allocated for them does. The
    limit is made anew with each load, because what is free changes.
    """
    if sys.platform != "linux":
        return
    in_use = psutil.Process().memory_info().data
    free = psutil.virtual_memory().available
    most = in_use + max(_LEAST_MEMORY, int(free * _SHARE_OF_MEMORY))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _settle(parent: int) -> None:
    """Make this process one that its parent alone governs."""
    # Whoever stops the worker may signal all its processes; the worker still needs this one to
    # finish what runs, and ends it when that is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    if os.getppid() != parent:
        os._exit(0)
    # A core file would hold prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(all_threads=False)


def main(arguments: Sequence[str], opener: Callable[[], InferenceBackend] = open_backend) -> None:
    """Run the engine process.

    Args:
        arguments: The socket's descriptor, the parent's process id, seconds between two ticks, and
            the least log level that is of interest.
        opener: Opens what computes.
    """
    descriptor, parent, tick, log_level = arguments
    _settle(int(parent))

    async def serve() -> None:
        host = EngineHost(float(tick))
        log.setLevel(int(log_level))
        log.propagate = False
        log.addHandler(_LogToChannel(host))
        with socket.socket(fileno=int(descriptor)) as sock:
            sock.setblocking(False)
            await host.serve(sock, opener)

    asyncio.run(serve())


if __name__ == "__main__":
    main(sys.argv[1:])
