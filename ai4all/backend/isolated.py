"""The engine in a process of its own: its crash is an error, not the end of the worker.

One process is started at a time, and a new one as soon as one has died; the model that was loaded
is loaded again, and requests that come meanwhile wait. Whatever was under way when it died ends in
``EngineCrashed`` or ``EngineHung``. The event loop never waits for the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import psutil
import structlog

from ai4all.backend.base import (
    Capabilities,
    Embeddings,
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    InferenceBackend,
    LabelScores,
    LoadedModel,
    ResourceUsage,
    ScoreRequest,
    TokenEvent,
)
from ai4all.backend.channel import (
    COMPLETION,
    DEVICES,
    FAILED,
    FINISHED,
    LABEL_SCORES,
    LOADED_MODEL,
    PROMPT_PROGRESS,
    TOKEN_EVENT,
    embeddings_from_wire,
    error_from_wire,
    error_to_wire,
    shallow_dict,
)
from ai4all.backend.completions import GenerationSoFar, RunningModel, seed_of
from ai4all.backend.crash_records import CrashRecord, CrashRecords, now
from ai4all.backend.devices import gpus_in
from ai4all.backend.engine_process import HOST_COMMAND, Death, EngineProcess
from ai4all.backend.gpu_monitor import GpuMonitor
from ai4all.backend.quarantine import Quarantine, Subject
from ai4all.backend.supervisor import Supervisor
from ai4all.backend.watchdog import EngineState, Watchdog, WatchdogLimits
from ai4all.errors import (
    Ai4allError,
    BadRequest,
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineHung,
    LoadFailed,
)
from ai4all.types.model import DeviceInfo, ModelFile

__all__ = ["IsolatedBackend"]

_log = structlog.get_logger(__name__)

_MIB: Final = 1024 * 1024

# What may come back for each command, and which of it is the last.
_ANSWERS: Final = {
    "load": frozenset({"share", "loaded", "error"}),
    "unload": frozenset({"unloaded", "error"}),
    "generate": frozenset({"prompt", "token", "finished", "failed", "done", "error"}),
    "embed": frozenset({"done", "error"}),
    "score": frozenset({"done", "error"}),
    "devices": frozenset({"devices", "error"}),
}
_LAST_ANSWERS: Final = frozenset(
    {"loaded", "unloaded", "devices", "finished", "failed", "done", "error"}
)

_RESULTS: Final[dict[str, Callable[[Any], Any]]] = {
    "generate": COMPLETION.validate_python,
    "embed": embeddings_from_wire,
    "score": LABEL_SCORES.validate_python,
}


@dataclass(frozen=True, slots=True)
class _ToLoad:
    """A model, how to run it, and what to hold a death against."""

    model: ModelFile
    options: EngineOptions
    subject: Subject


class _Command:
    """A command that was sent, and what has come back for it so far."""

    def __init__(
        self,
        number: int,
        name: str,
        process: EngineProcess,
        culprit: Subject | None,
        to_load: _ToLoad | None = None,
        so_far: GenerationSoFar | None = None,
    ) -> None:
        self.number = number
        self.name = name
        self.process = process
        # The model at work: the one to blame when the process dies of it.
        self.culprit = culprit
        self.to_load = to_load
        # What the native engine has said of a generation; it leaves the whole to its reader.
        self.so_far = so_far
        self.answers: deque[tuple[str, Any]] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.failure: Ai4allError | None = None
        self.abandoned = False
        self.has_tokens = False

    def put(self, kind: str, body: Any) -> None:
        self.answers.append((kind, body))
        self._wake()

    def fail(self, error: Ai4allError) -> None:
        self.failure = error
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self) -> tuple[str, Any]:
        while not self.answers:
            if self.failure is not None:
                raise self.failure
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        return self.answers.popleft()


class IsolatedBackend(InferenceBackend):
    """llama.cpp in a supervised process.

    Args:
        crash_records: Where deaths are recorded; by default, nowhere.
        quarantine: Which models killed the engine too often; by default, known to this object
            alone.
        limits: How long the engine may make no progress.
        command: Instead of the engine process of this package.

    Attributes:
        limits: As above.
    """

    def __init__(
        self,
        *,
        crash_records: CrashRecords | None = None,
        quarantine: Quarantine | None = None,
        limits: WatchdogLimits | None = None,
        command: Sequence[str] = HOST_COMMAND,
    ) -> None:
        self._records = crash_records if crash_records is not None else CrashRecords(None)
        self._quarantine = quarantine if quarantine is not None else Quarantine()
        self.limits = limits if limits is not None else WatchdogLimits()
        self._command_line = tuple(command)
        self._supervisor = Supervisor(self._spawn, self._restore, self._bury)
        self._watchdog = Watchdog(self.limits)
        self._watching: asyncio.TimerHandle | None = None
        self._watched_at = 0.0
        self._capabilities: Capabilities | None = None
        self._commands: dict[int, _Command] = {}
        self._last_number = 0
        # The model to have again after a restart; when that cannot be, why.
        self._wanted: _ToLoad | None = None
        self._loaded: LoadedModel | None = None
        # The model that the process has by what it last said: it answers in order.
        self._running: RunningModel | None = None
        self._refusal: Ai4allError | None = None
        self._own_figures = psutil.Process()
        self._own_figures.cpu_percent(None)
        self._engine_figures: psutil.Process | None = None
        self._cpu_count = psutil.cpu_count() or 1
        self._monitor = GpuMonitor()
        # The process that was sent away on purpose: its end is no death.
        self._dismissed: EngineProcess | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """``isolated``."""
        return "isolated"

    @property
    def loaded(self) -> LoadedModel | None:
        """The model that is ready, or will be after the restart that is under way."""
        return self._loaded

    @property
    def process_id(self) -> int | None:
        """The engine process, or None while there is none."""
        process = self._supervisor.process
        return None if process is None or process.lost.done() else process.pid

    # Commands.

    async def open(self) -> None:
        """Start the engine process.

        Raises:
            EngineUnavailable: It cannot run here.
            EngineCrashed: It died each time it was started.
            EngineHung: It was started and did not answer.
        """
        await self._supervisor.serving()

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        """Load a model; see ``InferenceBackend.load``.

        Raises:
            LoadFailed: The file could not be loaded, or the model is quarantined.
            OutOfMemory: It does not fit.
            EngineCrashed: The engine died of it.
            EngineHung: The load made no progress.
        """
        process = await self._supervisor.serving()
        subject = Subject(
            model.model_id,
            model.sha256,
            process.capabilities.engine_build,
            # A path says nothing of the content, and may move.
            shallow_dict(options) | {"draft": options.draft and options.draft.sha256},
        )
        self._quarantine.check(subject)
        self._wanted = self._loaded = self._refusal = None
        return await self._load(process, _ToLoad(model, options, subject), progress)

    async def unload(self) -> None:
        """Drop the model and give its memory back."""
        if self._wanted is None:
            return
        self._wanted = self._loaded = self._refusal = None
        command = self._send("unload", await self._supervisor.serving())
        try:
            await command.get()
        except (EngineCrashed, EngineHung):
            # It took the model with it.
            return
        finally:
            self._release(command)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Generate; see ``InferenceBackend.generate``. Timings are those of the native loop.

        Raises:
            EngineCrashed: The engine died under it.
            EngineHung: The engine made no progress.
        """
        # Drawn here: the completion's fingerprint is made here too.
        seed = seed_of(request)
        fields = {**_fields_of(request), "seed": seed}
        so_far = GenerationSoFar(request, seed)
        command, waited_ms = await self._submit("generate", fields, request.deadline, so_far)
        try:
            while True:
                kind, event = await command.get()
                if kind == "done":
                    yield _after_waiting(event, waited_ms)
                    return
                yield event
        finally:
            self._release(command)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts; see ``InferenceBackend.embed``."""
        embeddings: Embeddings = await self._job("embed", request, request.deadline)
        return embeddings

    async def score_labels(self, request: ScoreRequest) -> LabelScores:
        """Score continuations; see ``InferenceBackend.score_labels``."""
        scores: LabelScores = await self._job("score", request, request.deadline)
        return scores

    async def close(self) -> None:
        """End all work and the process: politely, and by force where that takes too long."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    # Figures.

    def memory_mb(self) -> int:
        """Resident memory of both processes, in MiB; what they share counts twice."""
        memory = self._own_figures.memory_info().rss
        if self._engine_figures is not None:
            with contextlib.suppress(psutil.Error):
                memory += self._engine_figures.memory_info().rss
        return int(memory) // _MIB

    def resource_usage(self) -> ResourceUsage:
        """What this process and the engine's use now, together; of the CPU since the last call."""
        cpu = self._own_figures.cpu_percent(None)
        if self._engine_figures is not None:
            # It may have died, and its burial is still to come.
            with contextlib.suppress(psutil.Error):
                cpu += self._engine_figures.cpu_percent(None)
        loaded = self._loaded
        in_use = gpus_in(loaded.device) if loaded is not None else ()
        known = self._capabilities.devices if self._capabilities is not None else ()
        gpus = self._monitor.figures(device for device in known if device.name in in_use)
        return ResourceUsage(
            cpu_percent=round(min(100.0, cpu / self._cpu_count), 1),
            memory_mb=self.memory_mb(),
            gpu_percent=gpus.percent,
            gpu_memory_mb=gpus.memory_used_mb,
            active_threads=loaded.threads if loaded is not None and self._commands else 0,
            gpus=gpus.each,
        )

    def capabilities(self) -> Capabilities:
        """What the engine said of itself when it was started.

        Raises:
            EngineError: It never was; see ``open``.
        """
        if self._capabilities is None:
            raise EngineError("the engine process has not been started")
        return self._capabilities

    async def devices(self) -> tuple[DeviceInfo, ...]:
        """The devices as the engine process sees them now.

        Raises:
            EngineCrashed: It died of the question, as of a driver that has gone.
            EngineHung: The driver does not answer.
        """
        command = self._send("devices", await self._supervisor.serving())
        try:
            _, devices = await command.get()
        finally:
            self._release(command)
        if self._capabilities is not None:
            self._capabilities = replace(self._capabilities, devices=devices)
        found: tuple[DeviceInfo, ...] = devices
        return found

    async def look_again(self) -> bool:
        """Have another engine process, which asks the drivers anew; see ``InferenceBackend``."""
        process = self._supervisor.in_service
        if process is None or self._commands:
            return False
        self._dismissed = process
        self._supervisor.retire()
        process.send(["close"])
        await asyncio.wait({process.lost}, timeout=self.limits.close)
        process.kill()
        await self._supervisor.serving()
        return True

    def cpu_seconds(self) -> float:
        """Processor time of this process and the engine's."""
        seconds = time.process_time()
        if self._engine_figures is not None:
            with contextlib.suppress(psutil.Error):
                used = self._engine_figures.cpu_times()
                seconds += used.user + used.system
        return seconds

    # The way of a command.

    async def _load(
        self,
        process: EngineProcess,
        to_load: _ToLoad,
        progress: Callable[[float], None] | None,
    ) -> LoadedModel:
        file = {**shallow_dict(to_load.model), "path": str(to_load.model.path)}
        options = shallow_dict(to_load.options)
        command = self._send("load", process, file, options, to_load=to_load)
        try:
            while True:
                kind, answer = await command.get()
                if kind == "loaded":
                    loaded: LoadedModel = answer
                    return loaded
                if progress is not None:
                    progress(answer)
        finally:
            self._release(command)

    async def _job(self, name: str, request: Any, deadline: float | None) -> Any:
        command, waited_ms = await self._submit(name, _fields_of(request), deadline)
        try:
            _, result = await command.get()
        finally:
            self._release(command)
        return _after_waiting(result, waited_ms)

    async def _submit(
        self,
        name: str,
        fields: dict[str, Any],
        deadline: float | None,
        so_far: GenerationSoFar | None = None,
    ) -> tuple[_Command, float]:
        """Send a request to the process that serves; returns the milliseconds waited for it."""
        process, waited = self._supervisor.in_service, 0.0
        if process is None:
            began = time.monotonic()
            process = await self._supervisor.serving(deadline)
            waited = time.monotonic() - began
        if self._refusal is not None:
            # A copy: an exception that is raised twice carries both ways.
            raise error_from_wire(*error_to_wire(self._refusal))
        if self._wanted is None and not any(
            each.to_load is not None and not each.abandoned for each in self._commands.values()
        ):
            # What a load that was given up has left there is nobody's.
            raise EngineError("no model is loaded")
        command = self._send(name, process, fields, so_far=so_far)
        return command, waited * 1000.0

    def _send(
        self,
        name: str,
        process: EngineProcess,
        *body: Any,
        to_load: _ToLoad | None = None,
        so_far: GenerationSoFar | None = None,
    ) -> _Command:
        self._last_number += 1
        # A driver that dies of a question dies of no model.
        at_work = None if name == "devices" else to_load or self._wanted
        culprit = at_work.subject if at_work is not None else None
        command = _Command(self._last_number, name, process, culprit, to_load, so_far)
        self._commands[command.number] = command
        process.send([name, command.number, *body])
        if self._watching is None:
            self._watchdog.moved()
            self._watch()
        return command

    def _release(self, command: _Command) -> None:
        if command.number in self._commands:
            # Still there until the process says that it has let go.
            command.abandoned = True
            command.process.send(["cancel", command.number])

    def _on_message(self, process: EngineProcess, message: list[Any]) -> None:
        """Take what the process says.

        Raises:
            LookupError, TypeError, ValueError: It is not what it may say.
        """
        match message:
            case ["tick", int(pulse)]:
                self._watchdog.felt(pulse)
            case [int(number), str(kind), *rest]:
                command = self._commands.get(number)
                # One that was given up when the backend was closed is nobody's any more.
                if command is not None:
                    self._on_answer(command, kind, rest)
            case _:
                raise LookupError("no such message")

    def _on_answer(self, command: _Command, kind: str, rest: list[Any]) -> None:
        if kind not in _ANSWERS[command.name]:
            raise LookupError(f"{kind!r} is no answer to {command.name!r}")
        self._watchdog.moved()
        answer: Any = None
        match kind:
            case "token":
                command.has_tokens = self._supervisor.did_work = True
                answer = TOKEN_EVENT.validate_python(rest[0])
                if command.so_far is not None:
                    command.so_far.add(answer)
            case "prompt":
                answer = PROMPT_PROGRESS.validate_python(rest[0])
            case "share":
                answer = float(rest[0])
                if not 0.0 <= answer <= 1.0:
                    raise ValueError("a share is between 0 and 1")
            case "loaded" if command.to_load is not None:
                asked = command.to_load
                fields = {**rest[0], "file": asked.model, "draft": asked.options.draft}
                answer = self._loaded = LOADED_MODEL.validate_python(fields)
                self._wanted, self._refusal = command.to_load, None
                self._running = RunningModel(answer, asked.options)
            case "devices":
                answer = DEVICES.validate_python(rest[0])
            case "finished":
                self._finish(command, rest[0])
            case "failed":
                answer = FAILED.validate_python(rest[0]).error()
            case "done":
                answer = _RESULTS[command.name](rest[0])
                self._supervisor.did_work = True
            case "unloaded":
                self._running = None
            case "error":
                answer = error_from_wire(*rest)
                if command.to_load is not None and self._wanted in (None, command.to_load):
                    self._running = None
        # Not before the answer has been read: whoever sends nonsense leaves the command open, and
        # with his end it is ended.
        if kind in _LAST_ANSWERS:
            del self._commands[command.number]
        if kind in ("error", "failed"):
            command.fail(answer)
        elif not command.abandoned and kind != "finished":
            command.put(kind, answer)

    def _finish(self, command: _Command, told: Any) -> None:
        """Make a whole of what the native engine told of a generation."""
        end = FINISHED.validate_python(told)
        if command.so_far is None:
            raise LookupError("an end of what is no generation")
        if self._running is None:
            # Of a load that was cancelled, but too late.
            command.fail(
                EngineClosed("the model was given up while its last events were on the way")
            )
            return
        if end.text:
            # What was kept back as a possible stop sequence is text after all.
            command.put("token", command.so_far.add(TokenEvent(end.text, (), end.n_tokens)))
        build = command.process.capabilities.engine_build
        command.put("done", command.so_far.completion(end, self._running, build))
        self._supervisor.did_work = True

    # Watching over the process.

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        self._watched_at = loop.time()
        self._watching = loop.call_later(self.limits.interval, self._look)

    def _look(self) -> None:
        self._watching = None
        process = self._supervisor.process
        if process is None or not self._commands:
            return
        state = self._state()
        passed = asyncio.get_running_loop().time() - self._watched_at
        seconds = self._watchdog.passed(passed, state)
        if seconds is not None and not process.lost.done():
            process.kill_hung(state, seconds)
        else:
            self._watch()

    def _state(self) -> EngineState:
        commands = self._commands.values()
        if not commands:
            return EngineState.IDLE
        if any(command.name == "load" for command in commands):
            return EngineState.LOADING
        if all(command.has_tokens for command in commands):
            return EngineState.DECODE
        return EngineState.PREFILL

    # Death and what comes after; called by the supervisor.

    async def _spawn(self) -> EngineProcess:
        process = await EngineProcess.spawn(self._command_line, self.limits, self._on_message)
        self._running = None
        self._capabilities = process.capabilities
        self._engine_figures = None
        with contextlib.suppress(psutil.Error):
            self._engine_figures = psutil.Process(process.pid)
            self._engine_figures.cpu_percent(None)
        return process

    async def _restore(self, process: EngineProcess) -> None:
        """Load again what was loaded."""
        wanted = self._wanted
        if wanted is None:
            return
        model_id = wanted.model.model_id
        try:
            self._quarantine.check(wanted.subject)
            await self._load(process, wanted, None)
            _log.info("model_restored", model_id=model_id)
        except Ai4allError as error:
            if process.lost.done():
                # It died of the load. Whether there is another try, the quarantine says.
                return
            _log.error("model_not_restored", model_id=model_id, error=str(error))
            self._lose_model(error)

    async def _bury(self, process: EngineProcess, death: Death) -> None:
        """Record a death and tell everybody who waited."""
        self._engine_figures = None
        if process is self._dismissed:
            self._dismissed = None
            return
        mourning = [command for command in self._commands.values() if command.process is process]
        state = self._state()
        culprit = next((c.culprit for c in mourning if c.culprit is not None), None)
        if any(command.name == "devices" for command in mourning):
            # Perhaps of the question, which a driver that has gone does not survive.
            culprit = None
        details: dict[str, Any] = {
            "signal": death.signal,
            "exit_status": death.exit_status,
            "state": state.value,
            "crash_record": None,
        }
        try:
            details["crash_record"] = await self._record(process, death, state, culprit)
            _log.error("engine_died", how=str(death), process_id=process.pid, **details)
            await self._count(culprit)
        finally:
            # Whatever goes wrong: nobody waits for a process that has gone.
            kind = EngineHung if death.hung_in is not None else EngineCrashed
            for command in mourning:
                self._commands.pop(command.number, None)
                command.fail(kind(f"the engine {death}", dict(details)))

    async def _record(
        self, process: EngineProcess, death: Death, state: EngineState, culprit: Subject | None
    ) -> str | None:
        held = self._wanted.subject if self._wanted is not None else None
        model = culprit or held
        record = CrashRecord(
            time=now(),
            kind="hung" if death.hung_in is not None else "crashed",
            state=state.value,
            signal=death.signal,
            exit_status=death.exit_status,
            assertion=death.assertion,
            fault=death.fault,
            problem=death.problem,
            model_sha256=model.model_sha256 if model is not None else None,
            engine_build=process.capabilities.engine_build,
            options=dict(model.options) if model is not None else None,
            seconds=death.hung_s,
            process_id=process.pid,
        )
        try:
            return await asyncio.to_thread(self._records.add, record)
        except OSError as error:
            _log.warning("crash_not_recorded", error=error.strerror or str(error))
            return None

    async def _count(self, culprit: Subject | None) -> None:
        """Hold a death against the model that was at work."""
        if culprit is None:
            return
        try:
            held = await asyncio.to_thread(self._quarantine.record_death, culprit)
        except OSError as error:
            _log.warning("quarantine_not_kept", error=error.strerror or str(error))
            held = True
        if held:
            try:
                self._quarantine.check(culprit)
            except LoadFailed as error:
                _log.error("model_quarantined", model_id=culprit.model_id, error=str(error))
                self._lose_model(error)

    def _lose_model(self, why: Ai4allError) -> None:
        self._wanted = self._loaded = None
        self._refusal = why

    async def _close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        commands = list(self._commands.values())
        self._commands.clear()
        for command in commands:
            command.fail(EngineClosed("the backend is closed"))
        self._wanted = self._loaded = None
        self._monitor.close()
        await self._supervisor.close(self.limits.close)
        self._engine_figures = None


def _fields_of(request: GenerateRequest | EmbedRequest | ScoreRequest) -> dict[str, Any]:
    """A request as it crosses; JSON has no infinity.

    Raises:
        BadRequest: A number is none.
    """
    fields = shallow_dict(request)
    if fields["deadline"] == math.inf:
        fields["deadline"] = None
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRequest(f"{name} is {value}; it must be a finite number")
    return fields


def _after_waiting(result: Any, waited_ms: float) -> Any:
    """Add to a result's timings what it waited for a process: a load, as the native loop has it."""
    if waited_ms == 0.0:
        return result
    timings = result.timings
    first = timings.time_to_first_token_ms
    delayed = replace(
        timings,
        load_ms=timings.load_ms + waited_ms,
        time_to_first_token_ms=None if first is None else first + waited_ms,
        total_ms=timings.total_ms + waited_ms,
    )
    return replace(result, timings=delayed)
