"""A backend that computes nothing: scripted tokens, timings and faults.

It is the double behind the tests of everything above the backend, and the null engine of the
control plane's benches. Nothing in it is random, and every figure that it reports comes from the
script, so two runs give equal events. Where a delay is zero it does not sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from ai4all.backend.base import (
    Capabilities,
    Completion,
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
    Timings,
    TokenEvent,
)
from ai4all.backend.completions import RunningModel
from ai4all.backend.devices import choose_devices, device_label
from ai4all.backend.fake_meaning import word_likelihood, word_vectors
from ai4all.backend.fake_script import (
    Script,
    ScriptedAnswer,
    ScriptedGeneration,
    token_at,
    token_ms,
)
from ai4all.clock import SYSTEM_CLOCK, Clock
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


_CPU = DeviceInfo("CPU", "cpu", "scripted device", 8192, 4096)

# A long answer without delays must still let the loop's other tasks run now and then.
_TOKENS_BETWEEN_YIELDS = 16


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
    looks: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    embeddings: list[EmbedRequest] = field(default_factory=list)
    scores: list[ScoreRequest] = field(default_factory=list)


class FakeBackend(InferenceBackend):
    """Serves ``InferenceBackend`` from a script.

    Args:
        script: What each generation gets. By default, words at once.
        score: Log-likelihoods of a request's continuations. By default, those are likely whose
            words are in the prompt. Embeddings always follow from the words of the texts.
        load_ms: Time of a load, reported and waited.
        load_error: Raised at the end of each load.
        n_ctx: Context of a sequence when the options leave it open. A prompt counts one token a
            word; one with ``n_ctx`` tokens or more raises ``ContextOverflow``.
        max_queue: Requests, running and waiting, above which ``EngineBusy`` is raised.
        time_scale: Share of the scripted times that is really waited. 0 reports them and does
            not sleep.
        memory_mb: Figure for ``resource_usage``.
        threads: Figure for ``loaded`` and the fingerprint when the options leave it open.
        clock: What deadlines are measured on.
        devices: What there is to compute on.

    Attributes:
        calls: What has been asked so far.
        active: Generations that hold a slot now.
        device_list: As ``devices``. May be set anew: a driver goes, or comes back.
        placed_on: Where loads really end up, whatever was asked for; None: there.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        score: Callable[[ScoreRequest], Sequence[float]] | None = None,
        load_ms: float = 0.0,
        load_error: Ai4allError | None = None,
        n_ctx: int = 4096,
        max_queue: int = 1024,
        time_scale: float = 1.0,
        memory_mb: int = 256,
        threads: int = 1,
        clock: Clock = SYSTEM_CLOCK,
        devices: Sequence[DeviceInfo] = (_CPU,),
    ) -> None:
        self.calls = FakeCalls()
        self.device_list = tuple(devices)
        self.placed_on: str | None = None
        self.active = 0
        self._script = ScriptedGeneration() if script is None else script
        self._score = _score_by_words if score is None else score
        self._load_ms = load_ms
        self._load_error = load_error
        self._n_ctx = n_ctx
        self._max_queue = max_queue
        self._time_scale = time_scale
        self._memory_mb = memory_mb
        self._threads = threads
        self._clock = clock
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
            gpus = [gpu.name for gpu in choose_devices(self.device_list, options.device).gpus]
            gpus = gpus if options.gpu_layers else []
            self._options = options
            self._loaded = LoadedModel(
                file=model,
                description="scripted",
                n_ctx=options.n_ctx or self._n_ctx,
                n_ctx_train=self._n_ctx,
                n_params=0,
                load_ms=self._load_ms,
                device=self.placed_on or device_label(gpus, whole=True),
                threads=options.threads or self._threads,
                has_chat_template=True,
                draft=options.draft,
                n_batch=options.n_batch,
                n_ubatch=options.n_ubatch,
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
        self._check_ready()
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

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Rows of equal length whatever the model; texts that share words are close.

        Raises:
            As ``generate``.
        """
        self._check_ready()
        self.calls.embeddings.append(request)
        counts = [_count_words(text) for text in request.texts]
        async with self._side_job(request.deadline, max(counts)) as (model, load_ms):
            return Embeddings(
                vectors=word_vectors(request.texts, normalize=request.normalize),
                prompt_tokens=sum(counts),
                timings=_side_timings(load_ms),
                fingerprint=self._fingerprint(model),
            )

    async def score_labels(self, request: ScoreRequest) -> LabelScores:
        """The scripted log-likelihoods; a continuation counts one token a word.

        Raises:
            As ``generate``.
        """
        self._check_ready()
        self.calls.scores.append(request)
        counts = tuple(_count_words(text) for text in request.continuations)
        prompt_tokens = _count_words(f"{request.system_prompt or ''} {request.prompt}")
        async with self._side_job(request.deadline, prompt_tokens + max(counts)) as held:
            model, load_ms = held
            return LabelScores(
                log_likelihoods=tuple(self._score(request)),
                token_counts=counts,
                prompt_tokens=prompt_tokens,
                timings=_side_timings(load_ms),
                fingerprint=self._fingerprint(model),
            )

    def memory_mb(self) -> int:
        """The scripted memory."""
        return self._memory_mb

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
        """Devices that do not exist."""
        first = self.device_list[0]
        return Capabilities(
            backend=first.backend,
            devices=self.device_list,
            engine_build="fake",
            vram_mb=first.memory_mb if first.is_gpu else None,
            build_info={},
        )

    async def look_again(self) -> bool:
        """Whoever holds this backend sets ``device_list``; there is nothing else to look at."""
        self.calls.looks += 1
        return True

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
        load_ms = await self._wait_for_load(request.deadline)
        await self._take_slot(request.deadline)
        try:
            model = self._loaded
            if model is None:
                raise EngineClosed("the model was unloaded")
            prompt_tokens = _count_words(f"{request.system_prompt or ''} {request.prompt}")
            _check_fits(prompt_tokens, model)
            # As with a real engine, the first event is never ready at once.
            await asyncio.sleep(0)
            chunks = max(1, script.prompt_chunks)
            for chunk in range(1, chunks + 1):
                await self._pause(script.prompt_ms / chunks, request.deadline, 0)
                yield PromptProgress(prompt_tokens * chunk // chunks, prompt_tokens)

            answer = ScriptedAnswer(request)
            room = min(request.max_tokens, model.n_ctx - prompt_tokens)
            for index in range(room):
                token = token_at(script, request, index)
                if token is None:
                    answer.finish_reason = FinishReason.STOP
                    break
                await self._step(script, request, index)
                certain = answer.add(token, script)
                yield TokenEvent(
                    certain, (answer.token_ids[-1],), index + 1, tuple(answer.logprobs[index:])
                )
                if answer.finish_reason is FinishReason.STOP:
                    break
            rest = answer.flush()
            if rest:
                yield TokenEvent(rest, (), len(answer.token_ids))
            yield self._completion(script, request, model, answer, prompt_tokens, load_ms)
        finally:
            self._free_slot()

    @contextlib.asynccontextmanager
    async def _side_job(
        self, deadline: float | None, tokens: int
    ) -> AsyncIterator[tuple[LoadedModel, float]]:
        load_ms = await self._wait_for_load(deadline)
        await self._take_slot(deadline)
        try:
            model = self._loaded
            if model is None:
                raise EngineClosed("the model was unloaded")
            _check_fits(tokens, model)
            await asyncio.sleep(0)
            await self._pause(0.0, deadline, 0)
            yield model, load_ms
        finally:
            self._free_slot()

    async def _step(self, script: ScriptedGeneration, request: GenerateRequest, index: int) -> None:
        if script.hang_at == index:
            await self._closing.wait()
            raise EngineClosed("the backend was closed")
        await self._pause(token_ms(script, index), request.deadline, index)
        if script.error is not None and script.error_at == index:
            raise _with_token_count(script.error, index)
        if index % _TOKENS_BETWEEN_YIELDS == _TOKENS_BETWEEN_YIELDS - 1:
            await asyncio.sleep(0)

    async def _wait_for_load(self, deadline: float | None) -> float:
        loading = self._loading
        if loading is None:
            return 0.0
        try:
            async with asyncio.timeout(self._remaining(deadline)):
                await asyncio.shield(loading)
        except TimeoutError:
            raise _deadline_exceeded(0) from None
        if self._loaded is None:
            self._check_open()
            raise self._load_error or EngineClosed("the load did not finish")
        return self._load_ms

    async def _take_slot(self, deadline: float | None) -> None:
        if self.active < self._options.n_slots:
            self.active += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._remaining(deadline)):
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
        remaining = self._remaining(deadline)
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

    def _remaining(self, deadline: float | None) -> float | None:
        return None if deadline is None else deadline - self._clock.monotonic()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise EngineClosed("the backend is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if self._loaded is None and self._loading is None:
            raise EngineClosed("no model is loaded")
        if self.active + len(self._waiting) >= self._max_queue:
            raise EngineBusy(f"{self._max_queue} requests are waiting already")

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
        answer: ScriptedAnswer,
        prompt_tokens: int,
        load_ms: float,
    ) -> Completion:
        sampled = len(answer.token_ids)
        first_sample_ms = token_ms(script, 0) if sampled else 0.0
        rest_ms = sum(token_ms(script, index) for index in range(1, sampled))
        to_first_token = script.queue_ms + load_ms + script.prompt_ms + first_sample_ms
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
            fingerprint=self._fingerprint(
                model, answer.token_ids, request.seed or 0, request.deterministic
            ),
            logprobs=tuple(answer.logprobs),
        )

    def _fingerprint(
        self,
        model: LoadedModel,
        token_ids: Sequence[int] = (),
        seed: int = 0,
        deterministic: bool = False,
    ) -> Fingerprint:
        running = RunningModel(model, self._options)
        return running.fingerprint("fake", tuple(token_ids), seed=seed, deterministic=deterministic)


def _count_words(text: str) -> int:
    return max(1, len(text.split()))


def _check_fits(tokens: int, model: LoadedModel) -> None:
    if tokens >= model.n_ctx:
        raise ContextOverflow(
            f"the prompt has {tokens} tokens, the context {model.n_ctx}",
            {"prompt_tokens": tokens, "n_ctx": model.n_ctx},
        )


def _score_by_words(request: ScoreRequest) -> list[float]:
    return [word_likelihood(request.prompt, text) for text in request.continuations]


def _side_timings(load_ms: float) -> Timings:
    return Timings(
        queue_ms=0.0,
        load_ms=load_ms,
        prompt_ms=0.0,
        first_sample_ms=0.0,
        time_to_first_token_ms=None,
        total_ms=load_ms,
        prompt_tokens_per_second=None,
        decode_tokens_per_second=None,
    )


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
