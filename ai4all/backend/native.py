"""The engine in this process, as asyncio sees it. The only importer of the extension.

The engine's thread appends events and makes a descriptor readable; the loop's reader takes all of
them at once and hands each to the stream it belongs to. No lock is held and no thread is entered
on the way, so the loop never waits for the engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ujson

from ai4all import _engine
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
    PromptProgress,
    ResourceUsage,
    ScoreRequest,
    TokenEvent,
    TokenLogprob,
)
from ai4all.backend.completions import (
    Failed,
    Finished,
    GenerationSoFar,
    RunningModel,
    native_error,
    seed_of,
    timings_of,
)
from ai4all.backend.cores import cgroup_memory_available_mb, compute_threads
from ai4all.backend.devices import TARGETS, choose_devices, gpus_in
from ai4all.backend.drivers import driver_of
from ai4all.backend.gpu_monitor import GpuMonitor
from ai4all.errors import Ai4allError, EngineClosed, EngineError
from ai4all.types.model import DeviceInfo, DeviceShare, ModelFile

__all__ = [
    "NativeBackend",
    "NativeChannel",
    "engine_build_info",
    "engine_build_line",
    "engine_capabilities",
    "engine_devices",
    "quantize_file",
]

log = logging.getLogger("ai4all.engine")

_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_BACKEND_NAMES = {key: target.name for target in TARGETS for key in target.keys}
_MIB = 1024 * 1024
_DEFAULT_UBATCH = 512


def _error(code: int, message: str) -> Ai4allError:
    return native_error(_engine.ERROR_NAMES[code], message)


def engine_build_info() -> dict[str, Any]:
    """How the extension was built: upstream commit, backends, CPU features, compiler."""
    return _engine.build_info()


def engine_devices() -> tuple[DeviceInfo, ...]:
    """The compute devices the build can see, those that compute by default first.

    Asks their drivers, which may take a moment.
    """
    found = [_device(device) for device in _engine.devices()]
    return tuple(sorted(found, key=lambda device: not device.is_gpu))


def _device(told: dict[str, Any]) -> DeviceInfo:
    backend = _BACKEND_NAMES.get(told["backend"], told["backend"].lower())
    free = told["memory_free"] // _MIB
    if told["kind"] == "cpu":
        # The engine names the whole memory as free.
        limit = cgroup_memory_available_mb()
        free = psutil.virtual_memory().available // _MIB
        free = free if limit is None else min(free, limit)
    return DeviceInfo(
        name=told["name"],
        kind=told["kind"],
        description=told["description"],
        memory_mb=told["memory_total"] // _MIB,
        memory_free_mb=free,
        backend=backend,
        address=told["id"],
        driver=driver_of(backend, told["id"]),
    )


def engine_capabilities() -> Capabilities:
    """What the build and the machine can do. Asks the drivers."""
    return _capabilities(engine_devices())


def quantize_file(source: Path, target: Path, type_name: str, threads: int) -> None:
    """Re-encode a model file in this process; blocks until done. A bad file may abort it.

    Args:
        source: The file to read.
        target: The file to write.
        type_name: Such as "Q8_0".
        threads: Threads to compute with.

    Raises:
        BadRequest: There is no such type.
        LoadFailed: The file cannot be read or written.
        OutOfMemory: There is not enough memory for it.
    """
    try:
        _engine.quantize(os.fsencode(source), os.fsencode(target), type=type_name, threads=threads)
    except _engine.EngineFault as fault:
        raise _error(*fault.args) from None


def engine_build_line() -> str:
    """The build in one line, such as ``llama.cpp 0c1e570 cpu avx2`` or ``… cpu avx2/haswell``.

    All that changes a result's last bits is in it: ``interleaved`` says that kernels of ours are.
    """
    info = _engine.build_info()
    backends = [name for name in info["backends"] if name != "CPU"]
    backend = ",".join(_BACKEND_NAMES.get(name, name.lower()) for name in backends) or "cpu"
    features = set(info["cpu_features"])
    level = next((f for f in ("AVX512", "AVX2", "AVX", "SVE", "NEON") if f in features), "generic")
    # Where a wheel brings several, the variant of the CPU kernels that was chosen here.
    variant = f"/{info['cpu_variant']}" if info.get("cpu_variant") else ""
    ours = " interleaved" if "CPU_INTERLEAVED" in features else ""
    return f"llama.cpp {info['llama_commit'][:7]} {backend} {level.lower()}{variant}{ours}"


def _capabilities(devices: tuple[DeviceInfo, ...]) -> Capabilities:
    first = devices[0]
    return Capabilities(
        backend=first.backend,
        devices=devices,
        engine_build=engine_build_line(),
        vram_mb=first.memory_mb if first.is_gpu else None,
        build_info=_engine.build_info(),
    )


class _Stream:
    """Events of one command on their way to the coroutine that waits for them."""

    __slots__ = ("ended", "events", "running", "to_load", "waiter")

    def __init__(self, to_load: tuple[ModelFile, EngineOptions] | None = None) -> None:
        self.events: deque[tuple[Any, ...]] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.ended = False
        self.to_load = to_load
        # The model that served the command, as it was when the last event came.
        self.running: RunningModel | None = None

    def put(self, event: tuple[Any, ...]) -> None:
        self.events.append(event)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self) -> tuple[Any, ...]:
        while not self.events:
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        return self.events.popleft()

    def take(self, kind: int) -> Iterator[tuple[Any, ...]]:
        """Take the events of one kind that are here, up to the first of another."""
        while self.events and self.events[0][0] == kind:
            yield self.events.popleft()


class NativeChannel:
    """A ``Channel`` whose generations never reach Python; see ``ext/engine/channel.h``."""

    def __init__(
        self,
        engine: _engine.Engine,
        descriptor: int,
        on_frame: Callable[[Any], None],
        on_lost: Callable[[str | None], None],
        tick: float,
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._channel = _engine.Channel(
            engine, descriptor, tick_ns=int(tick * 1e9), log_level=log.getEffectiveLevel()
        )
        self._loop.add_reader(self._channel.fileno(), self._on_ready)

    def send(self, content: list[Any], served: int = 0) -> None:
        """Send a frame, which answers so many of the loads and unloads that came."""
        payload = ujson.dumps(content, escape_forward_slashes=False).encode("ascii")
        self._channel.send(payload, served)

    def served(self) -> None:
        """Tell that a load or an unload has been served without an answer."""
        self._channel.served(1)

    def close(self) -> None:
        """Send what is left, for at most a second, and close. The engine is closed first."""
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()

    def _on_ready(self) -> None:
        frames, is_open = self._channel.take()
        try:
            for frame in frames:
                self._on_frame(ujson.loads(frame))
        except Exception:
            # What follows a frame that was not served cannot be relied on.
            self._lose("a frame that cannot be served")
            raise
        if not is_open:
            self._lose(None)

    def _lose(self, problem: str | None) -> None:
        self._loop.remove_reader(self._channel.fileno())
        self._on_lost(problem)


class NativeBackend(InferenceBackend):
    """llama.cpp in this process. A crash of the engine is a crash of the process.

    Args:
        queue_capacity: Most commands that wait in the engine; beyond it ``EngineBusy`` is raised.
    """

    def __init__(self, queue_capacity: int = 1024) -> None:
        self._engine = _engine.Engine(queue_capacity)
        self._streams: dict[int, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: RunningModel | None = None
        self._closed = False
        self._process = psutil.Process()
        self._process.cpu_percent(None)
        self._cpu_count = psutil.cpu_count() or 1
        self._build_line = engine_build_line()
        self._device_list = engine_devices()
        self._monitor = GpuMonitor()

    @property
    def name(self) -> str:
        """``native``."""
        return "native"

    @property
    def loaded(self) -> LoadedModel | None:
        """The model that is ready, if any."""
        return self._running.loaded if self._running is not None else None

    # Commands.

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        """Load a model in place of the one held before; see ``InferenceBackend.load``."""
        threads = options.threads or compute_threads()
        # Named one by one, so that a device that has gone is an error and not the CPU instead.
        names = choose_devices(
            self._device_list,
            options.device,
            build=_engine.build_info(),
            allow_cpu_fallback=options.allow_cpu_fallback,
        ).names
        self._running = None
        stream, command = self._submit(
            lambda: self._engine.load(
                os.fsencode(model.path),
                n_ctx=options.n_ctx,
                n_batch=options.n_batch,
                n_ubatch=options.n_ubatch or _DEFAULT_UBATCH,
                n_slots=options.n_slots,
                n_threads=threads,
                n_threads_batch=options.threads_batch or threads,
                n_gpu_layers=options.gpu_layers,
                flash_attention=_FLASH_ATTENTION[options.flash_attention],
                kv_type=options.kv_type,
                use_mmap=options.use_mmap,
                prefix_cache_bytes=options.prefix_cache_mb * _MIB,
                draft_path=os.fsencode(options.draft.path) if options.draft is not None else b"",
                draft_tokens=options.draft_tokens,
                devices=tuple(name.encode() for name in names),
            ),
            to_load=(model, options),
        )
        try:
            while True:
                event = await stream.get()
                if event[0] == _engine.LOAD_PROGRESS:
                    if progress is not None:
                        progress(event[2])
                elif event[0] == _engine.LOADED:
                    break
                else:
                    raise _error(event[2], event[3])
        finally:
            self._release(command, stream)
        if stream.running is None:
            raise EngineError("another load or unload overtook this one")
        return stream.running.loaded

    async def unload(self) -> None:
        """Drop the model and give its memory back."""
        if self._running is None:
            return
        self._running = None
        stream, command = self._submit(self._engine.unload)
        try:
            event = await stream.get()
            if event[0] == _engine.FAILED:
                raise _error(event[2], event[3])
        finally:
            self._release(command, stream)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Generate; see ``InferenceBackend.generate``."""
        seed = seed_of(request)
        stream, command = self._submit(lambda: self._submit_generate(request, seed))
        so_far = GenerationSoFar(request, seed)
        try:
            while True:
                event = await stream.get()
                kind = event[0]
                if kind == _engine.TOKEN:
                    # With those that came since the loop last had time to look.
                    since = [event, *stream.take(_engine.TOKEN)]
                    yield so_far.add(
                        TokenEvent(
                            "".join([event[2] for event in since]),
                            tuple([event[3] for event in since]),
                            since[-1][4],
                            tuple([_logprob(event[5]) for event in since if event[5]]),
                        )
                    )
                elif kind == _engine.PROMPT_PROGRESS:
                    yield PromptProgress(event[2], event[3])
                elif kind == _engine.FINISHED:
                    end = _finished(event)
                    if end.text:
                        # What was kept back as a possible stop sequence is text after all.
                        yield so_far.add(TokenEvent(end.text, (), end.n_tokens))
                    yield so_far.completion(end, _served(stream), self._build_line)
                    return
                else:
                    raise _failed(event).error()
        finally:
            self._release(command, stream)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts; see ``InferenceBackend.embed``. The rows are the engine's own memory."""
        texts = tuple(text.encode("utf-8", "replace") for text in request.texts)
        event, running = await self._job(
            lambda: self._engine.embed(
                texts, normalize=request.normalize, deadline_ns=_deadline_ns(request.deadline)
            )
        )
        # Here alone: most workers never embed, and numpy costs a tenth of a second and 12 MiB.
        import numpy as np

        _, _, floats, (rows, columns), n_prompt, times = event
        return Embeddings(
            vectors=np.frombuffer(floats, dtype=np.float32).reshape(rows, columns),
            prompt_tokens=n_prompt,
            timings=timings_of(times, n_prompt, 0),
            fingerprint=running.fingerprint(self._build_line),
        )

    async def score_labels(self, request: ScoreRequest) -> LabelScores:
        """Score continuations; see ``InferenceBackend.score_labels``."""
        system = request.system_prompt
        event, running = await self._job(
            lambda: self._engine.score(
                request.prompt.encode("utf-8", "replace"),
                system_prompt=None if system is None else system.encode("utf-8", "replace"),
                continuations=tuple(
                    text.encode("utf-8", "replace") for text in request.continuations
                ),
                deadline_ns=_deadline_ns(request.deadline),
            )
        )
        _, _, floats, counts, n_prompt, times = event
        return LabelScores(
            log_likelihoods=tuple(memoryview(floats).cast("B").cast("f")),
            token_counts=counts,
            prompt_tokens=n_prompt,
            timings=timings_of(times, n_prompt, 0),
            fingerprint=running.fingerprint(self._build_line),
        )

    async def _job(self, send: Callable[[], int]) -> tuple[tuple[Any, ...], RunningModel]:
        stream, command = self._submit(send)
        try:
            event = await stream.get()
        finally:
            self._release(command, stream)
        if event[0] == _engine.FAILED:
            raise _failed(event).error()
        return event, _served(stream)

    async def close(self) -> None:
        """End all work, join the engine's thread and free everything.

        The order matters: the engine stops, what was pending ends in its last events, those are
        handed on, and only then is the descriptor given back to the loop.
        """
        if self._closed:
            return
        self._closed = True
        self._running = None
        self._monitor.close()
        # Joining waits for what is being computed; not on the loop's thread.
        await asyncio.shield(asyncio.to_thread(self._engine.close))
        self._on_ready()
        if self._loop is not None:
            self._loop.remove_reader(self._engine.fileno())

    # Figures.

    def memory_mb(self) -> int:
        """Resident memory of this process, in MiB."""
        return int(self._process.memory_info().rss) // _MIB

    def resource_usage(self) -> ResourceUsage:
        """What this process uses now; its share of the CPU is that since the last call."""
        cpu = self._process.cpu_percent(None) / self._cpu_count
        busy = any(not stream.ended for stream in self._streams.values())
        in_use = gpus_in(self._running.loaded.device) if self._running is not None else ()
        gpus = self._monitor.figures(each for each in self._device_list if each.name in in_use)
        return ResourceUsage(
            cpu_percent=round(min(100.0, cpu), 1),
            memory_mb=self.memory_mb(),
            gpu_percent=gpus.percent,
            gpu_memory_mb=gpus.memory_used_mb,
            active_threads=self._running.loaded.threads if self._running and busy else 0,
            gpus=gpus.each,
        )

    def capabilities(self) -> Capabilities:
        """What the build and the machine can do."""
        return _capabilities(self._device_list)

    async def devices(self) -> tuple[DeviceInfo, ...]:
        """The devices as they are now; the drivers are asked in a thread."""
        self._device_list = await asyncio.to_thread(engine_devices)
        return self._device_list

    def pulse(self) -> int:
        """A count of the native loop; see ``InferenceBackend.pulse``."""
        return _engine.pulse()

    def open_channel(
        self,
        sock: socket.socket,
        on_frame: Callable[[Any], None],
        on_lost: Callable[[str | None], None],
        *,
        tick: float,
    ) -> NativeChannel:
        """Serve what comes over a socket: generations in native code, the rest by ``on_frame``.

        Args:
            sock: One end of a socket pair. It stays the caller's.
            on_frame: Called with the content of each frame that is no generation.
            on_lost: Called once, when no more can come.
            tick: Seconds between two messages about the pulse while generations run.
        """
        return NativeChannel(self._engine, sock.fileno(), on_frame, on_lost, tick)

    # Between the engine and the loop.

    def _submit(
        self,
        send: Callable[[], int],
        to_load: tuple[ModelFile, EngineOptions] | None = None,
    ) -> tuple[_Stream, int]:
        if self._closed:
            raise EngineClosed("the backend is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            loop.add_reader(self._engine.fileno(), self._on_ready)
        elif self._loop is not loop:
            raise EngineError("a backend belongs to the event loop that used it first")
        try:
            command = send()
        except _engine.EngineFault as fault:
            raise _error(*fault.args) from None
        stream = _Stream(to_load)
        self._streams[command] = stream
        return stream, command

    def _submit_generate(self, request: GenerateRequest, seed: int) -> int:
        return self._engine.generate(
            request.prompt.encode("utf-8", "replace"),
            system_prompt=None
            if request.system_prompt is None
            else request.system_prompt.encode("utf-8", "replace"),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            seed=seed,
            stop=tuple(text.encode("utf-8", "replace") for text in request.stop if text),
            ignore_eos=request.ignore_eos,
            deterministic=request.deterministic,
            grammar=(request.grammar or "").encode("utf-8", "replace"),
            json_schema=(request.json_schema or "").encode("utf-8", "replace"),
            logprobs=-1 if request.logprobs is None else request.logprobs,
            reuse_prefix=request.reuse_prefix,
            speculate=request.speculate,
            deadline_ns=_deadline_ns(request.deadline),
        )

    def _release(self, command: int, stream: _Stream) -> None:
        self._streams.pop(command, None)
        if not stream.ended and not self._closed:
            self._engine.cancel(command)

    def _on_ready(self) -> None:
        for event in self._engine.drain():
            stream = self._streams.get(event[1])
            # A command that nobody waits for any more was cancelled; its last events are moot.
            if stream is None:
                continue
            if event[0] in _LAST_EVENTS:
                stream.ended = True
                if event[0] == _engine.LOADED and stream.to_load is not None:
                    self._running = self._describe(*stream.to_load, event[2])
                stream.running = self._running
            stream.put(event)
        for level, text in _engine.drain_log():
            log.log(_LOG_LEVELS.get(level, logging.DEBUG), "%s", text)

    def _describe(
        self, model: ModelFile, options: EngineOptions, times: tuple[int, ...]
    ) -> RunningModel | None:
        shape = self._engine.model()
        if shape is None:
            # A later load has already begun; it will say what runs.
            return None
        submitted, ready = times[0], times[1]
        loaded = LoadedModel(
            file=model,
            description=shape["description"],
            n_ctx=shape["n_ctx"],
            n_ctx_train=shape["n_ctx_train"],
            n_params=shape["n_params"],
            load_ms=(ready - submitted) / 1e6,
            device=shape["device"],
            threads=shape["n_threads"],
            has_chat_template=shape["has_chat_template"],
            metadata=shape["metadata"],
            draft=options.draft,
            placement=tuple(DeviceShare(**share) for share in shape["placement"]),
            n_batch=shape["n_batch"],
            n_ubatch=shape["n_ubatch"],
        )
        return RunningModel(loaded, options)


_LAST_EVENTS = frozenset(
    {
        _engine.LOADED,
        _engine.UNLOADED,
        _engine.FINISHED,
        _engine.EMBEDDED,
        _engine.SCORED,
        _engine.FAILED,
    }
)


def _deadline_ns(deadline: float | None) -> int:
    # time.monotonic() and the engine's steady clock are one clock.
    return 0 if deadline in (None, math.inf) else max(1, int(deadline * 1e9))


def _logprob(described: tuple[tuple[int, str, float], ...]) -> TokenLogprob:
    (token, text, logprob), *top = described
    return TokenLogprob(token, text, logprob, tuple(top))


def _finished(event: tuple[Any, ...]) -> Finished:
    _, _, text, reason, *figures = event
    return Finished(text, "stop" if reason == _engine.STOP_STOP else "length", *figures)


def _failed(event: tuple[Any, ...]) -> Failed:
    _, _, code, message, n_prompt, n_tokens, _ = event
    return Failed(_engine.ERROR_NAMES[code], message, n_prompt, n_tokens)


def _served(stream: _Stream) -> RunningModel:
    if stream.running is None:
        raise EngineClosed("the model was unloaded while its last events were on the way")
    return stream.running
