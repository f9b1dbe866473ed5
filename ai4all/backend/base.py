"""The one interface to compute. Everything above it is blind to what runs below."""

from __future__ import annotations

import abc
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ai4all.errors import UnsupportedTask
from ai4all.types.model import DeviceInfo, DeviceShare, ModelFile
from ai4all.types.task import Fingerprint, FinishReason, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Capabilities",
    "Completion",
    "EmbedRequest",
    "Embeddings",
    "EngineOptions",
    "GenerateRequest",
    "GenerationEvent",
    "GpuFigures",
    "InferenceBackend",
    "LabelScores",
    "LoadedModel",
    "PromptProgress",
    "ResourceUsage",
    "ScoreRequest",
    "Timings",
    "TokenEvent",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a model. Zero or None means: let the engine choose.

    Attributes:
        n_ctx: Context of one sequence, in tokens. 0: the model's own, at most 4096.
        n_batch: Tokens in one logical batch.
        n_ubatch: Tokens in one physical batch; also the length of a prompt chunk. 0: 512.
        n_slots: Sequences that can run at once.
        threads: Threads for decoding. 0: one for each physical core.
        threads_batch: Threads for prompts. 0: as ``threads``.
        device: What shall compute: "auto", "cpu", the name of a backend ("cuda", "vulkan", ...)
            or names of devices with commas between ("CUDA0,CUDA1").
        gpu_layers: Layers to offload, the output counting as one. -1: as many as fit; a backend
            that is not told more takes all.
        allow_cpu_fallback: Compute on the CPU where ``device`` is not to be had.
        flash_attention: "auto", "on" or "off".
        kv_type: Type of the KV cache: "f16", "f32", "q8_0", "q4_0", "bf16".
        use_mmap: Map the file instead of reading it.
        prefix_cache_mb: Memory for computed prompts that lost their slot, in MiB. 0: none.
        memory_limit_mb: Most memory that a model may take, in MiB. 0: what is free.
        draft: A smaller model of the same vocabulary that drafts for this one, or None.
        draft_tokens: Tokens in each of its drafts. 0: as many as are measured to pay.
    """

    n_ctx: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    n_slots: int = 1
    threads: int = 0
    threads_batch: int = 0
    device: str = "auto"
    gpu_layers: int = -1
    allow_cpu_fallback: bool = False
    flash_attention: str = "auto"
    kv_type: str = "f16"
    use_mmap: bool = True
    prefix_cache_mb: int = 256
    memory_limit_mb: int = 0
    draft: ModelFile | None = None
    draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model a backend holds, and the shape it runs in.

    Attributes:
        file: What was loaded.
        description: Architecture, size and quantisation, as the engine names them.
        n_ctx: Context of one sequence, in tokens.
        n_ctx_train: Context the model was trained with.
        n_params: Number of parameters.
        load_ms: Time the load took.
        device: The devices that really hold its layers ("CPU", "CUDA0", "CUDA0+CPU", ...).
        threads: Threads that decode.
        has_chat_template: Whether the file brings a chat template.
        metadata: The file's GGUF key-value pairs, as text.
        draft: The file of the draft model that was loaded with it, or None.
        placement: What each device really holds, the CPU last.
        n_batch: Tokens in one logical batch.
        n_ubatch: Tokens in one physical batch.
    """

    file: ModelFile
    description: str
    n_ctx: int
    n_ctx_train: int
    n_params: int
    load_ms: float
    device: str
    threads: int
    has_chat_template: bool
    metadata: dict[str, str] = field(default_factory=dict)
    draft: ModelFile | None = None
    placement: tuple[DeviceShare, ...] = ()
    n_batch: int = 0
    n_ubatch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation.

    Attributes:
        prompt: The text to continue, or the user's message when ``system_prompt`` is given.
        system_prompt: When not None, prompt and this are rendered by the model's chat template.
        max_tokens: Most tokens to sample.
        temperature: 0 is greedy.
        top_k: 0 is off.
        repetition_penalty: 1.0 is off.
        seed: None draws one; the completion's fingerprint has it.
        stop: Text that ends the generation and is not part of it.
        ignore_eos: Sample on over end-of-generation tokens.
        deterministic: One sequence, no reuse, fixed shapes.
        grammar: GBNF, or None.
        json_schema: JSON Schema as text, or None.
        logprobs: None: none. Else each token comes with its log probability, and those of this
            many likeliest tokens in its place.
        reuse_prefix: Take the computed cache of an earlier prompt with the same beginning.
            ``deterministic`` switches it off.
        speculate: Draft by prompt lookup, and by the draft model where there is one, as far as it
            pays; the tokens stay the sampler's own. ``deterministic`` switches it off.
        deadline: ``time.monotonic()`` value after which the work is dropped, or None.
    """

    prompt: str
    system_prompt: str | None = None
    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deterministic: bool = False
    grammar: str | None = None
    json_schema: str | None = None
    logprobs: int | None = None
    reuse_prefix: bool = True
    speculate: bool = True
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts to embed.

    Attributes:
        texts: At least one; each becomes a row.
        normalize: Scale every row to Euclidean length 1.
        deadline: ``time.monotonic()`` value after which the work is dropped, or None.
    """

    texts: tuple[str, ...]
    normalize: bool = True
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Rows of float32, shape ``(len(texts), dimensions)``, and what they cost.

    Pooling follows the model's own metadata; a model that names none is pooled by the mean.
    """

    vectors: npt.NDArray[np.float32]
    prompt_tokens: int
    timings: Timings
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A prompt and the continuations to score after it.

    Attributes:
        prompt: What stands before each continuation; computed once.
        continuations: At least one, none empty.
        system_prompt: When not None, prompt and this are rendered by the chat template.
        deadline: ``time.monotonic()`` value after which the work is dropped, or None.
    """

    prompt: str
    continuations: tuple[str, ...]
    system_prompt: str | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class LabelScores:
    """For each continuation: the sum of its tokens' natural-log probabilities, and their count."""

    log_likelihoods: tuple[float, ...]
    token_counts: tuple[int, ...]
    prompt_tokens: int
    timings: Timings
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in milliseconds of the native loop's steady clock.

    ``time_to_first_token_ms`` is first token sampled minus submitted, and is the sum of
    ``queue_ms``, ``load_ms``, ``prompt_ms`` and ``first_sample_ms``. It is None when no token was
    sampled. A rate is None when nothing was there to measure it on.
    """

    queue_ms: float
    load_ms: float
    prompt_ms: float
    first_sample_ms: float
    time_to_first_token_ms: float | None
    total_ms: float
    prompt_tokens_per_second: float | None
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The figures by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """A chunk of the prompt is done: ``processed`` of ``total`` tokens."""

    processed: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a sampled token, and of the likeliest ones in its place.

    Probabilities are the model's own, before temperature and the other sampling rules.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Text that became certain, and the tokens sampled for it.

    Of one decode step, or of all that were over when the event loop had time to look.
    ``text`` may be empty while a code point or a stop sequence is still open.
    ``completion_tokens`` counts all tokens sampled so far.
    """

    text: str
    token_ids: tuple[int, ...]
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The last event of a generation that ended well.

    ``draft_tokens`` were proposed by speculation, ``draft_accepted`` of them were right;
    ``draft_model_tokens`` of those proposed came from the draft model.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    fingerprint: Fingerprint
    logprobs: tuple[TokenLogprob, ...] = ()
    draft_tokens: int = 0
    draft_accepted: int = 0
    draft_model_tokens: int = 0


GenerationEvent = PromptProgress | TokenEvent | Completion


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """What a GPU does now, whoever uses it. What its driver does not tell is None.

    ``percent`` is the share of time that it is busy, 0..100; memory is in MiB.
    """

    name: str
    percent: float | None = None
    memory_used_mb: int | None = None
    memory_mb: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """What the process and its devices use now, in the units of the heartbeat.

    ``cpu_percent`` is the share of the whole machine, 0..100. ``memory_mb`` is resident memory.
    ``gpu_percent`` is the mean of the GPUs in use, ``gpu_memory_mb`` their sum; ``gpus`` has each.
    """

    cpu_percent: float
    memory_mb: int
    gpu_percent: float | None
    gpu_memory_mb: int | None
    active_threads: int
    gpus: tuple[GpuFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do on this machine.

    Attributes:
        backend: "cpu", "cuda", "rocm", "vulkan" or "metal".
        devices: What can compute, the one in use first.
        engine_build: One line that names upstream commit, backend and CPU features.
        vram_mb: Memory of the device in use when it is not the CPU.
    """

    backend: str
    devices: tuple[DeviceInfo, ...]
    engine_build: str
    vram_mb: int | None
    build_info: dict[str, Any] = field(default_factory=dict)


class InferenceBackend(abc.ABC):
    """Loads models and computes with them. All calls belong to one event loop's thread.

    A backend holds at most one model. Failures of a block raise ``ComputeError``; misuse raises
    ``EngineError``.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name: "native", "isolated", "fake"."""

    @property
    @abc.abstractmethod
    def loaded(self) -> LoadedModel | None:
        """The model that is ready, if any."""

    async def open(self) -> None:  # noqa: B027 - most backends are ready once they are made.
        """Make ready whatever ``capabilities`` needs. Entering the context does it, too.

        Raises:
            EngineUnavailable: It cannot run here.
        """

    @abc.abstractmethod
    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        """Load ``model``, in place of the one held before.

        Args:
            model: The verified file.
            options: The shape to run it in.
            progress: Called on the loop's thread with a share in 0..1.

        Raises:
            LoadFailed: The file could not be loaded.
            OutOfMemory: It does not fit.
        """

    @abc.abstractmethod
    async def unload(self) -> None:
        """Drop the model and give its memory back. Without one, does nothing."""

    @abc.abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Generate; the last event is a ``Completion``. Closing the iterator cancels the work.

        A request may be made while a load is under way; it waits, and its timings say how long.

        Raises:
            ComputeError: As its code says; ``DeadlineExceeded`` and ``Cancelled`` carry
                ``completion_tokens`` in their details.
            EngineBusy: The queue is full.
            EngineClosed: The backend is closed, or nothing is loaded or loading.
        """

    @abc.abstractmethod
    def memory_mb(self) -> int:
        """Memory that is resident now, in MiB, of every process that the backend runs in."""

    @abc.abstractmethod
    def resource_usage(self) -> ResourceUsage:
        """What this process and its devices use now. Never blocks."""

    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do on this machine; after ``open``."""

    async def devices(self) -> tuple[DeviceInfo, ...]:
        """The devices as they are now, with the memory that is free on them."""
        return self.capabilities().devices

    async def look_again(self) -> bool:
        """Look for devices that have come since; nothing may be computed meanwhile.

        Drivers are asked once in the life of a process, so this is for backends that can have
        another one.

        Returns:
            Whether there was another look; ``capabilities`` has what came of it.
        """
        return False

    def cpu_seconds(self) -> float:
        """Processor time that this backend and its process have used."""
        return time.process_time()

    def pulse(self) -> int:
        """A count that moves only while something is really being computed.

        It stands still when the engine hangs, however lively the loop is. 0 is: not counted.
        """
        return 0

    @abc.abstractmethod
    async def close(self) -> None:
        """End all work and free everything. May be called again."""

    async def complete(self, request: GenerateRequest) -> Completion:
        """Generate to the end and return the ``Completion``.

        Raises:
            As ``generate``.
        """
        stream = self.generate(request)
        try:
            async for event in stream:
                if isinstance(event, Completion):
                    return event
        finally:
            await stream.aclose()
        raise AssertionError("a generation ended without a completion")

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts, one row each.

        Raises:
            ContextOverflow: A text does not fit into the model's context.
            UnsupportedTask: This backend does not embed.
            ComputeError: As its code says.
        """
        raise UnsupportedTask(f"the {self.name} backend does not embed")

    async def score_labels(self, request: ScoreRequest) -> LabelScores:
        """Score continuations of one prompt by their log-likelihood, in one batched pass.

        Raises:
            ContextOverflow: The prompt or a continuation does not fit.
            UnsupportedTask: This backend does not score labels.
            ComputeError: As its code says.
        """
        raise UnsupportedTask(f"the {self.name} backend does not score labels")

    async def __aenter__(self) -> InferenceBackend:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
