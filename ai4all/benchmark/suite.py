"""The network's benchmark: three prompts of different length, timed by the native loop."""

from __future__ import annotations

import asyncio
import datetime
import functools
import importlib.resources
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from ai4all.backend.base import Completion, GenerateRequest, InferenceBackend, TokenEvent
from ai4all.backend.devices import backend_of
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.scores import (
    BenchmarkKey,
    BenchmarkResult,
    PromptFigures,
    score,
)
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.tuning_store import Tuning
from ai4all.errors import ContextOverflow, EngineClosed

__all__ = ["BenchmarkProgress", "BenchmarkSuite", "TOKENS_PER_PROMPT", "benchmark_prompts"]

_log = logging.getLogger(__name__)

TOKENS_PER_PROMPT = 100
"""Tokens sampled for each prompt; end-of-generation tokens do not stop it."""

_WARM_UP_PROMPT = "Once upon a time there was"
_WARM_UP_TOKENS = 8

# Characters. What is shorter is measured whatever becomes of it.
_LEAST_PROMPT = 64


@dataclass(frozen=True, slots=True)
class BenchmarkProgress:
    """How far a run is: the prompt under way, and the tokens sampled of all prompts."""

    stage: str
    tokens_done: int
    tokens_total: int


def benchmark_prompts() -> tuple[tuple[str, str], ...]:
    """The prompts by name. Their texts are part of the score's definition."""
    return (
        ("short", "Hello, world!"),
        ("medium", "Explain quantum computing in simple terms."),
        ("long", _fixture("long_prompt.txt")),
    )


class BenchmarkSuite:
    """Runs the prompts on a backend and keeps the result.

    Args:
        store: Where results are kept; None keeps nothing.
    """

    def __init__(self, store: BenchmarkStore | None = None) -> None:
        self._store = store

    async def run(
        self,
        backend: InferenceBackend,
        progress: Callable[[BenchmarkProgress], None] | None = None,
        tuning: Tuning | None = None,
    ) -> BenchmarkResult:
        """Measure the model that ``backend`` holds.

        A short generation goes first and is not measured: it pays for page faults and for the
        first use of each kernel, which no later block pays again.

        Args:
            backend: With the model loaded.
            progress: Called after every token.
            tuning: What the model was loaded with, to be kept with the result.

        Raises:
            EngineClosed: No model is loaded.
            ComputeError: A generation failed.
            DataDirectoryError: The result could not be kept.
        """
        loaded = backend.loaded
        if loaded is None:
            raise EngineClosed("the benchmark needs a loaded model")
        prompts = benchmark_prompts()
        tokens_total = TOKENS_PER_PROMPT * len(prompts)

        def report(stage: str, tokens_done: int) -> None:
            if progress is not None:
                progress(BenchmarkProgress(stage, tokens_done, tokens_total))

        report("warm-up", 0)
        await backend.complete(_request(_WARM_UP_PROMPT, _WARM_UP_TOKENS))
        rows: list[PromptFigures] = []
        for name, prompt in prompts:
            _log.debug("measuring the %s prompt", name)
            done = sum(row.completion_tokens for row in rows)
            report(name, done)
            measure = functools.partial(_measure, backend, name, done=done, report=report)
            rows.append(await _measure_what_fits(measure, prompt))

        capabilities = backend.capabilities()
        memory_mb = backend.memory_mb()
        result = BenchmarkResult(
            timestamp=_now(),
            backend=backend_of(loaded.device),
            model=loaded.file.model_id,
            scores=score(rows, memory_mb),
            memory_mb=memory_mb,
            prompts=rows,
            key=BenchmarkKey.of(backend),
            hardware=await asyncio.to_thread(HardwareInfo.detect, capabilities.devices),
            tuning=tuning,
        )
        if self._store is not None:
            await asyncio.to_thread(self._store.save, result)
        return result


async def _measure_what_fits(
    measure: Callable[[str], Awaitable[PromptFigures]], prompt: str
) -> PromptFigures:
    """Measure with a prompt, or with its beginning where the context has no room for all of it."""
    whole = len(prompt)
    while True:
        is_least = len(prompt) < _LEAST_PROMPT
        try:
            figures = await measure(prompt)
        except ContextOverflow:
            if is_least:
                raise
        else:
            # Room for the prompt is not enough: what is sampled needs some too.
            if is_least or figures.completion_tokens == TOKENS_PER_PROMPT:
                break
        prompt = prompt[: len(prompt) * 3 // 4]
    if len(prompt) < whole:
        _log.warning(
            "the %s prompt did not fit into the context: its first %d tokens were measured",
            figures.name,
            figures.prompt_tokens,
        )
    return figures


async def _measure(
    backend: InferenceBackend,
    name: str,
    prompt: str,
    *,
    done: int,
    report: Callable[[str, int], None],
) -> PromptFigures:
    completion: Completion | None = None
    stream = backend.generate(_request(prompt, TOKENS_PER_PROMPT))
    try:
        async for event in stream:
            if isinstance(event, TokenEvent):
                report(name, done + event.completion_tokens)
            elif isinstance(event, Completion):
                completion = event
    finally:
        await stream.aclose()
    # A backend that breaks either rule would give figures that mean nothing.
    assert completion is not None, "a generation ended without a completion"
    timings = completion.timings
    assert timings.time_to_first_token_ms is not None, "a generation without a token"
    return PromptFigures(
        name=name,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        time_to_first_token_ms=timings.time_to_first_token_ms,
        queue_ms=timings.queue_ms,
        load_ms=timings.load_ms,
        prompt_ms=timings.prompt_ms,
        first_sample_ms=timings.first_sample_ms,
        total_ms=timings.total_ms,
        prompt_tokens_per_second=timings.prompt_tokens_per_second,
        decode_tokens_per_second=timings.decode_tokens_per_second,
        draft_accepted=completion.draft_accepted,
    )


def _request(prompt: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
    )


def _fixture(name: str) -> str:
    """Read a fixture: installed inside the package, or beside it in a source checkout."""
    installed = importlib.resources.files("ai4all") / "fixtures" / name
    if installed.is_file():
        return installed.read_text(encoding="utf-8").strip()
    checkout = Path(__file__).resolve().parents[2] / "fixtures" / name
    return checkout.read_text(encoding="utf-8").strip()


def _now() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
