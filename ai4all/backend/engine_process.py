"""One engine process as its parent sees it: started clean, spoken to over a socket, buried."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ai4all
from ai4all.backend.base import Capabilities
from ai4all.backend.channel import CAPABILITIES, Channel, error_from_wire
from ai4all.backend.crash_records import assertion_in, fault_in, signal_name
from ai4all.backend.watchdog import EngineState, WatchdogLimits
from ai4all.errors import Ai4allError, EngineCrashed, EngineHung, EngineUnavailable

__all__ = ["Death", "EngineProcess", "HOST_COMMAND", "engine_environment"]

# -P: nothing in the current directory can stand in for a module.
HOST_COMMAND: Final = (sys.executable, "-P", "-m", "ai4all.backend.host")

_PACKAGE_PARENT: Final = str(Path(ai4all.__file__).resolve().parents[1])

# An allow-list: what is not named here may be a secret, and none of it is the engine's business.
_VARIABLES: Final = frozenset(
    {
        "HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TEMP", "TMP",
        "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "XDG_CACHE_HOME", "XDG_CONFIG_DIRS",
        "XDG_CONFIG_HOME", "XDG_DATA_DIRS", "XDG_DATA_HOME", "XDG_RUNTIME_DIR",
    }
)  # fmt: skip
_VARIABLE_PREFIXES: Final = (
    "ASAN_", "CUDA_", "DYLD_", "GGML_", "GOMP_", "GPU_", "HIP_", "HSA_", "KMP_", "LC_", "LSAN_",
    "METAL_", "MTL_", "NVIDIA_", "OMP_", "PYTHON", "ROCR_", "TSAN_", "UBSAN_", "VK_",
)  # fmt: skip

_STDERR_BYTES: Final = 64 * 1024

# From the end of the channel to the end of the process; then it is killed.
_EXIT_AFTER_LOSS_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended.

    Attributes:
        signal: Name of the signal, or None.
        exit_status: The exit status when no signal ended it.
        assertion: The failed assertion, with file and line.
        fault: The last word of a run-time library.
        problem: What rule of the channel it broke.
        hung_in: What it was doing when it was killed for making no progress.
        hung_s: For how long it had made none.
    """

    signal: str | None
    exit_status: int | None
    assertion: str | None
    fault: str | None
    problem: str | None
    hung_in: EngineState | None
    hung_s: float | None

    def __str__(self) -> str:
        if self.hung_in is not None:
            return f"made no progress for {self.hung_s:.3g} s ({self.hung_in.value})"
        if self.problem is not None:
            return f"broke off the conversation with {self.problem}"
        if self.assertion is not None:
            return f"aborted: {self.assertion}"
        if self.signal == "SIGKILL":
            return "was killed (SIGKILL), perhaps for want of memory"
        if self.signal is not None:
            return f"died of {self.signal}"
        return f"ended with status {self.exit_status}"


class EngineProcess:
    """An engine process, from ``spawn`` to ``exited``. Belongs to the loop's thread.

    Attributes:
        capabilities: What it said first; set once ``spawn`` has returned.
        lost: Done when it will say no more.
    """

    def __init__(self, on_message: Callable[[EngineProcess, list[Any]], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hello: asyncio.Future[Capabilities] = asyncio.get_running_loop().create_future()
        self._channel = Channel(self._on_frame, self._on_channel_lost)
        self._on_message = on_message
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._stderr = bytearray()
        self._problem: str | None = None
        self._hung_in: EngineState | None = None
        self._hung_s: float | None = None

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        limits: WatchdogLimits,
        on_message: Callable[[EngineProcess, list[Any]], None],
    ) -> EngineProcess:
        """Start a process and wait for its first word.

        Args:
            command: What to run; descriptor, own process id, tick and log level are added.
            limits: ``start`` and ``interval`` of these count here.
            on_message: Called with each later message.

        Raises:
            EngineUnavailable: It says that it cannot compute here, or it cannot be started.
            EngineCrashed: It died before it said anything.
            EngineHung: It said nothing within ``limits.start``.
        """
        self = cls(on_message)
        try:
            await self._start(command, limits)
            word: set[asyncio.Future[Any]] = {self._hello, self.lost}
            await asyncio.wait(word, timeout=limits.start, return_when=asyncio.FIRST_COMPLETED)
            if self._hello.done():
                # Raises what it said when that was a refusal.
                self._hello.result()
                return self
            if not self.lost.done():
                self.kill_hung(EngineState.STARTING, limits.start)
            death = await self.exited()
            kind = EngineHung if death.hung_in is not None else EngineCrashed
            raise kind(f"the engine process {death} before it was ready", {"signal": death.signal})
        except BaseException:
            await self._discard()
            raise

    async def _start(self, command: Sequence[str], limits: WatchdogLimits) -> None:
        level = logging.getLogger("ai4all.engine").getEffectiveLevel()
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _not_started(error) from error
        try:
            ours.setblocking(False)
            await self._channel.open(ours)
            arguments = (theirs.fileno(), os.getpid(), limits.interval, level)
            # From the loop's thread: Linux ends the child together with the thread that made it.
            # In a session of its own: Ctrl-C on the terminal is for the worker alone.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                *map(str, arguments),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=engine_environment(os.environ),
            )
        except OSError as error:
            raise _not_started(error) from error
        finally:
            theirs.close()
        self._reading = asyncio.ensure_future(self._read_stderr())

    # Life.

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self._hello.result()

    def send(self, message: list[Any]) -> None:
        """Send a command."""
        self._channel.send(message)

    def kill(self) -> None:
        """End it now, hung or not."""
        if self._process is not None and self._process.returncode is None:
            # Not by the process' own method: that may reap it, and how it ended would be lost.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def kill_hung(self, state: EngineState, seconds: float) -> None:
        """End it because it made no progress."""
        self._hung_in, self._hung_s = state, seconds
        self.kill()

    def break_off(self, problem: str) -> None:
        """End it because it does not keep to the rules."""
        self._problem = problem
        self._channel.break_off(problem)
        self.kill()

    async def exited(self, within: float = _EXIT_AFTER_LOSS_S) -> Death:
        """Wait for its end, which is forced after ``within`` seconds; tells how it was."""
        assert self._process is not None
        try:
            async with asyncio.timeout(within):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        await self._process.wait()
        if self._reading is not None:
            # Somebody else may still hold the other end.
            await asyncio.wait({self._reading}, timeout=_EXIT_AFTER_LOSS_S)
            self._reading.cancel()
            await asyncio.wait({self._reading})
        self._channel.close()
        status = self._process.returncode
        assert status is not None
        stderr = self._stderr.decode("utf-8", "replace")
        return Death(
            signal=signal_name(-status) if status < 0 else None,
            exit_status=status if status >= 0 else None,
            assertion=assertion_in(stderr),
            fault=fault_in(stderr),
            problem=self._problem,
            hung_in=self._hung_in,
            hung_s=self._hung_s,
        )

    async def _discard(self) -> None:
        """Leave nothing behind of a start that failed."""
        self._channel.close()
        if self._process is not None:
            self.kill()
            await asyncio.shield(self.exited())

    # What comes from it.

    async def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(8192):
            self._stderr += chunk
            del self._stderr[:-_STDERR_BYTES]

    def _on_frame(self, content: Any) -> None:
        try:
            if not isinstance(content, list):
                raise TypeError("a frame is a list")
            for message in content:
                self._take(message)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            # What it says is not trusted further than this.
            self.break_off(f"a message that cannot be read ({type(error).__name__})")

    def _take(self, message: list[Any]) -> None:
        match message:
            case ["hello", dict(fields)] if not self._hello.done():
                self._hello.set_result(CAPABILITIES.validate_python(fields))
            case ["unavailable", str(kind), str(text), details] if not self._hello.done():
                self._hello.set_exception(error_from_wire(kind, text, details))
            case ["log", int(level), str(text)]:
                logging.getLogger("ai4all.engine").log(level, "%s", text)
            case _:
                self._on_message(self, message)

    def _on_channel_lost(self, problem: str | None) -> None:
        self._problem = self._problem or problem
        if not self.lost.done():
            self.lost.set_result(None)


def _not_started(error: OSError) -> Ai4allError:
    text = f"the engine process cannot be started: {error.strerror or error}"
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
        return EngineUnavailable(text)
    # No more processes, descriptors or memory: that can change.
    return EngineCrashed(text)


def engine_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine process: what its libraries need, and none of our settings."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
    }
    # It imports this very package, wherever the worker found it.
    paths = [_PACKAGE_PARENT, kept.get("PYTHONPATH", "")]
    kept["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # No debugger is forked when an assertion fails.
    kept["GGML_NO_BACKTRACE"] = "1"
    return kept
