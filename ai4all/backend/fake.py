"""A backend that computes nothing: scripted tokens, timings and faults.

It is the double behind the tests of everything above the backend, and the null engine of the
control plane's benches. Nothing in it is random, and every figure that it reports comes from the
script, so two runs give equal events. Where a delay is zero it does not sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from ai4all.backend.base import (
    Capabilities,
    Completion,
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    InferenceBackend,
    LoadedModel,
    PromptProgress,
    ResourceUsage,
    Timings,
    TokenEvent,
)
from ai4all.errors import (
    Ai4allError,
    ContextOverflow,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
)
from ai4all.types.model import DeviceInfo, ModelFile
from ai4all.types.task import Fingerprint, FinishReason, Usage

__all__ = ["FakeBackend", "FakeCalls", "ScriptedGeneration"]

_WORDS = ("the", "river", "carries", "its", "stones", "slowly", "towards", "a", "distant", "sea")

# A long answer without delays must still let the loop's other tasks run now and then.
_TOKENS_BETWEEN_YIELDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedGeneration:
    """What the backend does for one request.

    Attributes:
        tokens: The answer, one entry a token. None: words that follow from the prompt, as many as
            ``max_tokens`` allows. A list that runs out ends the answer, or starts over when the
            request says ``ignore_eos``.
        queue_ms: Queue time to report; it is not waited.
        prompt_ms: Time for the prompt, reported and waited.
        prompt_chunks: Number of ``PromptProgress`` events in that time.
        token_ms: Time for each token, reported and waited.
        token_ms_at: Times that differ, by index of the token.
        error: Raised in place of token number ``error_at``; ``completion_tokens`` is added to the
            details of a ``ComputeError`` that has none.
        error_at: Index of the token that fails; 0 fails after the prompt.
        hang_at: Index of the token that never comes: not at the deadline either, as with an
            engine that hangs. Closing the iterator or the backend ends it.
    """

    tokens: tuple[str, ...] | None = None
    queue_ms: float = 0.0
    prompt_ms: float = 0.0
    prompt_chunks: int = 1
    token_ms: float = 0.0
    token_ms_at: dict[int, float] = field(default_factory=dict)
    error: Ai4allError | None = None
    error_at: int = 0
    hang_at: int | None = None


Script = (
    ScriptedGeneration
    | Sequence[ScriptedGeneration]
    | Callable[[GenerateRequest, int], ScriptedGeneration]
)
"""One script for all requests; one for each in turn, the last repeated; or a function of the
request and its number."""


@dataclass(slots=True)
class FakeCalls:
    """What has been asked of a ``FakeBackend``, and how it ended.

    ``cancelled`` counts generations whose iterator was closed before the ``Completion``.
    """

    loads: int = 0
    unloads: int = 0
    generations: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    closes: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)


class FakeBackend(InferenceBackend):
    """Serves ``InferenceBackend`` from a script.

    Args:
        script: What each request gets. By default, words at once.
        load_ms: Time of a load, reported and waited.
        load_error: Raised at the end of each load.
        n_ctx: Context of a sequence when the options leave it open. A prompt counts one token a
            word; one with ``n_ctx`` tokens or more raises ``ContextOverflow``.
        max_queue: Requests, running and waiting, above which ``EngineBusy`` is raised.
        time_scale: Share of the scripted times that is really waited. 0 reports them and does
            not sleep.
        memory_mb: Figure for ``resource_usage``.
        threads: Figure for ``loaded`` and the fingerprint when the options leave it open.

    Attributes:
        calls: What has been asked so far.
        active: Generations that hold a slot now.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        load_ms: float = 0.0,
        load_error: Ai4allError | None = None,
        n_ctx: int = 4096,
        max_queue: int = 1024,
        time_scale: float = 1.0,
        memory_mb: int = 256,
        threads: int = 1,
    ) -> None:
        self.calls = FakeCalls()
        self.active = 0
        self._script = ScriptedGeneration() if script is None else script
        self._load_ms = load_ms
        self._load_error = load_error
        self._n_ctx = n_ctx
        self._max_queue = max_queue
        self._time_scale = time_scale
        self._memory_mb = memory_mb
        self._threads = threads
        self._options = EngineOptions()
        self._loaded: LoadedModel | None = None
        self._loading: asyncio.Future[None] | None = None
        self._closing = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def name(self) -> str:
        """Always "fake"."""
        return "fake"

    @property
    def loaded(self) -> LoadedModel | None:
        """The model of the last load that succeeded, until ``unload``."""
        return self._loaded

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        """Take ``model`` as loaded after ``load_ms``. The file is never opened.

        Raises:
            EngineClosed: The backend is closed.
            Ai4allError: The scripted ``load_error``.
        """
        self._check_open()
        self.calls.loads += 1
        self._loaded = None
        loading = self._loading = asyncio.get_running_loop().create_future()
        try:
            if progress is not None:
                progress(0.0)
            await self._pause(self._load_ms, None, 0)
            if self._load_error is not None:
                raise self._load_error
            self._options = options
            self._loaded = LoadedModel(
                file=model,
                description="scripted",
                n_ctx=options.n_ctx or self._n_ctx,
                n_ctx_train=self._n_ctx,
                n_params=0,
                load_ms=self._load_ms,
                device="CPU",
                threads=options.threads or self._threads,
                has_chat_template=True,
            )
            if progress is not None:
                progress(1.0)
            return self._loaded
        finally:
            self._loading = None
            loading.set_result(None)

    async def unload(self) -> None:
        """Forget the model."""
        self.calls.unloads += 1
        self._loaded = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Play the script for ``request``.

        Raises:
            ContextOverflow: The prompt has ``n_ctx`` words or more.
            DeadlineExceeded: The request's deadline passed.
            EngineBusy: ``max_queue`` requests are here already.
            EngineClosed: Closed, or nothing is loaded or loading.
            Ai4allError: The scripted one.
        """
        self._check_open()
        if self._loaded is None and self._loading is None:
            raise EngineClosed("no model is loaded")
        if self.active + len(self._waiting) >= self._max_queue:
            raise EngineBusy(f"{self._max_queue} requests are waiting already")
        script = self._script_for(request, self.calls.generations)
        self.calls.generations += 1
        self.calls.requests.append(request)
        done = False
        try:
            async with contextlib.aclosing(self._play(script, request)) as events:
                async for event in events:
                    if isinstance(event, Completion):
                        self.calls.completed += 1
                        done = True
                    yield event
        except Ai4allError:
            self.calls.failed += 1
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if not done:
                self.calls.cancelled += 1
            raise

    def resource_usage(self) -> ResourceUsage:
        """The scripted memory, and one thread for each active generation."""
        return ResourceUsage(
            cpu_percent=100.0 if self.active else 0.0,
            memory_mb=self._memory_mb,
            gpu_percent=None,
            gpu_memory_mb=None,
            active_threads=self.active,
        )

    def capabilities(self) -> Capabilities:
        """One CPU that does not exist."""
        device = DeviceInfo("CPU", "cpu", "scripted device", 8192, 4096)
        return Capabilities(
            backend="cpu", devices=(device,), engine_build="fake", vram_mb=None, build_info={}
        )

    async def close(self) -> None:
        """End every generation with ``EngineClosed``."""
        self.calls.closes += 1
        self._closing.set()
        self._loaded = None
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(EngineClosed("the backend was closed"))

    # How one generation goes.

    async def _play(
        self, script: ScriptedGeneration, request: GenerateRequest
    ) -> AsyncGenerator[GenerationEvent, None]:
        load_ms = await self._wait_for_load(request)
        await self._take_slot(request)
        try:
            model = self._loaded
            if model is None:
                raise EngineClosed("the model was unloaded")
            prompt_tokens = _count_tokens(request)
            if prompt_tokens >= model.n_ctx:
                raise ContextOverflow(
                    f"the prompt has {prompt_tokens} tokens, the context {model.n_ctx}",
                    {"prompt_tokens": prompt_tokens, "n_ctx": model.n_ctx},
                )
            # As with a real engine, the first event is never ready at once.
            await asyncio.sleep(0)
            chunks = max(1, script.prompt_chunks)
            for chunk in range(1, chunks + 1):
                await self._pause(script.prompt_ms / chunks, request.deadline, 0)
                yield PromptProgress(prompt_tokens * chunk // chunks, prompt_tokens)

            answer = _Answer(request)
            room = min(request.max_tokens, model.n_ctx - prompt_tokens)
            for index in range(room):
                token = _token_at(script, request, index)
                if token is None:
                    answer.finish_reason = FinishReason.STOP
                    break
                await self._step(script, request, index)
                certain = answer.add(token)
                yield TokenEvent(certain, (answer.token_ids[-1],), index + 1)
                if answer.finish_reason is FinishReason.STOP:
                    break
            rest = answer.flush()
            if rest:
                yield TokenEvent(rest, (), len(answer.token_ids))
            yield self._completion(script, request, model, answer, prompt_tokens, load_ms)
        finally:
            self._free_slot()

    async def _step(self, script: ScriptedGeneration, request: GenerateRequest, index: int) -> None:
        if script.hang_at == index:
            await self._closing.wait()
            raise EngineClosed("the backend was closed")
        await self._pause(_token_ms(script, index), request.deadline, index)
        if script.error is not None and script.error_at == index:
            raise _with_token_count(script.error, index)
        if index % _TOKENS_BETWEEN_YIELDS == _TOKENS_BETWEEN_YIELDS - 1:
            await asyncio.sleep(0)

    async def _wait_for_load(self, request: GenerateRequest) -> float:
        loading = self._loading
        if loading is None:
            return 0.0
        try:
            async with asyncio.timeout(_remaining(request.deadline)):
                await asyncio.shield(loading)
        except TimeoutError:
            raise _deadline_exceeded(0) from None
        if self._loaded is None:
            self._check_open()
            raise self._load_error or EngineClosed("the load did not finish")
        return self._load_ms

    async def _take_slot(self, request: GenerateRequest) -> None:
        if self.active < self._options.n_slots:
            self.active += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(_remaining(request.deadline)):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._free_slot()
            if isinstance(error, TimeoutError):
                raise _deadline_exceeded(0) from None
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _free_slot(self) -> None:
        # A slot goes from hand to hand, so that nobody overtakes those who wait.
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.active -= 1

    async def _pause(self, ms: float, deadline: float | None, completion_tokens: int) -> None:
        seconds = ms * self._time_scale / 1000.0
        remaining = _remaining(deadline)
        if remaining is not None and remaining <= seconds:
            await self._sleep(max(0.0, remaining))
            raise _deadline_exceeded(completion_tokens)
        await self._sleep(seconds)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0.0:
            try:
                await asyncio.wait_for(self._closing.wait(), seconds)
            except TimeoutError:
                return
        self._check_open()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise EngineClosed("the backend is closed")

    def _script_for(self, request: GenerateRequest, number: int) -> ScriptedGeneration:
        if isinstance(self._script, ScriptedGeneration):
            return self._script
        if callable(self._script):
            return self._script(request, number)
        return self._script[min(number, len(self._script) - 1)]

    def _completion(
        self,
        script: ScriptedGeneration,
        request: GenerateRequest,
        model: LoadedModel,
        answer: _Answer,
        prompt_tokens: int,
        load_ms: float,
    ) -> Completion:
        sampled = len(answer.token_ids)
        first_sample_ms = _token_ms(script, 0) if sampled else 0.0
        rest_ms = sum(_token_ms(script, index) for index in range(1, sampled))
        to_first_token = script.queue_ms + load_ms + script.prompt_ms + first_sample_ms
        ids = b"".join(token.to_bytes(4, "little") for token in answer.token_ids)
        options = self._options
        return Completion(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            usage=Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=sampled,
                total_tokens=prompt_tokens + sampled,
            ),
            timings=Timings(
                queue_ms=script.queue_ms,
                load_ms=load_ms,
                prompt_ms=script.prompt_ms,
                first_sample_ms=first_sample_ms,
                time_to_first_token_ms=to_first_token if sampled else None,
                total_ms=to_first_token + rest_ms,
                prompt_tokens_per_second=_rate(prompt_tokens, script.prompt_ms),
                decode_tokens_per_second=_rate(sampled - 1, rest_ms),
            ),
            fingerprint=Fingerprint(
                model_sha256=model.file.sha256,
                engine_build="fake",
                backend="cpu",
                device=model.device,
                threads=model.threads,
                n_ctx=model.n_ctx,
                n_batch=options.n_batch,
                n_ubatch=options.n_ubatch,
                kv_type=options.kv_type,
                flash_attention=options.flash_attention,
                seed=request.seed if request.seed is not None else 0,
                deterministic=request.deterministic,
                prefix_reused=0,
                batched_with=0,
                output_tokens_sha256=hashlib.sha256(ids).hexdigest(),
            ),
        )


class _Answer:
    """The text so far, with what could still become a stop sequence held back."""

    def __init__(self, request: GenerateRequest) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason = FinishReason.LENGTH
        self._stop = request.stop
        self._given = 0

    def add(self, token: str) -> str:
        """Take the next token; return the text that became certain."""
        self.token_ids.append(zlib.crc32(token.encode()) % 32_000)
        self.text += token
        found = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = FinishReason.STOP
            return self.flush()
        return self._give(len(self.text) - self._open_stop_length())

    def flush(self) -> str:
        """Return all that was held back."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        certain = self.text[self._given : end]
        self._given += len(certain)
        return certain

    def _open_stop_length(self) -> int:
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )


def _token_at(script: ScriptedGeneration, request: GenerateRequest, index: int) -> str | None:
    if script.tokens is None:
        # Follows from the prompt, so that a test sees whose answer it got.
        seed = zlib.crc32(request.prompt.encode())
        return " " + _WORDS[zlib.crc32(b"%d" % index, seed) % len(_WORDS)]
    if index < len(script.tokens):
        return script.tokens[index]
    if request.ignore_eos and script.tokens:
        return script.tokens[index % len(script.tokens)]
    # A fault planned for after the answer's last token still happens.
    if index in (script.hang_at, script.error_at if script.error is not None else None):
        return ""
    return None


def _token_ms(script: ScriptedGeneration, index: int) -> float:
    return script.token_ms_at.get(index, script.token_ms)


def _count_tokens(request: GenerateRequest) -> int:
    return max(1, len(request.prompt.split()) + len((request.system_prompt or "").split()))


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()


def _rate(tokens: int, ms: float) -> float | None:
    return tokens * 1000.0 / ms if tokens > 0 and ms > 0.0 else None


def _deadline_exceeded(completion_tokens: int) -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed", {"completion_tokens": completion_tokens})


def _with_token_count(error: Ai4allError, completion_tokens: int) -> Ai4allError:
    from ai4all.errors import ComputeError, ModelNotFound

    if (
        isinstance(error, ComputeError)
        and not isinstance(error, ModelNotFound)
        and error.details is None
    ):
        # A fresh one each time: a shared exception would gather tracebacks.
        return type(error)(error.message, {"completion_tokens": completion_tokens})
    return error
