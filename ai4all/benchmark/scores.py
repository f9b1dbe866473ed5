"""The figures of a benchmark run, and the formulas behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ai4all.backend.base import InferenceBackend
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.tuning_store import Tuning
from ai4all.errors import EngineClosed

__all__ = [
    "BASELINE_TIME_TO_FIRST_TOKEN_MS",
    "BASELINE_TOKENS_PER_SECOND",
    "BenchmarkKey",
    "BenchmarkResult",
    "BenchmarkScores",
    "PromptFigures",
    "composite_score",
    "score",
]

BASELINE_TOKENS_PER_SECOND = 50.0
"""Speed that earns the whole of the throughput share. Source: the network's score definition."""

BASELINE_TIME_TO_FIRST_TOKEN_MS = 100.0
"""Latency that earns the whole of the latency share. Source: the network's score definition."""

_Amount = Annotated[float, Field(ge=0.0)]
_Count = Annotated[int, Field(ge=0)]


class _Kept(BaseModel):
    """Base of what is kept on disk: immutable, finite, blind to fields of later versions."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)


class BenchmarkKey(_Kept):
    """What must be equal for two runs to be comparable. ``device`` is what really ran."""

    model_sha256: str
    engine_build: str
    device: str
    threads: _Count
    draft_model_sha256: str | None = None

    @classmethod
    def of(cls, backend: InferenceBackend) -> BenchmarkKey:
        """The key of what ``backend`` has loaded.

        Raises:
            EngineClosed: Nothing is loaded.
        """
        loaded = backend.loaded
        if loaded is None:
            raise EngineClosed("no model is loaded")
        return cls(
            model_sha256=loaded.file.sha256,
            engine_build=backend.capabilities().engine_build,
            device=loaded.device,
            threads=loaded.threads,
            draft_model_sha256=loaded.draft.sha256 if loaded.draft is not None else None,
        )


class PromptFigures(_Kept):
    """One prompt of the suite, as the native loop timed it.

    ``time_to_first_token_ms`` is the sum of the four parts after it. ``total_ms`` runs from the
    submission to the last token. Of the tokens, ``draft_accepted`` came from drafts.
    """

    name: str
    prompt_tokens: _Count
    completion_tokens: _Count
    time_to_first_token_ms: _Amount
    queue_ms: _Amount
    load_ms: _Amount
    prompt_ms: _Amount
    first_sample_ms: _Amount
    total_ms: _Amount
    prompt_tokens_per_second: _Amount | None
    decode_tokens_per_second: _Amount | None
    draft_accepted: _Count = 0


class BenchmarkScores(_Kept):
    """The suite's four figures.

    Attributes:
        tokens_per_second: Sum of the tokens over sum of the whole generations' times.
        time_to_first_token_ms: Mean over the prompts.
        memory_efficiency: Tokens for each MiB of memory in use.
        composite: ``composite_score`` of the first two, 0..1.
    """

    tokens_per_second: _Amount
    time_to_first_token_ms: _Amount
    memory_efficiency: _Amount
    composite: _Amount


class BenchmarkResult(_Kept):
    """One run of the suite: what was measured, on what, with what.

    Attributes:
        timestamp: RFC 3339, UTC.
        backend: "cpu", "cuda", "rocm", "vulkan" or "metal".
        model: Id of the model.
        memory_mb: Memory in use after the last prompt, in MiB.
        tuning: The search that chose how the model was run; None where the owner did.
    """

    timestamp: str
    backend: str
    model: str
    scores: BenchmarkScores
    memory_mb: _Count
    prompts: list[PromptFigures]
    key: BenchmarkKey
    hardware: HardwareInfo
    tuning: Tuning | None = None


def composite_score(tokens_per_second: float, time_to_first_token_ms: float) -> float:
    """Weigh throughput (0.7) and latency (0.3) into one figure in 0..1.

    Source: the network's score definition; each share is capped at its baseline.
    """
    throughput = min(1.0, tokens_per_second / BASELINE_TOKENS_PER_SECOND)
    latency = 1.0
    if time_to_first_token_ms > BASELINE_TIME_TO_FIRST_TOKEN_MS:
        latency = BASELINE_TIME_TO_FIRST_TOKEN_MS / time_to_first_token_ms
    return 0.7 * throughput + 0.3 * latency


def score(prompts: Sequence[PromptFigures], memory_mb: int) -> BenchmarkScores:
    """Score the rows of one run.

    Args:
        prompts: At least one row.
        memory_mb: Memory in use, in MiB; below 1 counts as 1.

    Raises:
        ValueError: There is no row, or no time has passed.
    """
    if not prompts:
        raise ValueError("no prompt was measured")
    tokens = sum(row.completion_tokens for row in prompts)
    seconds = sum(row.total_ms for row in prompts) / 1000.0
    if seconds <= 0.0:
        raise ValueError("the measured prompts took no time")
    tokens_per_second = tokens / seconds
    time_to_first_token_ms = sum(row.time_to_first_token_ms for row in prompts) / len(prompts)
    return BenchmarkScores(
        tokens_per_second=tokens_per_second,
        time_to_first_token_ms=time_to_first_token_ms,
        memory_efficiency=tokens / max(1, memory_mb),
        composite=composite_score(tokens_per_second, time_to_first_token_ms),
    )
