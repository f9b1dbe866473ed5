"""Tasks, their inputs and outputs, and the result that goes back, as they are on the wire.

Names, defaults and spellings are those of the deployed AI4All type definitions. Every number is
range-checked here, so that nothing unchecked reaches native code.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

__all__ = [
    "BlockMetrics",
    "ClassificationInput",
    "ClassificationOutput",
    "EmbeddingsInput",
    "EmbeddingsOutput",
    "ErrorCode",
    "ErrorInfo",
    "FinishReason",
    "Fingerprint",
    "GenerationParameters",
    "INPUT_MODELS",
    "Late",
    "Prediction",
    "QuestionAnsweringInput",
    "QuestionAnsweringOutput",
    "SummarizationInput",
    "SummarizationOutput",
    "SummaryStyle",
    "TaskOutput",
    "TaskResult",
    "TaskType",
    "TextCompletionInput",
    "TextCompletionOutput",
    "TokenLikelihood",
    "TokenLogprobs",
    "Usage",
    "ValidationInput",
    "ValidationOutput",
]


class TaskType(enum.StrEnum):
    """Every task name the network knows, offered by this worker or not."""

    TEXT_COMPLETION = "TEXT_COMPLETION"
    EMBEDDINGS = "EMBEDDINGS"
    CLASSIFICATION = "CLASSIFICATION"
    QUESTION_ANSWERING = "QUESTION_ANSWERING"
    SUMMARIZATION = "SUMMARIZATION"
    VALIDATION = "VALIDATION"
    TRAINING_BATCH = "TRAINING_BATCH"
    WEB_CRAWL = "WEB_CRAWL"


class FinishReason(enum.StrEnum):
    """Why a generation ended."""

    LENGTH = "length"
    STOP = "stop"
    CONTENT_FILTER = "content_filter"
    CANCELLED = "cancelled"
    ERROR = "error"


class ErrorCode(enum.StrEnum):
    """Whose fault a failure was, so that a coordinator never punishes the wrong side."""

    # The requester's.
    BAD_REQUEST = "bad_request"
    UNSUPPORTED_TASK = "unsupported_task"
    MODEL_NOT_FOUND = "model_not_found"
    CONTEXT_OVERFLOW = "context_overflow"
    # The worker's.
    OUT_OF_MEMORY = "out_of_memory"
    ENGINE_CRASHED = "engine_crashed"
    ENGINE_HUNG = "engine_hung"
    LOAD_FAILED = "load_failed"
    # The owner's.
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    SHUTTING_DOWN = "shutting_down"
    # The clock's.
    DEADLINE_EXCEEDED = "deadline_exceeded"


class _Wire(BaseModel):
    """Base of everything that crosses the wire: immutable, strict, blind to unknown fields."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, defer_build=True
    )


def _from_name(kind: type[enum.StrEnum]) -> BeforeValidator:
    # Strict mode wants the enum itself; the wire has its value.
    members = {member.value: member for member in kind}
    return BeforeValidator(
        lambda value: members.get(value, value) if isinstance(value, str) else value
    )


def _is_absent(value: object) -> bool:
    return value is None


_T = TypeVar("_T")
Late = Annotated[_T | None, Field(exclude_if=_is_absent)]
"""A field that the network's first protocol does not name: left out when it is None."""

_Count = Annotated[int, Field(ge=0)]
# JSON has no tuples.
_Span = Annotated[
    tuple[_Count, _Count],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
_StopSequence = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Usage(_Wire):
    """Token counts of one block."""

    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count


class GenerationParameters(_Wire):
    """How to generate: flat in the input of every task that generates text.

    ``repetition_penalty`` applies at temperature 0 only when the input names it: decoding is
    plain greedy otherwise. ``top_k`` 0 means off. ``seed`` null means a random one, reported in
    the fingerprint.
    """

    max_tokens: int = Field(256, ge=1, le=1_048_576)
    temperature: float = Field(0.7, ge=0.0, le=100.0)
    top_p: float = Field(0.9, ge=0.0, le=1.0)
    top_k: int = Field(0, ge=0, le=2_147_483_647)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.1, gt=0.0, le=100.0)
    stop_sequences: list[_StopSequence] = Field(default_factory=list, max_length=64)
    seed: int | None = Field(None, ge=0, le=18_446_744_073_709_551_615)
    logprobs: int | None = Field(None, ge=0, le=100)
    grammar: str | None = Field(None, min_length=1, max_length=262_144)
    json_schema: dict[str, Any] | None = None
    ignore_eos: bool = False
    deterministic: bool = False

    @property
    def effective_repetition_penalty(self) -> float:
        """The penalty to sample with: 1.0 (off) for greedy decoding that did not ask for one."""
        if self.temperature == 0.0 and "repetition_penalty" not in self.model_fields_set:
            return 1.0
        return self.repetition_penalty


class TextCompletionInput(GenerationParameters):
    """Input of ``TEXT_COMPLETION``; a ``system_prompt`` switches the model's chat template on."""

    prompt: str
    system_prompt: str | None = None


class EmbeddingsInput(_Wire):
    """Input of ``EMBEDDINGS``."""

    texts: list[str] = Field(min_length=1, max_length=4096)
    normalize: bool = True


class ClassificationInput(_Wire):
    """Input of ``CLASSIFICATION``."""

    text: str
    labels: list[Annotated[str, StringConstraints(min_length=1, max_length=4096)]] = Field(
        min_length=1, max_length=1024
    )
    multi_label: bool = False


class QuestionAnsweringInput(GenerationParameters):
    """Input of ``QUESTION_ANSWERING``."""

    question: str
    context: str


class SummaryStyle(enum.StrEnum):
    """The form of a summary."""

    PARAGRAPH = "paragraph"
    BULLETS = "bullets"
    TLDR = "tldr"


class SummarizationInput(GenerationParameters):
    """Input of ``SUMMARIZATION``; ``target_length`` is in words."""

    text: str
    target_length: int = Field(100, ge=1, le=100_000)
    style: Annotated[SummaryStyle, _from_name(SummaryStyle)] = SummaryStyle.PARAGRAPH


class _TextCompletionToValidate(TextCompletionInput):
    type: Literal["TextCompletion"]


class _EmbeddingsToValidate(EmbeddingsInput):
    type: Literal["Embeddings"]


class ValidationInput(_Wire):
    """Input of ``VALIDATION``: a task to repeat and the hash its answer should have."""

    task: Annotated[_TextCompletionToValidate | _EmbeddingsToValidate, Field(discriminator="type")]
    expected_hash: str = Field(max_length=256)


INPUT_MODELS: dict[TaskType, type[_Wire]] = {
    TaskType.TEXT_COMPLETION: TextCompletionInput,
    TaskType.EMBEDDINGS: EmbeddingsInput,
    TaskType.CLASSIFICATION: ClassificationInput,
    TaskType.QUESTION_ANSWERING: QuestionAnsweringInput,
    TaskType.SUMMARIZATION: SummarizationInput,
    TaskType.VALIDATION: ValidationInput,
}
"""The input model of each inference task. Training and crawling have none: not offered here."""


class TokenLikelihood(_Wire):
    """A token with the natural-log probability that the model gave it."""

    token: int
    text: str
    logprob: float


class TokenLogprobs(TokenLikelihood):
    """A token of an answer, and the likeliest ones in its place, the likeliest first."""

    top: list[TokenLikelihood] = Field(default_factory=list)


class TextCompletionOutput(_Wire):
    """Output of ``TEXT_COMPLETION``."""

    task_type: Literal["TEXT_COMPLETION"] = "TEXT_COMPLETION"
    text: str
    finish_reason: Annotated[FinishReason, _from_name(FinishReason)]
    usage: Usage
    generation_time_ms: _Count
    logprobs: Late[list[TokenLogprobs]] = None


class EmbeddingsOutput(_Wire):
    """Output of ``EMBEDDINGS``: one row of ``dimensions`` floats for each text."""

    task_type: Literal["EMBEDDINGS"] = "EMBEDDINGS"
    embeddings: list[list[float]]
    dimensions: _Count
    usage: Usage


class Prediction(_Wire):
    """A label with its score in 0..1."""

    label: str
    score: float


class ClassificationOutput(_Wire):
    """Output of ``CLASSIFICATION``, highest score first."""

    task_type: Literal["CLASSIFICATION"] = "CLASSIFICATION"
    predictions: list[Prediction]
    usage: Usage


class QuestionAnsweringOutput(_Wire):
    """Output of ``QUESTION_ANSWERING``; spans are ``[start, end)`` in characters of the context."""

    task_type: Literal["QUESTION_ANSWERING"] = "QUESTION_ANSWERING"
    answer: str
    confidence: float
    evidence_spans: list[_Span]
    usage: Usage
    logprobs: Late[list[TokenLogprobs]] = None


class SummarizationOutput(_Wire):
    """Output of ``SUMMARIZATION``; the ratio is summary words over text words."""

    task_type: Literal["SUMMARIZATION"] = "SUMMARIZATION"
    summary: str
    compression_ratio: float
    usage: Usage
    logprobs: Late[list[TokenLogprobs]] = None


class ValidationOutput(_Wire):
    """Output of ``VALIDATION``."""

    task_type: Literal["VALIDATION"] = "VALIDATION"
    valid: bool
    answer_hash: str
    result: dict[str, Any] | None


TaskOutput = Annotated[
    TextCompletionOutput
    | EmbeddingsOutput
    | ClassificationOutput
    | QuestionAnsweringOutput
    | SummarizationOutput
    | ValidationOutput,
    Field(discriminator="task_type"),
]


class ErrorInfo(_Wire):
    """A failure as the coordinator sees it."""

    code: Annotated[ErrorCode, _from_name(ErrorCode)]
    message: str
    retryable: bool
    details: dict[str, Any] | None = None


class BlockMetrics(_Wire):
    """What computing a block cost. Times are milliseconds of the native loop's steady clock.

    Fields that make no sense for a failed block are None and left out, and so is
    ``suspended_ms`` when the machine has not slept meanwhile. It is in none of the other times.
    """

    queue_time_ms: float
    execution_time_ms: float
    total_time_ms: float
    load_time_ms: Late[float] = None
    prompt_time_ms: Late[float] = None
    time_to_first_token_ms: Late[float] = None
    tokens_processed: Late[int] = None
    tokens_per_second: Late[float] = None
    peak_memory_mb: Late[int] = None
    suspended_ms: Late[float] = None


class Fingerprint(_Wire):
    """What computed a result, precisely enough to compute it again."""

    model_sha256: str
    engine_build: str
    backend: str
    device: str
    threads: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    kv_type: str
    flash_attention: str
    seed: int
    deterministic: bool
    prefix_reused: int
    batched_with: int
    draft_model_sha256: Late[str] = None
    """Of the model that drafted tokens for the one that computed; None: none did."""
    output_tokens_sha256: str


class TaskResult(_Wire):
    """What ``SubmitResult`` carries: an output, or an error that says whose fault it was."""

    success: bool
    output: TaskOutput | None
    error: ErrorInfo | None
    metrics: BlockMetrics
    fingerprint: Late[Fingerprint] = None
